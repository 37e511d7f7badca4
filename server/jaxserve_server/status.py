"""The server's own state: which phase it is in, what it serves with, and which requests are open.

Owned by the event loop's thread. Knows no sockets and no signals; `lifecycle.py` moves the phase,
`middleware.py` keeps the open requests, `routes/ops.py` reads.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from jaxserve.metrics import EngineMetrics
from jaxserve.types import EngineStats
from jaxserve_server.metrics_export import MetricsPage
from jaxserve_server.serving import AsyncEngineLike, Serving

STALL_AFTER_S = 60.0  # work exists and no step has delivered a token for this long: not healthy


class Phase(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class ManagedEngine(AsyncEngineLike, Protocol):
    """What the server's shell needs of an engine, besides what the routes need."""

    @property
    def metrics(self) -> EngineMetrics: ...

    async def refresh(self) -> None:
        """Brings `metrics` and `stats` up to date, where they are a copy of another process'."""
        ...

    def shutdown(self) -> None:
        """Stops the engine and frees the device. Blocks until done."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What loading a model gives.

    Attributes:
        max_num_queued_reqs: a waiting queue of this length is full.
    """

    serving: Serving
    engine: ManagedEngine
    max_num_queued_reqs: int


@dataclass(eq=False, slots=True)
class OpenRequest:
    """A request between admission and the end of its answer.

    Attributes:
        expired: its task was cancelled because the drain's time is over.
    """

    task: asyncio.Task[object]
    expired: bool = False


@dataclass(frozen=True, slots=True)
class Health:
    """The answer to "may requests be sent here": `reason` is "ok" or says why not."""

    reason: str
    stats: EngineStats | None

    @property
    def ok(self) -> bool:
        return self.reason == "ok"


@dataclass(slots=True)
class ServerStatus:
    """The one mutable value of the server's shell.

    Attributes:
        loaded, metrics_page: None until the model is loaded and warm.
        open_requests: those that a drain waits for.
    """

    stall_after_s: float = STALL_AFTER_S
    phase: Phase = Phase.STARTING
    loaded: Loaded | None = None
    metrics_page: MetricsPage | None = None
    open_requests: set[OpenRequest] = field(default_factory=set)
    _closed: asyncio.Event = field(default_factory=asyncio.Event)

    def publish(self, loaded: Loaded) -> None:
        """The model is loaded and warm: requests may come."""
        self.loaded = loaded
        self.metrics_page = MetricsPage(
            loaded.engine.metrics, loaded.engine.stats, model_name=loaded.serving.model_name
        )
        if self.phase is Phase.STARTING:
            self.phase = Phase.READY

    def open(self, request: OpenRequest) -> None:
        self.open_requests.add(request)

    def close(self, request: OpenRequest) -> None:
        self.open_requests.discard(request)
        self._closed.set()

    async def wait_idle(self) -> None:
        """Returns when no request is open."""
        while self.open_requests:
            self._closed.clear()
            await self._closed.wait()

    def expire_open(self) -> int:
        """Cancels every open request, so that each ends with an explicit error. Returns how many."""
        for request in self.open_requests:
            request.expired = True
            request.task.cancel()
        return len(self.open_requests)

    def health(self) -> Health:
        """Ready means warm, not draining, making progress, and with room in the queue. Idle is healthy."""
        if self.phase is Phase.DRAINING:
            return Health("draining", None)
        if self.loaded is None:
            return Health("starting", None)
        stats = self.loaded.engine.stats()
        if not self.loaded.engine.is_ready:
            return Health("engine_not_ready", stats)
        if stats.last_commit_age_s >= self.stall_after_s:
            return Health("stalled", stats)
        if stats.num_waiting >= self.loaded.max_num_queued_reqs:
            return Health("queue_full", stats)
        return Health("ok", stats)
