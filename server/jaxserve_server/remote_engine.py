"""`RemoteEngine`: the server's end of an engine in a process of its own.

Serves the same seam as `jaxserve.engine`'s AsyncEngine, from the event loop that it was made in: what a step gave
to all streams comes in one frame, which is one wake-up. Free of jax. Knows no HTTP, and of the process only that
it can be stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol

import msgspec

from jaxserve.engine.stream import Stream
from jaxserve.errors import EngineDeadError, JaxserveError, ParameterError
from jaxserve.metrics import EngineMetrics
from jaxserve.types import BeamSearchParams, Delta, EngineStats, FinishReason, SamplingParams
from jaxserve_server import wire

SILENCE_S = 5.0  # a living engine is heard once a second
REFRESH_S = 1.0  # an engine that does not answer must not hold up who scrapes it

logger = logging.getLogger("jaxserve.server")


class EngineHost(Protocol):
    """The process behind a RemoteEngine."""

    def stop(self) -> None:
        """Waits for its end, which has been asked for; kills it if it does not come."""
        ...

    def kill(self) -> None: ...

    def describe_end(self) -> str:
        """How it ended, for the log. Blocks until it has, for seconds at most."""
        ...


class RemoteEngine:
    """The engine of another process, for callers in one event loop.

    Attributes:
        model_read, ready: the messages of these names, or why they will never come.
    """

    def __init__(self, host: EngineHost) -> None:
        self.model_read: Future[wire.ModelRead] = Future()
        self.ready: Future[wire.Ready] = Future()
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.WriteTransport
        self._encoder = msgspec.msgpack.Encoder()
        self._numbers = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._number_of: dict[str, int] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._stats: EngineStats | None = None
        self._metrics: EngineMetrics
        self._heard_s = time.monotonic()
        self._death: EngineDeadError | None = None
        self._stopping = False

    @classmethod
    async def connect(cls, sock: socket.socket, host: EngineHost, start: wire.Start) -> RemoteEngine:
        """Takes `sock` over, and tells the process at its other end what to serve."""
        engine = cls(host)
        await engine._loop.create_connection(lambda: _Receiver(engine), sock=sock)
        engine._send(start)
        return engine

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken."""
        return self._death is None and not self._stopping and self.ready.done()

    @property
    def metrics(self) -> EngineMetrics:
        """The engine's, a second old at most; the same object each time."""
        return self._metrics

    def stats(self) -> EngineStats:
        """What was last heard of the engine. While it is silent its age grows: it may be stuck."""
        stats, silence_s = self._stats, time.monotonic() - self._heard_s
        assert stats is not None, "it is not ready"
        if self._death is not None or not (stats.num_running or stats.num_waiting or silence_s > SILENCE_S):
            return stats
        return replace(stats, last_commit_age_s=stats.last_commit_age_s + silence_s)

    async def refresh(self) -> None:
        """Brings `metrics` and `stats` up to date, unless the engine does not answer within a second."""
        if self._death is None:
            with contextlib.suppress(TimeoutError, EngineDeadError):
                async with asyncio.timeout(REFRESH_S):
                    await self._call(wire.Refresh)

    async def generate(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | BeamSearchParams,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """As AsyncEngine's. A request that cannot be served is refused by the engine, before any delta.

        Raises:
            RequestError, UnavailableError, EngineError: as AsyncEngine's.
        """
        self._check_alive()
        number = next(self._numbers)
        request_id = f"gen-{number}" if request_id is None else request_id
        if request_id in self._number_of:
            raise ValueError(f"Request id {request_id!r} is in use. Choose another, or none.")
        request = self._request(number, token_ids, params, cache_salt)
        stream = self._streams[number] = Stream(request_id, params.num_sequences)
        self._number_of[request_id] = number
        try:
            self._transport.write(request)
            while await stream.more():
                delta = stream.take()
                if delta is not None:
                    yield delta
        finally:
            if not stream.done:
                self.abort(request_id)
            del self._streams[number], self._number_of[request_id]

    def _request(
        self, number: int, token_ids: Sequence[int], params: SamplingParams | BeamSearchParams, cache_salt: str | None
    ) -> bytearray:
        """The frame that asks for it. Here fails what cannot be said at all; the rest is for the engine to check."""
        try:
            message = wire.add_message(number, token_ids, params, cache_salt)
        except (TypeError, OverflowError) as exc:
            reason = "The prompt must hold integer token ids."
            raise ParameterError(reason, param="prompt", code="invalid_type") from exc
        try:
            return wire.frame(message, self._encoder)
        except UnicodeEncodeError as exc:
            raise ParameterError("The request holds text that is not valid Unicode: half of a surrogate pair.") from exc

    def abort(self, request_id: str, reason: FinishReason = "abort", index: int | None = None) -> None:
        """As AsyncEngine's."""
        number = self._number_of.get(request_id)
        if number is not None:
            self._send(wire.Abort(number, reason, index))

    async def reset_prefix_cache(self) -> int:
        """As AsyncEngine's.

        Raises:
            EngineDeadError: the engine has ended.
        """
        self._check_alive()
        return (await self._call(wire.ResetPrefixCache)).num_blocks

    def shutdown(self, *, at_once: bool = False) -> None:
        """Ends the process; open requests fail with EngineDeadError. Blocks until it has ended. From any thread."""
        self._stopping = True
        if at_once:
            self._host.kill()
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the socket with it
            self._loop.call_soon_threadsafe(self._send, wire.Stop())
        self._host.stop()

    def _check_alive(self) -> None:
        if self._death is not None:
            raise self._death

    def _send(self, message: wire.FromServer) -> None:
        if not self._transport.is_closing():
            self._transport.write(wire.frame(message, self._encoder))

    async def _call(self, kind: type[wire.Refresh | wire.ResetPrefixCache]) -> Any:
        """Sends a message of `kind`; returns the message that answers it."""
        call, answer = next(self._numbers), self._loop.create_future()
        self._calls[call] = answer
        try:
            self._send(kind(call))
            return await answer
        finally:
            del self._calls[call]

    # Called by `_Receiver`.

    def _on_connected(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport

    def _on_message(self, message: wire.FromEngine) -> None:
        self._heard_s = time.monotonic()
        match message:
            case wire.Step():
                self._stats = wire.unpack_stats(message.stats)
                for item in message.items:
                    stream = self._streams.get(item.number)
                    if stream is not None:  # else its reader has left
                        stream.put(wire.unpack_item(item))
            case wire.Snapshot():
                self._stats = wire.unpack_stats(message.stats)
                self._metrics.restore(message.metrics)
                self._answer(message.call, message)
            case wire.PrefixCacheReset():
                self._answer(message.call, message)
            case wire.ModelRead():
                self.model_read.set_result(message)
            case wire.Ready():
                self._metrics = EngineMetrics(max_model_len=message.limits.max_model_len)
                self._metrics.restore(message.metrics)
                self._stats = wire.unpack_stats(message.stats)
                self.ready.set_result(message)
            case wire.Failed():
                self._end(wire.unpack_error(message.error))

    def _answer(self, call: int | None, message: Any) -> None:
        answer = None if call is None else self._calls.get(call)
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _on_malformed(self, error: wire.MalformedFrameError) -> None:
        logger.critical("the engine's process sent what cannot be read: %s", error)
        self._end(EngineDeadError("The engine's process sent a malformed message."))
        self._transport.abort()
        self._host.kill()

    def _on_closed(self) -> None:
        if self._stopping:
            self._end(EngineDeadError("The engine was shut down."))
        elif self._death is None:
            self._end(EngineDeadError("The engine's process has ended."))
            self._loop.run_in_executor(None, self._log_end)

    def _log_end(self) -> None:
        logger.critical("the engine's process ended: %s", self._host.describe_end())

    def _end(self, error: JaxserveError) -> None:
        """Fails all that waits for the engine, once."""
        if self._death is not None:
            return
        self._death = death = error if isinstance(error, EngineDeadError) else EngineDeadError(str(error))
        for future in (self.model_read, self.ready):
            if not future.done():
                future.set_exception(error)
        if self._stats is not None:
            self._stats = replace(self._stats, num_running=0, num_waiting=0, last_commit_age_s=0.0)
        for stream in self._streams.values():
            stream.put(death)
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(death)


class _Receiver(asyncio.Protocol):
    """Cuts what comes through the socket into messages."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine
        self._frames = wire.FrameReader(wire.FromEngine)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._engine._on_connected(transport)  # pyright: ignore[reportArgumentType] - of a stream socket

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._frames.feed(data):
                self._engine._on_message(message)
        except wire.MalformedFrameError as error:
            self._engine._on_malformed(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine._on_closed()
