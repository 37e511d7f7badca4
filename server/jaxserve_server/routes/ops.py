"""`/health`, `/ping`, `/version` and `/metrics`: what probes, routers and Prometheus ask."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxserve import __version__
from jaxserve_server.errors import ApiError, ErrorKind, error_response
from jaxserve_server.metrics_export import CONTENT_TYPE
from jaxserve_server.status import Phase, ServerStatus

RETRY_AFTER_S = 1


class OpsRoutes:
    """The four endpoints of one server."""

    def __init__(self, status: ServerStatus) -> None:
        self._status = status

    async def health(self, request: Request) -> Response:
        """200 if requests may be sent here, else 503; the body says why, and gives the engine's figures."""
        health = self._status.health()
        body: dict[str, object] = {"status": health.reason}
        if health.stats is not None:
            body |= {
                "running": health.stats.num_running,
                "waiting": health.stats.num_waiting,
                "free_blocks": health.stats.num_free_blocks,
                "last_commit_age_s": round(health.stats.last_commit_age_s, 3),
            }
        headers = {} if health.ok else {"retry-after": str(RETRY_AFTER_S)}
        if self._status.phase is Phase.DRAINING:
            headers["connection"] = "close"
        return json_response(body, 200 if health.ok else 503, headers)

    async def ping(self, request: Request) -> Response:
        """200 while the process answers at all. Load never changes it."""
        return Response()

    async def version(self, request: Request) -> Response:
        return json_response({"version": __version__})

    async def metrics(self, request: Request) -> Response:
        """The engine's numbers, once there is an engine; before that the phase gate answers, or this 503."""
        loaded, page = self._status.loaded, self._status.metrics_page
        if loaded is None or page is None:
            return error_response(ApiError(ErrorKind.SERVER_STARTING))
        await loaded.engine.refresh()
        return Response(page.render(), headers={"content-type": CONTENT_TYPE})

    def routes(self) -> list[Route]:
        both = ["GET", "HEAD"]
        return [
            Route("/health", self.health, methods=both),
            Route("/ping", self.ping, methods=[*both, "POST"]),  # SageMaker's is GET, vLLM takes both
            Route("/version", self.version, methods=both),
            Route("/metrics", self.metrics, methods=both),
        ]


def json_response(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")
