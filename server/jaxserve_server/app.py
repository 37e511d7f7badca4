"""The application: routes, guards in their order, and JSON answers to what no route takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from jaxserve.errors import JaxserveError
from jaxserve_server.auth import ApiKeys, Authentication
from jaxserve_server.errors import ApiError, ErrorKind, error_response, from_exception, quote
from jaxserve_server.exchange import RequestLayer
from jaxserve_server.middleware import BodyGuard, BodyLimits, FramingGuard, HostGuard, PhaseGate, RootPath
from jaxserve_server.routes.ops import OpsRoutes
from jaxserve_server.status import ServerStatus

LOCAL_NAMES = ("localhost", "*.localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class AppSettings:
    """What the operator decides about the application.

    Attributes:
        allowed_hosts: names that requests may be sent to; None for any.
        root_path: prefix that a proxy in front puts before the paths, or "".
    """

    keys: ApiKeys = field(default_factory=lambda: ApiKeys(()))
    allowed_hosts: tuple[str, ...] | None = LOCAL_NAMES
    root_path: str = ""
    body_limits: BodyLimits = field(default_factory=BodyLimits)
    log_requests: bool = True


@dataclass(frozen=True, slots=True)
class Application:
    """The guarded application, and the Starlette inside it, whose `state.serving` the routes read."""

    asgi: ASGIApp
    inner: Starlette

    @property
    def routes(self) -> list[Route]:
        return [route for route in self.inner.routes if isinstance(route, Route)]


def build_app(api_routes: Sequence[Route], status: ServerStatus, settings: AppSettings) -> Application:
    """The application with the operations' routes and `api_routes`.

    A request passes, in this order: its id and log line; framing; host; key; the server's phase; the
    body's limits; the routes. So a request without a key learns nothing but that, whatever its path.
    """
    for route in api_routes:
        if route.methods and "GET" in route.methods:
            route.methods.discard("HEAD")  # Starlette adds it; only the operations' routes answer HEAD
    inner = Starlette(
        routes=[*OpsRoutes(status).routes(), *api_routes],
        exception_handlers={
            HTTPException: unrouted,
            ApiError: answer_error,
            JaxserveError: answer_error,
            Exception: answer_error,
        },
    )
    inner.router.redirect_slashes = False  # the redirect's address would be made from the Host header
    app: ASGIApp = BodyGuard(inner, settings.body_limits)
    app = PhaseGate(app, status)
    if settings.keys:
        app = Authentication(app, settings.keys)
    if settings.allowed_hosts is not None:
        app = HostGuard(app, settings.allowed_hosts)
    app = FramingGuard(app)
    if settings.root_path:
        app = RootPath(app, settings.root_path)
    return Application(RequestLayer(app, log_requests=settings.log_requests), inner)


async def answer_error(request: Request, exc: Exception) -> Response:
    return error_response(from_exception(exc))


async def unrouted(request: Request, exc: Exception) -> Response:
    """404 and 405 in OpenAI's shape and words."""
    assert isinstance(exc, HTTPException)
    path = quote(request.scope["path"])
    if exc.status_code == 405:
        allowed = ", ".join(sorted((exc.headers or {}).get("Allow", "").split(", ")))
        return error_response(
            ApiError(
                ErrorKind.METHOD_NOT_ALLOWED,
                method=request.method,
                path=path,
                allowed=allowed,
                headers={"allow": allowed},
            )
        )
    return error_response(ApiError(ErrorKind.UNKNOWN_URL, method=request.method, path=path))
