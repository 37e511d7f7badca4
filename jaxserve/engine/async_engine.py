"""`AsyncEngine`: the one seam that HTTP, and everything later, plugs into. Token in, token out.

The step loop runs in a thread of its own, which alone touches `EngineCore`. Callers' requests and
aborts reach it through a mailbox that it empties between steps; deltas go back to each caller's event
loop, one wake-up a step however many streams there are.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from jaxserve.config import EngineConfig, EngineLimits, ModelConfig
from jaxserve.engine.admission import AdmittedParams
from jaxserve.engine.compiled import OnProgress
from jaxserve.engine.engine import EngineCore
from jaxserve.errors import DrainingError, EngineDeadError, JaxserveError, QueueFullError, QueueTimeoutError
from jaxserve.metrics import EngineMetrics
from jaxserve.types import BeamSearchParams, Delta, EngineStats, FinishReason, SamplingParams

logger = logging.getLogger(__name__)

ENDS_ALL: tuple[FinishReason, ...] = ("error", "abort")  # a delta with one of these is the request's last
IDLE_CHECK_S = 1.0  # idle this long, the engine examines itself: 6 ms with 100,000 blocks, nobody should wait for


_Item = Delta | JaxserveError | None


@dataclass(slots=True, eq=False)
class _Stream:
    """One caller's end of a request. Belongs to the caller's event loop; the step loop only carries it.

    Attributes:
        num_open: continuations without a finish_reason.
        items: what came and was not read; None: nothing follows.
    """

    request_id: str
    loop: asyncio.AbstractEventLoop
    num_open: int
    items: deque[_Item] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def done(self) -> bool:
        return self.num_open <= 0

    def take(self) -> Delta | None:
        """The next item; None where it only says that nothing follows.

        Raises:
            JaxserveError: the item, or the one in its delta.
        """
        item = self.items.popleft()
        if item is None or isinstance(item, JaxserveError) or item.finish_reason in ENDS_ALL:
            self.num_open = 0
        elif item.finish_reason is not None:
            self.num_open -= 1
        error = item.error if isinstance(item, Delta) else item
        if error is not None:
            raise error
        assert item is None or isinstance(item, Delta)
        return item


class AsyncEngine:
    """Serves one model to any number of asyncio callers.

    `start` compiles and begins the step loop; it blocks for seconds, so call it in a thread where an
    event loop runs. `shutdown` ends it.

    Attributes:
        model: what is served.
    """

    def __init__(self, model: ModelConfig, params: Any, config: EngineConfig | None = None) -> None:
        self.model = model
        self._params = params
        self._config = config or EngineConfig()
        self._core: EngineCore | None = None
        self._ids = itertools.count()
        self._streams: dict[str, _Stream] = {}
        self._resets: set[Future[int]] = set()
        self._mailbox: deque[Callable[[EngineCore], None]] = deque()
        self._mail = threading.Condition()
        self._stopping = self._draining = False
        self._death: EngineDeadError | None = None
        self._thread: threading.Thread | None = None
        self._stats: EngineStats | None = None

    def start(self, on_progress: OnProgress | None = None) -> None:
        """Allocates, compiles and starts the step loop. Blocks until requests can be served.

        Args:
            on_progress: called as (programs done, in all, name, seconds) from compiling threads.

        Raises:
            ConfigError: the sizes do not fit the device.
        """
        assert self._core is None, "started twice"
        self._core = EngineCore(self.model, self._params, self._config, on_progress=on_progress)
        self._params = None  # the runner holds them
        self._stats = self._core.stats()
        self._thread = threading.Thread(target=self._run, args=(self._core,), name="jaxserve-steps", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken."""
        return self._core is not None and not self._draining and self._death is None

    @property
    def limits(self) -> EngineLimits:
        return self._started().limits

    @property
    def metrics(self) -> EngineMetrics:
        return self._started().metrics

    @property
    def init_s(self) -> float:
        """Seconds that `start` took."""
        return self._started().init_s

    @property
    def kv_bytes(self) -> int:
        return self._started().runner.kv_bytes

    def stats(self) -> EngineStats:
        """A reading of the engine. Cheap; from any thread."""
        return self._started().stats()

    async def generate(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | BeamSearchParams,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Yields what the request's continuations gain, one token a delta, until each has had a finish_reason.

        An "error" or "abort" of one ends them all. A beam search yields its hypotheses at its end. Closing the
        iterator, or cancelling the task that reads it, aborts the request and frees its blocks before the next step.

        Args:
            token_ids: the prompt.
            request_id: for `abort`; must not be in use. Drawn if None.
            cache_salt: the prefix cache shows the request only what was computed under the same salt.

        Raises:
            RequestError: it can never be served. Before any delta.
            UnavailableError: not now. Before any delta.
            EngineError: the engine failed.
        """
        core = self._started()
        self._check_open()
        admitted = core.check(token_ids, params, cache_salt)
        request_id = f"gen-{next(self._ids)}" if request_id is None else request_id
        if request_id in self._streams:
            raise ValueError(f"Request id {request_id!r} is in use. Choose another, or none.")
        stream = _Stream(request_id, asyncio.get_running_loop(), params.num_sequences)
        self._streams[request_id] = stream
        try:
            if self._death is not None:  # since it was looked at: nobody would wake this stream
                raise self._death
            self._post(lambda core: self._add(core, stream, admitted, time.monotonic()))
            while not stream.done:
                await stream.wake.wait()
                stream.wake.clear()
                while stream.items and not stream.done:
                    delta = stream.take()
                    if delta is not None:
                        yield delta
        finally:
            del self._streams[request_id]
            if not stream.done:
                self.abort(request_id)

    def abort(self, request_id: str, reason: FinishReason = "abort", index: int | None = None) -> None:
        """Ends a request, or one of its continuations, early: its iterator yields a last delta with `reason`.

        Args:
            reason: "stop" where the caller found a stop string in the text.
            index: which continuation; None for all of them.
        """
        self._post(lambda core: self._abort(core, request_id, reason, index))

    async def reset_prefix_cache(self) -> int:
        """Forgets the KV of past prompts and outputs; returns how many blocks of it there were.

        Running requests keep theirs, which are no longer shown to others.

        Raises:
            EngineDeadError: the step loop has ended.
        """
        self._started()
        answer: Future[int] = Future()
        self._resets.add(answer)
        try:
            if self._death is not None:
                raise self._death
            self._post(lambda core: self._reset_prefix_cache(core, answer))
            return await asyncio.wrap_future(answer)
        finally:
            self._resets.discard(answer)

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new requests, waits for the open ones, then aborts what is left.

        Returns:
            Whether all ended by themselves within `timeout_s`.
        """
        self._draining = True
        deadline = time.monotonic() + timeout_s
        finished = await self._wait_until_empty(deadline)
        if not finished:
            for request_id in list(self._streams):
                self.abort(request_id)
            await self._wait_until_empty(time.monotonic() + 1.0)
        return finished

    async def _wait_until_empty(self, deadline: float) -> bool:
        # Streams end in many callers' tasks; a 10 ms poll at shutdown is simpler than a registry of waiters.
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return not self._streams

    def shutdown(self) -> None:
        """Ends the step loop; open requests fail with EngineDeadError. Blocks until the loop has ended."""
        with self._mail:
            self._stopping = True
            self._mail.notify()
        if self._thread is not None:
            self._thread.join()

    def _started(self) -> EngineCore:
        if self._core is None:
            raise EngineDeadError("The engine is not started. Call start() first.")
        return self._core

    def _check_open(self) -> None:
        if self._death is not None:
            raise self._death
        if self._draining:
            self._started().metrics.on_rejected("draining")
            raise DrainingError("The server is shutting down.", retry_after_s=5)

    def _post(self, message: Callable[[EngineCore], None]) -> None:
        with self._mail:
            self._mailbox.append(message)
            self._mail.notify()

    # Everything below runs in the step loop's thread.

    def _run(self, core: EngineCore) -> None:
        try:
            while self._read_mail(core):
                if core.has_work:
                    self._expire(core)
                    self._deliver(core.step())
        except Exception as error:
            logger.critical("the step loop ended", exc_info=error)
            self._die(error if isinstance(error, EngineDeadError) else EngineDeadError("The step loop failed."))
        else:
            self._die(EngineDeadError("The engine was shut down."))

    def _read_mail(self, core: EngineCore) -> bool:
        """Empties the mailbox, waiting for mail while there is no work. False: time to stop."""
        with self._mail:
            if not self._mailbox and not core.has_work and not self._stopping:
                if not self._mail.wait(IDLE_CHECK_S):
                    self._check_idle(core)
                while not self._mailbox and not self._stopping:
                    self._mail.wait()
            messages, self._mailbox = self._mailbox, deque()
        for message in messages:
            message(core)
        return not self._stopping

    def _check_idle(self, core: EngineCore) -> None:
        """The idle engine examines itself: all blocks must be back. A breach is logged, not fatal."""
        try:
            core.scheduler.check_integrity()
        except AssertionError as breach:
            logger.critical("the scheduler's tables are inconsistent", exc_info=breach)

    def _add(self, core: EngineCore, stream: _Stream, admitted: AdmittedParams, arrival_s: float) -> None:
        try:
            core.add(stream.request_id, admitted, stream, arrival_s)
        except JaxserveError as error:
            if isinstance(error, QueueFullError):
                core.metrics.on_rejected("queue_full")
            self._deliver([(stream, error)])

    def _expire(self, core: EngineCore) -> None:
        """Refuses who has waited too long for a first step: better a 503 now than an answer to nobody."""
        timeout_s = self._config.queue_timeout
        if not timeout_s or not core.scheduler.num_waiting:
            return
        for request_id in dict.fromkeys(core.waiting_since(time.monotonic() - timeout_s)):
            error = QueueTimeoutError(f"The request waited {timeout_s:g} s for its first step.", retry_after_s=5)
            stream = core.refuse(request_id, "queue_timeout")
            assert stream is not None, "it stood in the queue"
            self._deliver([(stream, error)])

    def _abort(self, core: EngineCore, request_id: str, reason: FinishReason, index: int | None) -> None:
        if index is None:
            stream: _Stream | None = core.abort(request_id, reason)
            items: list[_Item] = [Delta(finish_reason=reason), None]
        else:
            stream = core.abort_sequence(request_id, index, reason)
            items = [Delta(finish_reason=reason, index=index)]
        if stream is not None:
            self._deliver([(stream, item) for item in items])

    def _reset_prefix_cache(self, core: EngineCore, answer: Future[int]) -> None:
        num_blocks = core.reset_prefix_cache()
        if answer.set_running_or_notify_cancel():
            answer.set_result(num_blocks)

    def _deliver(self, items: Sequence[tuple[_Stream, _Item]]) -> None:
        """Hands each stream its items, with one wake-up an event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, _Item]]] = {}
        for item in items:
            by_loop.setdefault(item[0].loop, []).append(item)
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put, batch)
            except RuntimeError:  # that loop is closed: nobody is left to read
                logger.warning("dropped %d deltas of a closed event loop", len(batch))

    def _die(self, error: EngineDeadError) -> None:
        self._death = error
        self._deliver([(stream, error) for stream in list(self._streams.values())])
        for answer in list(self._resets):
            if not answer.done() and answer.set_running_or_notify_cancel():
                answer.set_exception(error)


def _put(batch: list[tuple[_Stream, _Item]]) -> None:
    for stream, item in batch:
        stream.items.append(item)
        stream.wake.set()
