"""`POST /reset_prefix_cache`: forgets the KV of past requests, as vLLM's route of this name does."""

from __future__ import annotations

import logging

from starlette.requests import Request
from starlette.responses import Response

from jaxserve_server.body import read_request
from jaxserve_server.errors import ApiError, ErrorKind, quote
from jaxserve_server.schemas import ResetRequest
from jaxserve_server.serving import Serving

logger = logging.getLogger("jaxserve.server")


async def reset_prefix_cache(request: Request, serving: Serving) -> Response:
    """An empty 200, vLLM's answer. Its options (running requests, external caches) are refused by name.

    A browser sends a POST without a body across origins without asking first, so any page could empty the cache
    of a server on the reader's machine: whatever names an origin is refused.
    """
    if "origin" in request.headers:
        raise ApiError(ErrorKind.INSUFFICIENT_PERMISSIONS)
    for name in request.query_params:
        raise ApiError(ErrorKind.UNKNOWN_PARAMETER, name=quote(name))
    if await request.body():
        await read_request(request, ResetRequest, max_depth=serving.limits.max_json_depth)
    num_blocks = await serving.engine.reset_prefix_cache()
    logger.info("Prefix cache reset: %d blocks forgotten", num_blocks)
    return Response()
