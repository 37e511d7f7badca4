"""The demo model in a process of its own, through the seam: one start for all tests here."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import ContextLengthError, EngineDeadError, KVBudgetError, ParameterError, QueueFullError
from jaxserve.types import BeamSearchParams, Delta, SamplingParams
from jaxserve_server import wire
from jaxserve_server.engine_process import RemoteLaunch
from jaxserve_server.remote_engine import RemoteEngine

PROMPT = list(range(300, 340))
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
CONFIG = EngineConfig(
    **{"max_num_seqs": 4, "max_num_batched_tokens": 16, "swap_space": 0.0, "compilation_cache_dir": None},
    **{"num_gpu_blocks_override": 41, "max_num_queued_reqs": 3},
)

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[RemoteLaunch, Run]]:
    """The launched engine, and what runs a coroutine in its event loop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    launch = RemoteLaunch(wire.Start("demo", "auto", None, CONFIG, "info"), loop)
    try:
        assert launch.read_model().config.vocab_size > 340
        ready = launch.finish()
        assert (ready.limits.max_num_seqs, ready.limits.num_blocks) == (4, 41)
        assert ready.system_fingerprint.startswith("jaxserve-")
        yield launch, lambda work: asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, 120), loop).result()
    finally:
        launch._engine.shutdown()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
    assert launch._process.process.poll() == 0


@pytest.fixture
def engine(served: tuple[RemoteLaunch, Run]) -> RemoteEngine:
    return served[0]._engine


@pytest.fixture
def run(served: tuple[RemoteLaunch, Run]) -> Run:
    return served[1]


async def deltas(engine: RemoteEngine, params: Any, prompt: list[int] = PROMPT, **kwargs: Any) -> list[Delta]:
    return [delta async for delta in engine.generate(prompt, params, **kwargs)]


def tokens(found: list[Delta], index: int = 0) -> list[int]:
    return [token for delta in found if delta.index == index for token in delta.token_ids]


async def until_idle(engine: RemoteEngine) -> None:
    while True:
        await engine.refresh()
        if not engine.stats().num_running + engine.stats().num_waiting:
            break
        await asyncio.sleep(0.01)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks == 40


def test_tokens_logprobs_and_cached_tokens_cross(engine: RemoteEngine, run: Run) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2, prompt_logprobs=1)

    async def both() -> tuple[list[Delta], list[Delta], list[Delta]]:
        await engine.reset_prefix_cache()
        return await deltas(engine, GREEDY), await deltas(engine, params), await deltas(engine, GREEDY)

    cold, scored, warm = run(both())
    assert tokens(cold) == tokens(scored) == tokens(warm)
    assert len(tokens(cold)) == 12
    assert [sum(d.num_cached_tokens for d in found) for found in (cold, warm)] == [0, 32]
    entries = [entry for delta in scored for entry in delta.logprobs or ()]
    assert [entry.token_id for entry in entries] == tokens(scored)
    assert all(entry.top[0] == (entry.token_id, entry.logprob) and len(entry.top) == 2 for entry in entries)
    prompt = scored[0].prompt_logprobs
    assert prompt is not None
    assert prompt[0] is None
    assert [entry.token_id for entry in prompt[1:] if entry] == PROMPT[1:]
    assert scored[-1].cumulative_logprob == pytest.approx(sum(entry.logprob for entry in entries))
    assert [d.finish_reason for d in scored][-1] == "length"


def test_continuations_and_beams(engine: RemoteEngine, run: Run) -> None:
    three = SamplingParams(n=3, temperature=2.0, seed=5, max_tokens=9, ignore_eos=True)
    found, again = run(deltas(engine, three)), run(deltas(engine, three))
    for index in range(3):
        assert len(tokens(found, index)) == 9
        assert tokens(found, index) == tokens(again, index)
    assert len({tuple(tokens(found, index)) for index in range(3)}) == 3
    beams = run(deltas(engine, BeamSearchParams(beam_width=3, max_tokens=6)))
    assert [beam.index for beam in beams] == [0, 1, 2]
    scores = [beam.score for beam in beams if beam.score is not None]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 3


@pytest.mark.parametrize(
    ("prompt", "params", "error", "match"),
    [
        ([], GREEDY, ParameterError, "at least one token"),
        ([2**40], GREEDY, ParameterError, "Token id 1099511627776 is out of the vocabulary"),
        ([5] * 2000, GREEDY, ContextLengthError, "you requested 2000"),
        ([5], SamplingParams(max_tokens=1024), ContextLengthError, "1 in the prompt, 1024 in the completion"),
        ([5] * 100, BeamSearchParams(beam_width=4, max_tokens=500), KVBudgetError, "blocks"),
        ([5], BeamSearchParams(beam_width=5), ParameterError, "at most max_num_seqs=4"),
        ([5], SamplingParams(logit_bias={10**6: 1.0}), ParameterError, "Invalid key in 'logit_bias': 1000000"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_as_in_one_process(
    engine: RemoteEngine, run: Run, prompt: list[int], params: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match) as refused:
        run(deltas(engine, params, prompt))
    assert type(refused.value) is error
    if error is ContextLengthError:
        assert refused.value.max_model_len == 640  # type: ignore[attr-defined]


def test_the_queue_s_bound_holds(engine: RemoteEngine, run: Run) -> None:
    async def burst() -> list[Any]:
        asked = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        return await asyncio.gather(*(deltas(engine, asked, [5, 6 + i]) for i in range(20)), return_exceptions=True)

    results = run(burst())
    refused = [r for r in results if isinstance(r, QueueFullError)]
    assert refused
    assert all(len(tokens(r)) == 30 for r in results if not isinstance(r, QueueFullError))
    run(until_idle(engine))
    assert engine.metrics.rejections["queue_full"] == len(refused)


def test_leaving_and_stopping_free_what_was_held(engine: RemoteEngine, run: Run) -> None:
    async def leave() -> list[Any]:
        async with aclosing(engine.generate([5], ENDLESS)) as stream:
            await anext(stream)
            assert engine.stats().num_running == 1
        await until_idle(engine)
        reasons: dict[int, Any] = {}
        three = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=200, ignore_eos=True)
        async for delta in engine.generate([5, 6], three, request_id="r"):
            if delta.finish_reason is not None:
                reasons[delta.index] = delta.finish_reason
            elif delta.index == 1 and not reasons:
                engine.abort("r", "stop", 1)
            if 1 in reasons and delta.index == 2:  # the others go on until they are told
                engine.abort("r")
        await until_idle(engine)
        return [reasons[1], *(reason for index, reason in reasons.items() if index != 1)]

    assert run(leave()) == ["stop", "abort"]


def test_the_engine_s_numbers_are_the_server_s(engine: RemoteEngine, run: Run) -> None:
    async def count() -> tuple[int, int]:
        await engine.refresh()
        before = engine.metrics.generation_tokens, engine.metrics.ttft.read()
        await deltas(engine, GREEDY)
        await engine.refresh()
        after = engine.metrics.generation_tokens, engine.metrics.ttft.read()
        return after[0] - before[0], sum(after[1].counts) - sum(before[1].counts)

    assert run(count()) == (12, 1)
    assert engine.metrics.compile_s
    assert engine.metrics.cache_info["num_gpu_blocks"] == "40"
    assert engine.stats().num_compilations_after_ready == 0


def test_signals_leave_it_serving(served: tuple[RemoteLaunch, Run]) -> None:
    launch, run = served
    launch._process.process.send_signal(signal.SIGINT)
    launch._process.process.send_signal(signal.SIGTERM)
    assert len(tokens(run(deltas(launch._engine, GREEDY)))) == 12


def test_shutdown_fails_what_is_open_and_ends_the_process(served: tuple[RemoteLaunch, Run]) -> None:
    """The last test here: nothing is served after it."""
    launch, run = served
    engine = launch._engine

    async def stop() -> list[Any]:
        open_ = asyncio.create_task(deltas(engine, ENDLESS))
        while not engine.stats().num_running:
            await asyncio.sleep(0.002)
        await asyncio.to_thread(engine.shutdown)
        return await asyncio.gather(open_, deltas(engine, GREEDY), return_exceptions=True)

    results = run(stop())
    assert [(type(e), str(e)) for e in results] == [(EngineDeadError, "The engine was shut down.")] * 2
    assert launch._process.process.poll() == 0
