"""The seam: many asyncio callers, one step loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine import resolve
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.step_loop import StepLoop
from jaxserve.errors import (
    ContextLengthError,
    DrainingError,
    EngineDeadError,
    ParameterError,
    QueueFullError,
    QueueTimeoutError,
)
from jaxserve.types import BeamSearchParams, Delta, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=20)


@pytest.fixture
def make_engine(model: ModelConfig, params: Any) -> Iterator[Callable[..., AsyncEngine]]:
    engines: list[AsyncEngine] = []

    def make(**changes: Any) -> AsyncEngine:
        values: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 12, "block_size": 4}
        values |= {"num_gpu_blocks_override": 41, "compilation_cache_dir": None}
        engine = AsyncEngine(model, params, EngineConfig(**values | changes))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resolve, "token_buckets", lambda max_tokens, *_: (max_tokens,))
            engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.shutdown()


@pytest.fixture(scope="module")
def engine(model: ModelConfig, params: Any) -> Iterator[AsyncEngine]:
    config = EngineConfig(
        max_num_seqs=4,
        max_num_batched_tokens=12,
        block_size=4,
        num_gpu_blocks_override=41,
        compilation_cache_dir=None,
        max_num_queued_reqs=3,
    )
    engine = AsyncEngine(model, params, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "token_buckets", lambda max_tokens, *_: (max_tokens,))
        engine.start()
    yield engine
    engine.shutdown()


async def collect(engine: AsyncEngine, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return [t async for delta in engine.generate(prompt, params) for t in delta.token_ids]


async def until_idle(engine: AsyncEngine) -> None:
    deadline = time.monotonic() + 10
    while engine.stats().num_running or engine.stats().num_waiting:
        assert time.monotonic() < deadline, engine.stats()
        await asyncio.sleep(0.005)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_streams_side_by_side_equal_dense_recomputation(engine: AsyncEngine, greedy: Callable) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 150, rng.integers(1, 30)).tolist() for _ in range(7)]

    async def run() -> list[list[int]]:
        return await asyncio.gather(*(collect(engine, p) for p in prompts))

    assert asyncio.run(run()) == [greedy(p, 20) for p in prompts]


def test_callers_may_live_in_different_event_loops(engine: AsyncEngine, greedy: Callable) -> None:
    results: dict[int, list[int]] = {}
    run = lambda i: results.update({i: asyncio.run(collect(engine, [10 + i] * 5))})  # noqa: E731
    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: greedy([10 + i] * 5, 20) for i in range(3)}


def test_a_reader_that_leaves_frees_its_blocks_within_two_steps(engine: AsyncEngine) -> None:
    async def run() -> None:
        endless = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        async with aclosing(engine.generate([5, 6], endless)) as stream:
            await anext(stream)
            assert engine.stats().num_running == 1
            steps = engine.stats().num_steps
        await until_idle(engine)
        # At most the loop that ran when it left, one that had begun by the time it was told, and the step after.
        assert engine.stats().num_steps <= steps + 2 * engine.limits.max_decode_steps + 1, "it went on for nobody"

        reader = asyncio.create_task(collect(engine, [5, 6], endless))
        while not engine.stats().num_running:
            await asyncio.sleep(0.002)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await until_idle(engine)

    asyncio.run(run())


def test_abort_ends_the_stream_with_its_reason(engine: AsyncEngine) -> None:
    async def run() -> None:
        endless = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        reasons = []
        async for delta in engine.generate([5, 6], endless, request_id="mine"):
            engine.abort("mine")
            reasons.append(delta.finish_reason)
        assert reasons[-1] == "abort"
        assert set(reasons[:-1]) <= {None}
        engine.abort("nobody")
        await until_idle(engine)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("prompt", "sampling", "error", "match"),
    [
        ([], GREEDY, ParameterError, "at least one token"),
        ([150], GREEDY, ParameterError, "Token id 150 is out of the vocabulary: ids go from 0 to 149"),
        ([-1], GREEDY, ParameterError, "Token id -1"),
        ([2**40], GREEDY, ParameterError, "Token id 1099511627776"),
        ([1.5], GREEDY, ParameterError, "integer token ids"),
        ([5] * 64, SamplingParams(max_tokens=None), ContextLengthError, "64 tokens"),
        ([5] * 50, SamplingParams(max_tokens=15), ContextLengthError, "50 in the prompt, 15 in the completion"),
        ([5], SamplingParams(logit_bias={150: 1.0}), ParameterError, "'logit_bias': 150. Maximum value is 149"),
        ([5], SamplingParams(stop_token_ids=[150]), ParameterError, "'stop_token_ids': 150"),
        ([5], SamplingParams(allowed_token_ids=[150]), ParameterError, "'allowed_token_ids': 150"),
        ([5], SamplingParams(allowed_token_ids=[3], min_tokens=1), ParameterError, "bans every token"),
        ([5], SamplingParams(bad_words=["x"]), ParameterError, "bad_words_token_ids"),
        ([5], SamplingParams(bad_words_token_ids=[[7] * 17]), ParameterError, "1 to 16 tokens"),
        ([5], SamplingParams(bad_words_token_ids=[[150]]), ParameterError, "0 to 149"),
        ([5], SamplingParams(bad_words_token_ids=[[7]] * 65), ParameterError, "at most 64"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_before_any_work(
    engine: AsyncEngine,
    prompt: list,
    sampling: SamplingParams,
    error: type[Exception],
    match: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handed_on = []  # not the steps' number: the step ahead of the test before may still be counted
    monkeypatch.setattr(StepLoop, "add", lambda _, arrival: handed_on.append(arrival))
    with pytest.raises(error, match=match):
        asyncio.run(asyncio.wait_for(collect(engine, prompt, sampling), 10))
    assert not handed_on


def test_the_queue_is_bounded_and_the_refused_are_counted(engine: AsyncEngine) -> None:
    async def run() -> list[Any]:
        endless = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        tasks = [collect(engine, [20 + i], endless) for i in range(30)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    before = engine.metrics.rejections["queue_full"]
    results = asyncio.run(run())
    refused = [r for r in results if isinstance(r, QueueFullError)]
    served = [r for r in results if isinstance(r, list)]
    assert len(refused) + len(served) == 30
    assert refused
    assert all(len(r) == 30 for r in served)
    assert engine.metrics.rejections["queue_full"] == before + len(refused)


async def collect_all(engine: AsyncEngine, prompt: list[int], params: Any, **kwargs: Any) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    async for delta in engine.generate(prompt, params, **kwargs):
        found.setdefault(delta.index, []).extend(delta.token_ids)
    return found


def test_continuations_of_many_requests_are_what_each_gives_alone(engine: AsyncEngine) -> None:
    """More sequences than rows, so that siblings wait for each other's rows."""
    prompts = [[5, 6, 7, 8, 9], [20] * 13, [30, 31]]
    params = [SamplingParams(n=n, temperature=2.0, seed=n, max_tokens=9, ignore_eos=True) for n in (2, 3, 5)]

    async def run() -> tuple[list[Any], list[Any]]:
        alone = [await collect_all(engine, p, s) for p, s in zip(prompts, params, strict=True)]
        together = await asyncio.gather(*(collect_all(engine, p, s) for p, s in zip(prompts, params, strict=True)))
        await until_idle(engine)
        return alone, together

    alone, together = asyncio.run(run())
    assert together == alone
    for found, sampling in zip(alone, params, strict=True):
        assert sorted(found) == list(range(sampling.n))
        assert {len(tokens) for tokens in found.values()} == {9}
        assert len({tuple(tokens) for tokens in found.values()}) > 1


def test_leaving_a_request_of_several_continuations_frees_them_all(engine: AsyncEngine) -> None:
    async def run() -> None:
        endless = SamplingParams(n=3, temperature=1.0, max_tokens=None, ignore_eos=True)
        async with aclosing(engine.generate([5, 6], endless)) as stream:
            while engine.stats().num_running < 3:
                await anext(stream)
        await until_idle(engine)

    asyncio.run(run())
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)


def test_one_continuation_is_stopped_and_the_others_go_on(engine: AsyncEngine) -> None:
    async def run() -> dict[int, str]:
        reasons: dict[int, str] = {}
        sampling = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=40, ignore_eos=True)
        async for delta in engine.generate([5, 6], sampling, request_id="r"):
            num_tokens[delta.index] += len(delta.token_ids)
            if delta.finish_reason is not None:
                reasons[delta.index] = delta.finish_reason
            if delta.index == 1 and num_tokens[1] >= 3 and not stopped:
                stopped.append(True)
                engine.abort("r", "stop", 1)
        await until_idle(engine)
        return reasons

    num_tokens, stopped = [0, 0, 0], list[bool]()
    assert asyncio.run(run()) == {0: "length", 1: "stop", 2: "length"}
    assert num_tokens[0] == num_tokens[2] == 40
    assert num_tokens[1] < 20
    assert engine.stats().num_running == 0


def test_a_prefix_is_found_until_the_cache_is_reset(engine: AsyncEngine) -> None:
    prompt = [40 + i for i in range(17)]

    async def cached(**kwargs: Any) -> int:
        return max([d.num_cached_tokens async for d in engine.generate(prompt, GREEDY, **kwargs)])

    async def run() -> list[int]:
        await engine.reset_prefix_cache()
        counts = [await cached(), await cached(), await cached(cache_salt="a"), await cached(cache_salt="a")]
        assert await engine.reset_prefix_cache() >= 8  # two prompts of four whole blocks
        assert await engine.reset_prefix_cache() == 0
        return [*counts, await cached()]

    assert asyncio.run(run()) == [0, 16, 0, 16, 0]


def test_a_beam_search_gives_its_hypotheses_at_its_end(engine: AsyncEngine) -> None:
    async def run() -> list[Delta]:
        return [d async for d in engine.generate([5, 6], BeamSearchParams(beam_width=3, max_tokens=6))]

    deltas = asyncio.run(run())
    assert [d.index for d in deltas] == [0, 1, 2]
    scores = [d.score for d in deltas if d.score is not None]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 3
    assert all(d.finish_reason in ("stop", "length") for d in deltas)
    with pytest.raises(ParameterError, match="'beam_width' must be at most max_num_seqs=4"):
        asyncio.run(collect(engine, [5], BeamSearchParams(beam_width=5)))  # type: ignore[arg-type]


def test_who_waits_too_long_is_refused_once_however_many_continuations_it_has(
    make_engine: Callable[..., AsyncEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_num_seqs=1, queue_timeout=0.2)
    assert engine._core is not None
    step = engine._core.step
    monkeypatch.setattr(engine._core, "step", lambda: (time.sleep(0.02), step())[1])

    async def run() -> list[Any]:
        long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        several = SamplingParams(n=3, temperature=1, max_tokens=4)
        return await asyncio.gather(collect(engine, [5], long), collect(engine, [6], several), return_exceptions=True)

    first, other = asyncio.run(run())
    assert len(first) == 40
    assert type(other) is QueueTimeoutError
    assert engine.metrics.rejections["queue_timeout"] == 1
    assert engine.metrics.request_success["abort"] == 0


def test_who_waits_too_long_for_a_first_step_is_refused(
    make_engine: Callable[..., AsyncEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_num_seqs=1, queue_timeout=0.3)
    assert engine._core is not None
    step = engine._core.step
    monkeypatch.setattr(engine._core, "step", lambda: (time.sleep(0.02), step())[1])

    async def run() -> list[Any]:
        long = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)  # about a second
        return await asyncio.gather(*(collect(engine, [5 + i], long) for i in range(3)), return_exceptions=True)

    first, *others = asyncio.run(run())
    assert len(first) == 50, "the one that runs is not late, however long it takes"
    assert [type(e) for e in others] == [QueueTimeoutError] * 2
    assert engine.metrics.rejections["queue_timeout"] == 2
    assert engine.metrics.request_success == {"stop": 0, "length": 1, "abort": 0, "error": 0}
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_an_id_in_use_is_refused_and_harms_nobody(engine: AsyncEngine) -> None:
    async def run() -> None:
        async with aclosing(engine.generate([5], GREEDY, request_id="x")) as first:
            await anext(first)
            with pytest.raises(ValueError, match="'x' is in use"):
                await anext(engine.generate([6], GREEDY, request_id="x"))
            assert [d async for d in first]
        assert await collect(engine, [5])

    asyncio.run(run())


def test_drain_lets_open_requests_end_and_refuses_new_ones(make_engine: Callable[..., AsyncEngine]) -> None:
    engine = make_engine()

    async def run() -> None:
        open_ = asyncio.create_task(collect(engine, [5], SamplingParams(max_tokens=30, ignore_eos=True)))
        while not engine.stats().num_running:
            await asyncio.sleep(0.002)
        drained = asyncio.create_task(engine.drain(30))
        await asyncio.sleep(0)
        assert not engine.is_ready
        with pytest.raises(DrainingError) as refused:
            await collect(engine, [6])
        assert refused.value.retry_after_s >= 1
        assert await drained
        assert len(await open_) == 30

    asyncio.run(run())


def test_drain_aborts_what_outlasts_it(
    make_engine: Callable[..., AsyncEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    assert engine._core is not None
    step = engine._core.step
    monkeypatch.setattr(engine._core, "step", lambda: (time.sleep(0.02), step())[1])

    async def run() -> None:
        async def reasons() -> list[Any]:
            endless = SamplingParams(max_tokens=None, ignore_eos=True)
            return [d.finish_reason async for d in engine.generate([5], endless)]

        open_ = asyncio.create_task(reasons())
        while not engine.stats().num_running:
            await asyncio.sleep(0.002)
        assert not await engine.drain(0.1)
        assert (await open_)[-1] == "abort"

    asyncio.run(run())


def test_the_death_of_the_loop_reaches_every_caller(
    make_engine: Callable[..., AsyncEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    assert engine._core is not None

    def fail(*_: Any) -> Any:
        raise RuntimeError("INTERNAL: injected")

    monkeypatch.setattr(engine._core.runner, "run", fail)

    async def run() -> list[Any]:
        return await asyncio.gather(*(collect(engine, [5 + i]) for i in range(3)), return_exceptions=True)

    assert [type(e) for e in asyncio.run(run())] == [EngineDeadError] * 3
    assert not engine.is_ready
    with pytest.raises(EngineDeadError):
        asyncio.run(collect(engine, [5]))


def test_nothing_leaks_over_a_thousand_requests_with_random_aborts(engine: AsyncEngine) -> None:
    rng = np.random.default_rng(1)
    params = SamplingParams(temperature=1.0, max_tokens=6, seed=1)

    async def one(prompt: list[int], leave_after: int) -> None:
        async with aclosing(engine.generate(prompt, params)) as stream:
            async for _ in stream:
                leave_after -= 1
                if leave_after < 0:
                    return

    async def run() -> None:
        for _ in range(150):
            await asyncio.gather(
                *(one(rng.integers(4, 150, rng.integers(1, 9)).tolist(), int(rng.integers(0, 9))) for _ in range(7))
            )
        await until_idle(engine)
        assert len(asyncio.all_tasks()) == 1

    threads = threading.active_count()
    asyncio.run(run())
    assert engine._streams == {}
    assert threading.active_count() <= threads + 1
