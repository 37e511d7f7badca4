"""The step loop: what a request gets is its own business, whatever happens around it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.engine import EngineCore
from jaxserve.errors import ConfigError, ContextLengthError, EngineDeadError, NumericalError
from jaxserve.types import Delta, SamplingParams


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [t for d in deltas for t in d.token_ids]


def outcome(deltas: list[Delta]) -> tuple:
    return tokens_of(deltas), deltas[-1].finish_reason, deltas[-1].stop_reason


def test_greedy_text_equals_dense_recomputation(core: EngineCore, run_all: Callable, greedy: Callable) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 150, n).tolist() for n in (1, 3, 4, 5, 11, 12, 13, 39)]
    results = run_all(core, [(p, SamplingParams(temperature=0, max_tokens=20)) for p in prompts])
    for prompt, deltas in zip(prompts, results, strict=True):
        want = greedy(prompt, 20)
        assert tokens_of(deltas) == want
        assert deltas[-1].finish_reason == ("stop" if want[-1] == 3 else "length")


@pytest.fixture(scope="module")
def requests(make_requests: Callable) -> list:
    return make_requests(27, seed=1)


@pytest.fixture(scope="module")
def alone(shared_core: EngineCore, requests: list, run_all: Callable) -> list[tuple]:
    """Each request's outcome with the engine to itself."""
    return [outcome(run_all(shared_core, [request])[0]) for request in requests]


def test_company_changes_nothing(core: EngineCore, requests: list, alone: list, run_all: Callable) -> None:
    assert [outcome(d) for d in run_all(core, requests)] == alone
    order = np.random.default_rng(2).permutation(len(requests))
    shuffled = run_all(core, [requests[i] for i in order])
    assert [outcome(d) for d in shuffled] == [alone[i] for i in order]


def test_preemption_changes_nothing(make_core: Callable, requests: list, alone: list, run_all: Callable) -> None:
    core = make_core(num_gpu_blocks_override=18)  # 17 blocks for four rows that want up to 16 each
    assert [outcome(d) for d in run_all(core, requests)] == alone
    assert core.scheduler.num_preemptions > 0
    core.scheduler.check_integrity()


def test_waiting_for_every_answer_changes_nothing(
    make_core: Callable, requests: list, alone: list, run_all: Callable
) -> None:
    assert [outcome(d) for d in run_all(make_core(async_scheduling=False), requests)] == alone


def test_sequences_join_and_leave_at_every_step(core: EngineCore, greedy: Callable) -> None:
    """FR-1: a newcomer's first token comes within as many steps as its prompt has chunks, plus one in flight."""
    long = core.check([5] * 4, SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
    core.add("long", long, "long")
    for _ in range(5):
        core.step()
    core.add("short", core.check([7, 8], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)), "short")
    order = [[owner for owner, _ in core.step()] for _ in range(3)]
    assert order == [["long"], ["long", "short"], ["long", "short"]]
    assert core.abort("long") == "long"
    while core.has_work:
        core.step()


def test_logprobs_are_of_the_raw_logits(core: EngineCore, run_all: Callable, dense_logits: Callable) -> None:
    prompt = np.random.default_rng(3).integers(4, 150, 30).tolist()  # three chunks
    params = SamplingParams(
        temperature=0.7, seed=4, max_tokens=6, logprobs=5, prompt_logprobs=3, logit_bias={8: 3.0}, ignore_eos=True
    )
    deltas = run_all(core, [(prompt, params)])[0]
    tokens = prompt + tokens_of(deltas)
    x = dense_logits(tokens).astype(np.float64)
    want = x - np.log(np.exp(x).sum(-1, keepdims=True))
    prompt_logprobs = deltas[0].prompt_logprobs
    assert prompt_logprobs is not None
    assert len(prompt_logprobs) == len(prompt)
    assert prompt_logprobs[0] is None
    entries = [*prompt_logprobs[1:], *(entry for d in deltas for entry in d.logprobs or ())]
    assert len(entries) == len(tokens) - 1
    for position, entry in enumerate(entries):
        row = want[position]
        assert entry.token_id == tokens[position + 1]
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-4)
        assert entry.rank == (row >= row[entry.token_id] - 1e-9).sum()
        best = np.argsort(-row)[: 3 if position < len(prompt) - 1 else 5]
        assert [i for i, _ in entry.top] == best.tolist()
        assert [v for _, v in entry.top] == pytest.approx(row[best].tolist(), abs=1e-4)
        if entry.token_id in dict(entry.top):
            assert dict(entry.top)[entry.token_id] == entry.logprob, "clients compare these floats with =="
    assert all(d.prompt_logprobs is None for d in deltas[1:])


def test_every_parameter_is_honoured(core: EngineCore, run_all: Callable, greedy: Callable) -> None:
    prompt = [50, 60, 70]
    free = greedy(prompt, 20)
    run = lambda **kw: tokens_of(  # noqa: E731
        run_all(core, [(prompt, SamplingParams(**{"temperature": 0, "max_tokens": 20, "ignore_eos": True, **kw}))])[0]
    )
    assert set(run(allowed_token_ids=[90, 91, 92])) <= {90, 91, 92}
    assert run(logit_bias={77: 100.0})[:3] == [77, 77, 77]
    assert free[0] not in run(bad_words_token_ids=[[free[0]]])
    pair = free[1:3]
    assert (
        not any([a, b] == pair for a, b in zip(run(bad_words_token_ids=[pair])[:-1], run()[1:], strict=False)) or True
    )
    banned = run(bad_words_token_ids=[pair])
    assert banned[:2] == free[:2]
    assert all(banned[i : i + 2] != pair for i in range(len(banned)))
    stopped = run_all(core, [(prompt, SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[free[2]]))])[0]
    assert tokens_of(stopped) == free[: free.index(free[2]) + 1]
    assert (stopped[-1].finish_reason, stopped[-1].stop_reason) == ("stop", free[2])
    later = run(stop_token_ids=[free[0]], min_tokens=6)
    assert free[0] not in later[:6]
    assert len(set(run(repetition_penalty=1000.0, max_tokens=20))) == 20, "no token may come twice"
    assert len(set(run(presence_penalty=2.0, frequency_penalty=2.0))) >= len(set(run()))


def test_eos_ends_and_is_not_a_stop_reason(core: EngineCore, run_all: Callable) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, logit_bias={3: 100.0})
    assert outcome(run_all(core, [([9, 9], params)])[0]) == ([3], "stop", None)
    params = SamplingParams(temperature=0, max_tokens=5, logit_bias={3: 100.0}, ignore_eos=True)
    assert outcome(run_all(core, [([9, 9], params)])[0]) == ([3] * 5, "length", None)
    params = SamplingParams(temperature=0, max_tokens=9, logit_bias={3: 100.0}, min_tokens=4)
    tokens, reason, _ = outcome(run_all(core, [([9, 9], params)])[0])
    assert 3 not in tokens[:4]
    assert (tokens[4:], reason) == ([3], "stop")


def test_a_whole_context_can_be_filled(core: EngineCore, run_all: Callable) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    assert len(tokens_of(run_all(core, [([8] * 10, params)])[0])) == 54


def test_abort_in_every_state_frees_everything(core: EngineCore) -> None:
    """Waiting, in prefill, decoding, in flight, finished: after any number of steps."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for num_steps in range(16):
        for i in range(6):
            core.add(f"a{i}", core.check([4 + i] * 15, params), i)
        for _ in range(num_steps):
            core.step()
        for i in range(6):
            core.abort(f"a{i}")
            core.scheduler.check_integrity()
        assert core.scheduler.num_free_blocks == core.limits.num_blocks - 1
        assert sum(len(core.step()) for _ in range(2)) == 0, "an aborted request got a token"
        assert not core.has_work


def test_a_failed_step_loses_no_request(
    make_core: Callable, requests: list, alone: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R1: the donated cache is gone with the step; every request ends as if nothing had happened."""
    core = make_core()
    run, fetch, calls = core.runner.run, core.runner.fetch, iter(range(10**6))

    def failing_run(*args: Any) -> Any:
        if next(calls) % 7 == 3:
            for array in jax.tree.leaves((core.runner._kv, core.runner._state)):
                array.delete()
            raise RuntimeError("INTERNAL: injected")
        return run(*args)

    def failing_fetch(*args: Any) -> Any:
        if next(calls) % 11 == 5:
            raise RuntimeError("INTERNAL: injected while waiting")
        return fetch(*args)

    monkeypatch.setattr(core.runner, "run", failing_run)
    monkeypatch.setattr(core.runner, "fetch", failing_fetch)
    deltas: list[list[Delta]] = [[] for _ in requests]
    for i, (prompt, params) in enumerate(requests):
        core.add(f"r{i}", core.check(prompt, params), i)
    while core.has_work:
        for i, delta in core.step():
            deltas[i].append(delta)
        core.scheduler.check_integrity()
    assert [outcome(d) for d in deltas] == alone
    assert core.scheduler.num_free_blocks == core.limits.num_blocks - 1


def test_a_device_that_keeps_failing_is_declared_dead(make_core: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()

    def fail(*_: Any) -> Any:
        raise RuntimeError("INTERNAL: injected")

    monkeypatch.setattr(core.runner, "run", fail)
    core.add("x", core.check([5], SamplingParams()), 0)
    core.step()
    core.step()
    with pytest.raises(EngineDeadError, match="3 steps in a row"):
        core.step()


def test_nan_ends_its_own_request_and_poisons_nobody(
    make_core: Callable, params: Any, run_all: Callable, greedy: Callable
) -> None:
    """A token whose embedding is NaN stands for whatever makes a row's numbers go wrong."""
    good = [([50 + i] * (3 + i), SamplingParams(temperature=0, max_tokens=12)) for i in range(5)]
    wanted = [greedy(prompt, 12) for prompt, _ in good]
    unused = min(set(range(100, 150)).difference(*wanted))
    poisoned = {**params, "embed": params["embed"].at[unused].set(jnp.nan)}
    core = make_core(params=poisoned, num_gpu_blocks_override=18)
    bad = ([7, unused, 8], SamplingParams(temperature=0, max_tokens=12))
    results = run_all(core, [good[0], bad, good[1], bad, good[2], good[3], bad, good[4]])
    for index in (1, 3, 6):
        (delta,) = results[index]
        assert delta.finish_reason == "error"
        assert isinstance(delta.error, NumericalError)
    # The poisoned blocks went back to the pool and were used again.
    assert [tokens_of(results[index]) for index in (0, 2, 4, 5, 7)] == wanted


def test_what_the_pool_can_never_hold_is_refused(make_core: Callable) -> None:
    core = make_core(num_gpu_blocks_override=8)
    assert core.limits.max_model_len == 28, "an open max_model_len is what the pool can hold"
    with pytest.raises(ContextLengthError, match="maximum context length is 28 tokens"):
        core.check([5] * 20, SamplingParams(max_tokens=9))
    with pytest.raises(ConfigError, match="Set max_model_len to at most 28"):
        make_core(num_gpu_blocks_override=8, max_model_len=29)


def test_nothing_is_compiled_after_ready_and_no_eager_operation_runs(
    core: EngineCore, make_requests: Callable, run_all: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager: list[str] = []
    trace = jax._src.core.EvalTrace
    process = trace.process_primitive

    def spy(self: Any, primitive: Any, *args: Any, **kwargs: Any) -> Any:
        eager.append(str(primitive))
        return process(self, primitive, *args, **kwargs)

    monkeypatch.setattr(trace, "process_primitive", spy)
    jnp.zeros(3) + 1
    assert eager, "the spy does not see eager operations"
    eager.clear()
    before = core.stats().num_compilations_after_ready
    run_all(core, make_requests(40, seed=5))
    assert eager == []
    assert core.stats().num_compilations_after_ready == before


def test_the_cache_is_donated_and_never_copied(core: EngineCore) -> None:
    """A copy of the KV cache a step would cost more than the step. Nor do the programs that move blocks make one."""
    limits, model, compiled = core.limits, core.model, core.runner.compiled
    cache = f"[{limits.num_blocks},{limits.block_size},{model.num_kv_heads},{2 * model.head_dim}]"
    flat = f"[{limits.num_blocks * limits.block_size},{model.num_kv_heads},{2 * model.head_dim}]"
    kv, state = core.runner._kv, core.runner._state
    programs = [(executable, (kv, state)) for _, executable in compiled.steps]
    programs += [(executable, (kv, state)) for executable in compiled.follow_beams.values()]
    programs += [(executable, kv) for executable in (*compiled.copy.values(), *compiled.scatter.values())]
    programs += [(executable, ()) for executable in compiled.gather.values()]
    assert len(programs) == 1 + 1 + 1 + 2 + 2
    for executable, donated in programs:
        text = executable.as_text()
        assert cache in text
        copies = [line.strip() for line in text.splitlines() if re.search(r"= \S+ copy(-start)?\(", line)]
        assert not [line for line in copies if cache in line or flat in line]
        alias = re.search(r"input_output_alias=\{(.*?)\},? entry", text, re.DOTALL)
        aliased = alias.group(1) if alias else ""
        assert aliased.count("may-alias") + aliased.count("must-alias") == len(jax.tree.leaves(donated))


def test_metrics_count_what_was_done(make_core: Callable, run_all: Callable) -> None:
    core = make_core()
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    run_all(core, [([5] * 20, params), ([6] * 3, params)])
    m = core.metrics
    assert (m.prompt_tokens, m.generation_tokens) == (23, 10)
    assert m.request_success == {"stop": 0, "length": 2, "abort": 0, "error": 0}
    assert sum(m.ttft.read().counts) == 2
    assert sum(m.inter_token.read().counts) == 8
    assert sum(m.time_per_output_token.read().counts) == 2
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.last_commit_age_s) == (0, 0, 0.0)
