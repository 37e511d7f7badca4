"""`StepLoop`: the one thread that touches `EngineCore`, whoever sits in front of it.

Owns the mailbox by which requests and aborts reach the core between steps, the batching window, and what the
clock decides (the queue's timeout). Knows neither event loops nor sockets: what each owner gained goes to
`deliver`, in one call a step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from jaxserve.config import EngineConfig
from jaxserve.engine.admission import AdmittedParams
from jaxserve.engine.engine import EngineCore
from jaxserve.engine.stream import ENDS_ALL, Item
from jaxserve.engine.window import BatchingWindow
from jaxserve.errors import EngineDeadError, EngineError, JaxserveError, QueueFullError, QueueTimeoutError
from jaxserve.types import Delta, EngineStats, FinishReason

logger = logging.getLogger(__name__)

IDLE_CHECK_S = 1.0  # idle this long, the engine examines itself: 6 ms with 100,000 blocks, nobody should wait for

Deliver = Callable[[list[tuple[Any, Item]]], None]


@dataclass(slots=True, eq=False)
class Arrival:
    """A checked request from its arrival to its end.

    Attributes:
        owner: whoever asked; carried, never read.
        num_open: continuations without a finish_reason.
        arrival_s: of `time.monotonic`.
    """

    request_id: str
    owner: Any
    admitted: AdmittedParams
    num_open: int
    num_prompt: int
    arrival_s: float = field(default_factory=time.monotonic)


class StepLoop:
    """Steps while there is work, reads its mail between steps, waits for mail while there is none.

    Args:
        deliver: called in the loop's thread with what each owner gained, in order; after each step, be it
            nothing. It must not block.
    """

    def __init__(self, core: EngineCore, config: EngineConfig, deliver: Deliver) -> None:
        self._core, self._deliver = core, deliver
        self._queue_timeout = config.queue_timeout
        limits = core.limits
        self._window = BatchingWindow(
            config.batching_window_ms / 1e3, max_rows=limits.max_num_seqs, max_tokens=limits.max_num_batched_tokens
        )
        self._open: dict[str, Arrival] = {}  # those that the core has
        self._mailbox: deque[Callable[[], None]] = deque()
        self._mail = threading.Condition()
        self._stopping = False

    # From any thread.

    def add(self, arrival: Arrival) -> None:
        """Puts a checked request in line; its id must not be in use. What becomes of it is delivered."""
        self._post(lambda: self._window.hold(arrival))

    def abort(self, request_id: str, reason: FinishReason = "abort", index: int | None = None) -> None:
        """Ends a request, or one of its continuations; unless it has ended already, a delta with `reason` says so."""
        self._post(lambda: self._abort(request_id, reason, index))

    def reset_prefix_cache(self, answer: Callable[[int], None]) -> None:
        """Forgets the KV of past requests; `answer` gets the number of blocks, in the loop's thread."""
        self._post(lambda: answer(self._core.reset_prefix_cache()))

    def stop(self) -> None:
        with self._mail:
            self._stopping = True
            self._mail.notify()

    def stats(self) -> EngineStats:
        """The core's, with those that the window holds back among the waiting."""
        stats, num_held = self._core.stats(), self._window.num_rows
        return replace(stats, num_waiting=stats.num_waiting + num_held) if num_held else stats

    def _post(self, message: Callable[[], None]) -> None:
        with self._mail:
            self._mailbox.append(message)
            self._mail.notify()

    # Everything below runs in the loop's thread.

    def run(self) -> EngineDeadError:
        """Serves until `stop`, or until the core fails; returns why it ended."""
        try:
            while True:
                self._core.wait_for_loop()
                if not self._read_mail():
                    break
                self._release()
                if self._core.has_work:
                    self._expire()
                    self._give(self._core.step())
        except Exception as error:
            logger.critical("the step loop ended", exc_info=error)
            return error if isinstance(error, EngineDeadError) else EngineDeadError("The step loop failed.")
        return EngineDeadError("The engine was shut down.")

    def _read_mail(self) -> bool:
        """Empties the mailbox, waiting for mail while there is nothing to do. False: time to stop."""
        with self._mail:
            if not self._mailbox and not self._core.has_work and not self._stopping:
                self._rest()
            messages, self._mailbox = self._mailbox, deque()
        for message in messages:
            message()
        return not self._stopping

    def _rest(self) -> None:
        """Waits for mail, or for the end of the window."""
        if len(self._window):
            self._mail.wait(self._window.remaining_s(time.monotonic()))
            return
        if not self._mail.wait(IDLE_CHECK_S):
            self._check_idle()
        while not self._mailbox and not self._stopping:
            self._mail.wait()

    def _check_idle(self) -> None:
        """The idle engine examines itself: all blocks must be back. A breach is logged, not fatal."""
        try:
            self._core.scheduler.check_integrity()
        except AssertionError as breach:
            logger.critical("the scheduler's tables are inconsistent", exc_info=breach)

    def _release(self) -> None:
        if not len(self._window):
            return
        scheduler = self._core.scheduler
        now, running, waiting = time.monotonic(), scheduler.num_running, scheduler.num_waiting
        for arrival in self._window.release(now, num_running=running, num_waiting=waiting):
            self._add(arrival)

    def _add(self, arrival: Arrival) -> None:
        try:
            self._core.add(arrival.request_id, arrival.admitted, arrival, arrival.arrival_s)
        except JaxserveError as error:
            if isinstance(error, QueueFullError):
                self._core.metrics.on_rejected("queue_full")
            self._deliver([(arrival.owner, error)])
        else:
            self._open[arrival.request_id] = arrival

    def _expire(self) -> None:
        """Refuses who has waited too long for a first step: better a 503 now than an answer to nobody."""
        if not self._queue_timeout or not self._core.scheduler.num_waiting:
            return
        for request_id in dict.fromkeys(self._core.waiting_since(time.monotonic() - self._queue_timeout)):
            waited = f"The request waited {self._queue_timeout:g} s for its first step."
            arrival = self._core.refuse(request_id, "queue_timeout")
            assert arrival is not None, "it stood in the queue"
            del self._open[request_id]
            self._deliver([(arrival.owner, QueueTimeoutError(waited, retry_after_s=5))])

    def _give(self, deltas: list[tuple[Arrival, Delta]]) -> None:
        """Hands over what a step gave, and says of whom the core has let go without a word."""
        items: list[tuple[Any, Item]] = []
        for arrival, delta in deltas:
            items.append((arrival.owner, delta))
            if delta.finish_reason is not None:
                self._note_end(arrival, delta)
        if len(self._open) > len(self._core.open_requests):  # a fault; else their readers would wait for ever
            for request_id in self._open.keys() - self._core.open_requests:
                arrival = self._open.pop(request_id)
                logger.error("request %s ended with %d of its answers open", request_id, arrival.num_open)
                items.append((arrival.owner, EngineError("The engine dropped the request.")))
        self._deliver(items)

    def _note_end(self, arrival: Arrival, delta: Delta) -> None:
        arrival.num_open = 0 if delta.finish_reason in ENDS_ALL else arrival.num_open - 1
        if not arrival.num_open:
            self._open.pop(arrival.request_id, None)

    def _abort(self, request_id: str, reason: FinishReason, index: int | None) -> None:
        if request_id in self._window:
            self._add(self._window.pull(request_id))  # the core counts how it ended
        delta = Delta(finish_reason=reason, index=index or 0)
        if index is None:
            arrival: Arrival | None = self._core.abort(request_id, reason)
            if arrival is not None:
                self._open.pop(request_id, None)
                self._deliver([(arrival.owner, delta), (arrival.owner, None)])
        else:
            arrival = self._core.abort_sequence(request_id, index, reason)
            if arrival is not None:
                self._note_end(arrival, delta)
                self._deliver([(arrival.owner, delta)])
