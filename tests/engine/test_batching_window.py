"""The batching window: a policy on a clock that nobody waits for, and its place in the loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine import resolve
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.window import BatchingWindow
from jaxserve.errors import ConfigError, QueueFullError
from jaxserve.types import SamplingParams

WINDOW_S = 0.02


@dataclass(frozen=True)
class Request:
    request_id: str
    arrival_s: float
    num_open: int = 1
    num_prompt: int = 10


def window(window_s: float = WINDOW_S) -> BatchingWindow:
    return BatchingWindow(window_s, max_rows=8, max_tokens=64)


def released(held: BatchingWindow, now: float, *, running: int = 0, waiting: int = 0) -> str:
    return "".join(r.request_id for r in held.release(now, num_running=running, num_waiting=waiting))


def test_the_oldest_waits_its_time_and_takes_the_others_along() -> None:
    held = window()
    held.hold(Request("a", 100.0))
    assert held.remaining_s(100.005) == pytest.approx(0.015)
    held.hold(Request("b", 100.015))
    assert released(held, 100.019) == ""
    assert (held.num_rows, len(held)) == (2, 2)
    assert released(held, 100.02) == "ab"
    assert (held.num_rows, len(held)) == (0, 0)
    held.hold(Request("c", 100.03))  # a window of its own
    assert released(held, 100.04) == ""
    assert held.remaining_s(200.0) == 0
    assert released(held, 100.05) == "c"


def test_full_rows_and_a_full_step_end_it() -> None:
    held = window()
    held.hold(Request("a", 0.0, num_open=3))
    assert released(held, 0.0, running=4) == ""
    assert released(held, 0.0, running=5) == "a"
    for i in range(6):
        held.hold(Request(str(i), 0.0))
    assert released(held, 0.0) == ""
    assert released(held, 0.0, running=1) == ""  # 60 tokens of 63
    held.hold(Request("6", 0.0))
    assert released(held, 0.0) == "0123456"
    held.hold(Request("long", 0.0, num_prompt=1000))
    assert released(held, 0.0) == "long", "alone it fills a step: nobody could join it"


def test_nobody_stands_back_for_those_who_wait_already() -> None:
    held = window()
    held.hold(Request("a", 0.0))
    assert released(held, 0.0, running=2, waiting=1) == "a"
    held.hold(Request("b", 0.0))
    assert released(held, 0.0, running=8) == "b", "no row is free: it queues as ever"


def test_one_is_pulled_out_and_the_others_go_on_waiting() -> None:
    held = window()
    for name, at in (("a", 0.0), ("b", 0.01), ("c", 0.015)):
        held.hold(Request(name, at, num_open=2))
    assert held.pull("a").request_id == "a"
    assert ("a" in held, "b" in held, held.num_rows) == (False, True, 4)
    assert released(held, 0.025) == "", "the oldest is another now"
    assert released(held, 0.03) == "bc"


def test_no_window_holds_nobody() -> None:
    held = window(0.0)
    held.hold(Request("a", 5.0))
    assert held.remaining_s(5.0) == 0
    assert released(held, 5.0) == "a"


@pytest.mark.parametrize("value", [-1, 10_001, float("nan")])
def test_its_bounds(value: float) -> None:
    with pytest.raises(ConfigError, match=r"batching_window_ms must be from 0 to 10000 milliseconds, got .*Try 20"):
        EngineConfig(batching_window_ms=value)


# --- in the loop ----------------------------------------------------------------------------------------------

LONG_MS = 1000.0


@pytest.fixture(scope="module")
def engine(model: ModelConfig, params: Any) -> Iterator[AsyncEngine]:
    """Four rows, a window so long that what it does cannot be chance."""
    config = EngineConfig(
        **{"max_num_seqs": 4, "max_num_batched_tokens": 12, "block_size": 4, "num_gpu_blocks_override": 41},
        **{"compilation_cache_dir": None, "max_num_queued_reqs": 2, "batching_window_ms": LONG_MS},
    )
    engine = AsyncEngine(model, params, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "token_buckets", lambda max_tokens, *_: (max_tokens,))
        engine.start()
    yield engine
    engine.shutdown()


def sampling(max_tokens: int = 5) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


async def collect(engine: AsyncEngine, prompt: list[int], max_tokens: int = 5, **kwargs: Any) -> list[int]:
    return [t async for d in engine.generate(prompt, sampling(max_tokens), **kwargs) for t in d.token_ids]


def seconds(work: Callable[[], Coroutine[Any, Any, Any]]) -> tuple[float, Any]:
    begin = time.monotonic()
    result = asyncio.run(asyncio.wait_for(work(), 60))
    return time.monotonic() - begin, result


def test_one_waits_for_the_window_and_counts_as_waiting(engine: AsyncEngine, greedy: Callable) -> None:
    async def run() -> list[int]:
        reader = asyncio.create_task(collect(engine, [5, 6]))
        await asyncio.sleep(LONG_MS / 4e3)
        assert (engine.stats().num_waiting, engine.stats().num_running) == (1, 0)
        return await reader

    spent, tokens = seconds(run)
    assert spent >= LONG_MS / 1e3
    assert tokens == greedy([5, 6], 5)


def test_as_many_as_there_are_rows_wait_for_nobody(engine: AsyncEngine) -> None:
    async def run() -> list[Any]:
        return await asyncio.gather(*(collect(engine, [5 + i]) for i in range(4)))

    spent, results = seconds(run)
    assert [len(tokens) for tokens in results] == [5] * 4
    assert spent < LONG_MS / 1e3


def test_what_runs_is_not_held_up(engine: AsyncEngine) -> None:
    async def run() -> None:
        first = asyncio.create_task(collect(engine, [5], 50))
        while not engine.stats().num_running:
            await asyncio.sleep(0.005)
        late = asyncio.create_task(collect(engine, [6]))
        assert len(await first) == 50
        assert not late.done(), "fifty tokens take less than the window"
        assert len(await late) == 5

    seconds(run)


def test_a_held_request_can_be_aborted_and_one_of_its_continuations_too(engine: AsyncEngine) -> None:
    async def run() -> None:
        before = engine.metrics.request_success["abort"]
        reader = asyncio.create_task(collect(engine, [5], request_id="a"))
        await asyncio.sleep(0.01)
        engine.abort("a")
        assert await reader == []
        assert engine.metrics.request_success["abort"] == before + 1
        two = SamplingParams(n=2, temperature=1, seed=1, max_tokens=4, ignore_eos=True)
        stream = engine.generate([5], two, request_id="b")
        pending = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.01)
        engine.abort("b", "stop", 1)
        found = [await pending, *[delta async for delta in stream]]
        assert [d.finish_reason for d in found if d.index == 1] == ["stop"]
        assert sum(len(d.token_ids) for d in found if d.index == 0) == 4
        assert engine.stats().num_waiting == 0

    spent, _ = seconds(run)
    assert spent < LONG_MS / 1e3


def test_the_queue_s_bound_counts_those_that_find_no_row(engine: AsyncEngine) -> None:
    async def run() -> list[Any]:
        return await asyncio.gather(*(collect(engine, [5 + i]) for i in range(9)), return_exceptions=True)

    _, results = seconds(run)
    assert sum(isinstance(r, list) for r in results) >= 6
    assert all(isinstance(r, QueueFullError) or len(r) == 5 for r in results)


def test_a_drain_waits_for_the_held(engine: AsyncEngine) -> None:
    """The last test here: nothing is served after it."""

    async def run() -> None:
        reader = asyncio.create_task(collect(engine, [5]))
        await asyncio.sleep(0.01)
        assert await engine.drain(30)
        assert len(await reader) == 5

    seconds(run)
