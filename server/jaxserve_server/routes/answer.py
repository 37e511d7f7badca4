"""What every route shares: the serving value, JSON answers, and errors as answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.errors import JaxserveError
from jaxserve_server.errors import ApiError, error_response, from_exception
from jaxserve_server.serving import Serving
from jaxserve_server.sse import CLIENT_CLOSED_STATUS, ClientLeftError

Handler = Callable[[Request, Serving], Awaitable[Response]]


def answering(handler: Handler, *, what: str = "prompt") -> Callable[[Request], Awaitable[Response]]:
    """The endpoint around `handler`: its errors of ours become answers; any other is the app's to answer and log.

    Args:
        what: how this endpoint spells its input, in errors about its length.
    """

    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request, request.app.state.serving)
        except ClientLeftError:
            return Response(status_code=CLIENT_CLOSED_STATUS)
        except (ApiError, JaxserveError) as exc:
            return error_response(from_exception(exc, what=what))

    return endpoint


def json_response(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
