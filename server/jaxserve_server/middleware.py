"""Guards in front of the routes: framing, host names, the server's phase, and the size and pace of bodies.

Pure ASGI: Starlette's BaseHTTPMiddleware buffers streams without bound and hides disconnects. Each class
does one thing; `app.py` says in which order they stand.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve_server.errors import ApiError, ErrorKind, error_response
from jaxserve_server.exchange import Exchange
from jaxserve_server.status import OpenRequest, Phase, ServerStatus

MAX_HEADERS = 256
PATHS_WHILE_STARTING = frozenset({"/ping", "/health"})
PATHS_WHILE_DRAINING = PATHS_WHILE_STARTING | {"/metrics", "/version"}


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


class RootPath:
    """Lets a proxy in front send paths with its prefix or without it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = "/" + prefix.strip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if path.startswith(self._prefix + "/"):
            scope = {**scope, "path": path.removeprefix(self._prefix)}
        await self._app(scope, receive, send)


class FramingGuard:
    """Refuses requests whose length two servers could read differently, and bombs of headers.

    h11 takes a request with both Content-Length and Transfer-Encoding and lets the latter win; RFC 9112
    section 6.1 calls it an attempt at request smuggling.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if header_values(scope, b"content-length") and header_values(scope, b"transfer-encoding"):
            await error_response(ApiError(ErrorKind.AMBIGUOUS_FRAMING))(scope, receive, send)
        elif len(scope["headers"]) > MAX_HEADERS or scope["http_version"] not in ("1.0", "1.1"):
            await error_response(ApiError(ErrorKind.BAD_HTTP))(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class HostGuard:
    """Refuses names that this server does not go by, so that a web page cannot reach a local server
    through a name of its own (DNS rebinding: CVE-2025-62593, CVE-2024-28224).

    Addresses always pass, since rebinding needs a name; so does a request without a Host, which browsers
    do not send.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str]) -> None:
        """`allowed` holds names; `*.name` stands for all names below it."""
        self._app = app
        names = [name.lower().rstrip(".") for name in allowed]
        self._exact = frozenset(name for name in names if not name.startswith("*."))
        self._suffixes = tuple(name.removeprefix("*") for name in names if name.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if all(self.allows(value) for value in header_values(scope, b"host")):
            await self._app(scope, receive, send)
        else:
            await error_response(ApiError(ErrorKind.INVALID_HOST))(scope, receive, send)

    def allows(self, value: bytes) -> bool:
        name = host_name(value)
        return name is not None and (name in self._exact or name.endswith(self._suffixes) or is_address(name))


def host_name(value: bytes) -> str | None:
    """The name in a Host header, without port and brackets; None if the header is malformed."""
    text = value.decode("latin-1").lower()
    if text.startswith("["):
        name, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            return None
        port = port[1:]
    else:
        name, _, port = text.partition(":")
    if port and not (port.isascii() and port.isdigit()):
        return None
    return name.rstrip(".") or None


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class PhaseGate:
    """Answers 503 while the server starts or drains, and keeps the requests that a drain must wait for."""

    def __init__(self, app: ASGIApp, status: ServerStatus) -> None:
        self._app = app
        self._status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, phase = scope["path"], self._status.phase
        if path in PATHS_WHILE_STARTING or (phase is not Phase.STARTING and path in PATHS_WHILE_DRAINING):
            await self._app(scope, receive, send)
        elif phase is Phase.STARTING:
            await error_response(ApiError(ErrorKind.SERVER_STARTING))(scope, receive, send)
        elif phase is Phase.DRAINING:
            await error_response(ApiError(ErrorKind.SERVER_DRAINING))(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None, "an ASGI application runs in a task"
        request = OpenRequest(task)
        self._status.open(request)
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if not request.expired:
                raise
            task.uncancel()
            exchange: Exchange = scope["state"]["exchange"]
            await exchange.fail(ApiError(ErrorKind.SERVER_DRAINING))
        finally:
            self._status.close(request)


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """How large a body may be, and how slowly it may come.

    Attributes:
        gap_s: longest wait for more bytes.
        total_s: longest wait for all of them.
    """

    max_bytes: int = 4 * 2**20
    gap_s: float = 10.0
    total_s: float = 30.0


class BodyGuard:
    """Reads the whole body within its limits before the route sees the request."""

    def __init__(self, app: ASGIApp, limits: BodyLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check_headers(scope)
            body = await self._read(receive)
        except ApiError as err:
            await error_response(err)(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, replay(body, receive), send)

    def _check_headers(self, scope: Scope) -> None:
        """Raises ApiError for a body that need not be read to be refused."""
        for encoding in header_values(scope, b"content-encoding"):
            if encoding.strip().lower() not in (b"", b"identity"):
                raise ApiError(ErrorKind.UNSUPPORTED_ENCODING)
        for length in header_values(scope, b"content-length"):
            if len(length) > 20 or int(length) > self._limits.max_bytes:
                raise self._too_large()

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or None if the client left."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.total_s
        parts: list[bytes] = []
        size = 0
        while True:
            try:
                async with asyncio.timeout_at(min(deadline, loop.time() + self._limits.gap_s)):
                    message = await receive()
            except TimeoutError:
                raise ApiError(ErrorKind.REQUEST_TIMEOUT) from None
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self._limits.max_bytes:
                raise self._too_large()
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(ErrorKind.REQUEST_TOO_LARGE, limit=self._limits.max_bytes)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` as one message, then whatever comes next."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_replayed() -> Message:
        return pending.pop() if pending else await receive()

    return receive_replayed
