"""`AsyncEngine`: the one seam that HTTP, and everything later, plugs into. Token in, token out.

The step loop runs in a thread of its own (`step_loop`). Deltas go back to each caller's event loop, one wake-up
a step however many streams there are.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from typing import Any

from jaxserve.config import EngineConfig, EngineLimits, ModelConfig
from jaxserve.engine.compiled import OnProgress
from jaxserve.engine.engine import EngineCore
from jaxserve.engine.step_loop import Arrival, StepLoop
from jaxserve.engine.stream import Item, Stream
from jaxserve.errors import DrainingError, EngineDeadError
from jaxserve.metrics import EngineMetrics
from jaxserve.types import BeamSearchParams, Delta, EngineStats, FinishReason, SamplingParams

logger = logging.getLogger(__name__)


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
        self._loop: StepLoop
        self._ids = itertools.count()
        self._streams: dict[str, Stream] = {}
        self._resets: set[Future[int]] = set()
        self._draining = False
        self._death: EngineDeadError | None = None
        self._thread: threading.Thread | None = None

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
        self._loop = StepLoop(self._core, self._config, self._deliver)
        self._thread = threading.Thread(target=self._run, name="jaxserve-steps", daemon=True)
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
        self._started()
        return self._loop.stats()

    async def refresh(self) -> None:
        """Brings `metrics` and `stats` up to date: here they always are."""

    async def generate(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | BeamSearchParams,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Yields what the request's continuations gain, until each has had a finish_reason.

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
        stream = Stream(request_id, params.num_sequences)
        self._streams[request_id] = stream
        try:
            if self._death is not None:  # since it was looked at: nobody would wake this stream
                raise self._death
            self._loop.add(Arrival(request_id, stream, admitted, params.num_sequences, len(token_ids)))
            while await stream.more():
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
        self._started()
        self._loop.abort(request_id, reason, index)

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
            self._loop.reset_prefix_cache(lambda num_blocks: _settle(answer, num_blocks))
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
        if self._thread is not None:
            self._loop.stop()
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

    # Everything below runs in the step loop's thread.

    def _run(self) -> None:
        error = self._death = self._loop.run()
        self._deliver([(stream, error) for stream in list(self._streams.values())])
        for answer in list(self._resets):
            if not answer.done() and answer.set_running_or_notify_cancel():
                answer.set_exception(error)

    def _deliver(self, items: list[tuple[Any, Item]]) -> None:
        """Hands each stream its items, with one wake-up an event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Item]]] = {}
        for item in items:
            by_loop.setdefault(item[0].loop, []).append(item)
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put, batch)
            except RuntimeError:  # that loop is closed: nobody is left to read
                logger.warning("dropped %d deltas of a closed event loop", len(batch))


def _put(batch: list[tuple[Stream, Item]]) -> None:
    for stream, item in batch:
        stream.put(item)


def _settle(answer: Future[int], num_blocks: int) -> None:
    if answer.set_running_or_notify_cancel():
        answer.set_result(num_blocks)
