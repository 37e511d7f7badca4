"""Answers that a client may leave: streams of server-sent events, and waits that end with the connection.

Owns the race between the work and the disconnect. uvicorn cancels nothing when a client leaves and drops what
is sent after, so every answer here listens for `http.disconnect` itself. Knows no endpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Final, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.errors import JaxserveError
from jaxserve_server.errors import ApiError, error_event, from_exception

T = TypeVar("T")
DONE: Final = b"data: [DONE]\n\n"
CLIENT_CLOSED_STATUS: Final = 499  # nginx's; for the log, nobody is there to read it
STREAM_HEADERS: Final = {
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold events back
}


def event(chunk: msgspec.Struct) -> bytes:
    """`chunk` as one server-sent event."""
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


class ClientLeftError(Exception):
    """The client closed the connection before its answer was ready."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled, and has ended, if the client leaves first.

    Raises:
        ClientLeftError: it left.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeftError
    finally:
        await cancel(task, watcher)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has left. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancels the tasks that still run and waits until they have cleaned up."""
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    if running:
        await asyncio.gather(*running, return_exceptions=True)


class EventStream(Response):
    """A stream of events that have begun to come.

    Args:
        first: what `rest` gave first, so that a request which fails before it is answered with a status.
        rest: pieces of one or more whole events. It is closed when the client leaves, which ends the
            engine's requests behind it. A JaxserveError or ApiError that it raises becomes the last event.
    """

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        super().__init__(status_code=200, headers=STREAM_HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._pump(send))
        except ClientLeftError:
            pass
        finally:
            await self._rest.aclose()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        while (piece := await self._next()) is not None:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self) -> bytes | None:
        try:
            return await anext(self._rest, None)
        except (ApiError, JaxserveError) as exc:
            # No [DONE] follows: a client must be able to tell a failure from an end.
            return error_event(from_exception(exc))


async def start_stream(receive: Receive, events: AsyncGenerator[bytes, None]) -> Response:
    """A response that streams `events`, once the first of them is there.

    Raises:
        ClientLeftError, and whatever `events` raises before its first piece.
    """
    try:
        first = await while_connected(receive, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events)
