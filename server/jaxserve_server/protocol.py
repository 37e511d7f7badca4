"""HTTP connections with deadlines: uvicorn's h11 protocol, wrapped.

uvicorn has a timeout between requests only. A connection that never sends a request, sends its headers one
byte a minute, or never reads its answer is kept for ever. This wrapper closes those, and closes a
connection with an unread body so that the client can still read the answer. Knows no application.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Deadlines of a connection.

    Attributes:
        header_s: from its start, or from a request's first byte, until the headers are complete.
        stalled_write_s: longest time in which the client takes nothing of an answer that waits for it.
        linger_s, linger_bytes: how long, and how much, an unread body is read and dropped after the answer.
    """

    header_s: float = 10.0
    stalled_write_s: float = 60.0
    linger_s: float = 2.0
    linger_bytes: int = 64 * 2**20


class LingeringTransport(asyncio.Transport):
    """A transport whose `close` lets a client that is still sending read the answer.

    A plain close with bytes unread makes the kernel send RST, and the client loses the answer that it has
    not read yet (RFC 9112 section 9.6). Here the write side is shut, and what still comes is dropped until
    the client closes or a limit is reached.
    """

    def __init__(self, transport: asyncio.Transport, limits: ConnectionLimits) -> None:
        super().__init__()
        self.still_receiving: Callable[[], bool] = lambda: False
        self._transport = transport
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._dropped = 0

    @property
    def lingering(self) -> bool:
        return self._timer is not None

    def close(self) -> None:
        if self._transport.is_closing() or self.lingering:
            return
        if not self.still_receiving() or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._timer = asyncio.get_running_loop().call_later(self._limits.linger_s, self._transport.close)
        self._transport.write_eof()
        self._transport.resume_reading()

    def drop(self, num_bytes: int) -> None:
        """Counts bytes that came after `close`."""
        self._dropped += num_bytes
        if self._dropped > self._limits.linger_bytes:
            self._transport.close()

    def lost(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def is_closing(self) -> bool:
        return self.lingering or self._transport.is_closing()

    def write(self, data: Any) -> None:
        if not self.lingering:
            self._transport.write(data)

    def abort(self) -> None:
        self._transport.abort()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)


class TimedProtocol(asyncio.Protocol):
    """Forwards everything to uvicorn's protocol and keeps the connection's deadlines."""

    def __init__(self, inner: H11Protocol, limits: ConnectionLimits) -> None:
        self._inner = inner
        self._limits = limits
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._transport: LingeringTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = LingeringTransport(cast(asyncio.Transport, transport), self._limits)
        self._transport.still_receiving = lambda: self._inner.conn.their_state is h11.SEND_BODY
        self._inner.connection_made(self._transport)
        self._start_header_timer()

    def data_received(self, data: bytes) -> None:
        if self._transport.lingering:
            self._transport.drop(len(data))
            return
        self._inner.data_received(data)
        if self._inner.conn.their_state is h11.IDLE:
            self._start_header_timer()
        else:
            self._stop_header_timer()

    def eof_received(self) -> None:
        self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_write_timer()
        self._transport.lost()
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        loop = asyncio.get_running_loop()
        self._write_timer = loop.call_later(self._limits.stalled_write_s, self._transport.abort)
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._stop_write_timer()
        self._inner.resume_writing()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _start_header_timer(self) -> None:
        """Starts the deadline of a request's headers unless it runs: slow bytes do not move it."""
        if self._header_timer is None:
            loop = asyncio.get_running_loop()
            self._header_timer = loop.call_later(self._limits.header_s, self._transport.close)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


def timed_protocol(limits: ConnectionLimits) -> Callable[..., TimedProtocol]:
    """What uvicorn's Config takes for `http`: makes one protocol a connection."""

    def make(
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> TimedProtocol:
        return TimedProtocol(H11Protocol(config, server_state, app_state, _loop), limits)

    return make
