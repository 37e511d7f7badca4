"""The outermost layer of every request: its id, its line in the log, and the answer of last resort.

Pure ASGI. Nothing that a client sent reaches the log unescaped or longer than 256 characters, and neither
prompts, outputs, keys, query strings nor messages of unexpected exceptions reach it at all.
"""

from __future__ import annotations

import logging
import re
import time
import traceback
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve_server.errors import ApiError, ErrorKind, error_event, error_response

MAX_LOGGED_CHARS = 256
MAX_LOGGED_FRAMES = 8  # of an unexpected exception, innermost ones
CLIENT_CLOSED = 499  # nginx's status for a client that left; logged, never sent
QUIET_PATHS = frozenset({"/health", "/ping", "/metrics", "/version"})  # probes: logged at debug level

logger = logging.getLogger("jaxserve.access")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


class Exchange:
    """One request and its answer, watched on their way through.

    Attributes:
        status: of the answer; None before it begins.
        complete: the answer's last byte was handed over.
        disconnected: the client is known to have left.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self.status: int | None = None
        self.complete = False
        self.disconnected = False
        self.request_id = request_id
        self._scope = scope
        self._receive = receive
        self._send = send
        self._body_unread = has_body(scope)
        self._is_event_stream = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.disconnected = self.disconnected or not self.complete
        elif not message.get("more_body", False):
            self._body_unread = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = self._begin(message)
        elif not message.get("more_body", False):
            self.complete = True
        await self._send(message)

    async def fail(self, err: ApiError) -> None:
        """Ends the answer with `err`: as a whole answer, or as the last event of a stream that has begun.

        An answer of another kind that has begun is left incomplete, upon which uvicorn closes the connection.
        """
        if self.status is None:
            await error_response(err)(self._scope, self.receive, self.send)
        elif self._is_event_stream and not self.complete:
            await self.send({"type": "http.response.body", "body": error_event(err), "more_body": False})

    def _begin(self, message: Message) -> Message:
        self.status = message["status"]
        headers = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
        for name, value in headers:
            if name.lower() == b"content-type":
                self._is_event_stream = value.startswith(b"text/event-stream")
        if self._body_unread and not any(name.lower() == b"connection" for name, _ in headers):
            # What is left of the body would be taken for the next request's; and nobody waits for it.
            headers.append((b"connection", b"close"))
        return {**message, "headers": headers}


class RequestLayer:
    """Gives each request its id and `scope["state"]["exchange"]`, logs it, and answers what nobody else did."""

    def __init__(self, app: ASGIApp, *, log_requests: bool = True) -> None:
        self._app = app
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began = time.monotonic()
        exchange = Exchange(scope, receive, send, request_id_of(scope))
        state = {**scope.get("state", {}), "request_id": exchange.request_id, "exchange": exchange}
        try:
            await self._app({**scope, "state": state}, exchange.receive, exchange.send)
        except Exception as exc:
            log_failure(exchange.request_id, exc)
            await exchange.fail(ApiError(ErrorKind.INTERNAL_ERROR))
        finally:
            if self._log_requests:
                log_exchange(scope, exchange, time.monotonic() - began)


def request_id_of(scope: Scope) -> str:
    """The client's x-request-id if there is one and it is harmless, else an id of our own.

    It is only echoed and logged; the engine's ids are always ours (vLLM #10583: an abort of one request
    killed another that had the same id).
    """
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return given[0].decode("ascii")
    return f"req-{uuid.uuid4().hex}"


def has_body(scope: Scope) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in scope["headers"]
    )


def printable(text: str) -> str:
    """A client's text as it may stand in a log line: ASCII, escaped, at most 256 characters of it."""
    return ascii(text[:MAX_LOGGED_CHARS])[1:-1]


def log_exchange(scope: Scope, exchange: Exchange, seconds: float) -> None:
    gone = exchange.disconnected and not exchange.complete
    host, port = scope.get("client") or ("-", 0)
    logger.log(
        logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO,
        '%s:%d - "%s %s HTTP/%s" %s %.0f ms %s',
        host,
        port,
        printable(scope["method"]),
        printable(scope["path"]),
        scope["http_version"],
        CLIENT_CLOSED if gone else exchange.status or CLIENT_CLOSED,
        seconds * 1000,
        exchange.request_id,
    )


def log_failure(request_id: str, exc: BaseException) -> None:
    """Logs where an unexpected exception came from. Its message may hold a client's text: debug level only."""
    frames = "".join(traceback.format_tb(exc.__traceback__, limit=-MAX_LOGGED_FRAMES))
    logger.error("request %s failed with %s\n%s", request_id, type(exc).__name__, frames.rstrip())
    logger.debug("request %s: %s", request_id, printable(str(exc)))
