"""Shared, stored and swapped KV on real jax: whatever was not computed again, the answer is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.engine import EngineCore
from jaxserve.errors import NumericalError, ParameterError
from jaxserve.scheduler.policy import MemoryCosts
from jaxserve.types import BeamSearchParams, Delta, SamplingParams

SWAPS, COMPUTES = MemoryCosts(0.0, 0.0, 1.0), MemoryCosts(1.0, 1.0, 0.0)
PROMPT = [50, 60, 70, 80, 50, 60, 90, 91, 92, 93, 94, 95, 50, 51, 52, 53]  # four blocks


def tokens_of(deltas: list[Delta], index: int = 0) -> list[int]:
    return [t for d in deltas if d.index == index for t in d.token_ids]


def outcome(deltas: list[Delta]) -> tuple:
    return tokens_of(deltas), deltas[-1].finish_reason, deltas[-1].stop_reason


def with_costs(core: EngineCore, costs: MemoryCosts) -> EngineCore:
    """The idle engine with a new scheduler that believes in these costs."""
    assert not core.has_work
    core.runner.costs = costs
    core.scheduler = core._make_scheduler()
    core.metrics.prefix_queries = core.metrics.prefix_hits = 0
    return core


@pytest.fixture(scope="module")
def small_core(make_core: Callable[..., EngineCore]) -> EngineCore:
    """17 blocks for four rows that want up to 16 each; every swap is checked."""
    return make_core(num_gpu_blocks_override=18, verify_swaps=True)


@pytest.fixture(scope="module")
def requests(make_requests: Callable) -> list:
    """Of every kind, and long: 24 tokens on top of prompts of up to 40."""
    return [(p, replace(params, max_tokens=24, ignore_eos=True)) for p, params in make_requests(27, seed=1)]


@pytest.fixture(scope="module")
def alone(shared_core: EngineCore, requests: list, run_all: Callable) -> list[tuple]:
    """Each request's outcome with the engine to itself and nothing in the cache."""
    results = []
    for request in requests:
        shared_core.reset_prefix_cache()
        results.append(outcome(run_all(shared_core, [request])[0]))
    return results


@pytest.fixture
def fresh(core: EngineCore) -> EngineCore:
    """The shared engine with an empty prefix cache."""
    core.reset_prefix_cache()
    return core


def prefilled(core: EngineCore, run: Callable[[], Any]) -> tuple[Any, int]:
    """What `run` returns, and how many tokens of chunks were fed for it."""
    before = core.metrics.prompt_tokens
    return run(), core.metrics.prompt_tokens - before


@pytest.mark.parametrize("costs", [SWAPS, COMPUTES], ids=["swap", "recompute"])
def test_who_gives_way_goes_on_as_if_nothing_had_happened(
    small_core: EngineCore, requests: list, alone: list, run_all: Callable, costs: MemoryCosts
) -> None:
    core = with_costs(small_core, costs)
    before = dict(core.metrics.preemptions_by_means)
    results, num_fed = prefilled(core, lambda: run_all(core, requests))
    assert [outcome(d) for d in results] == alone
    core.scheduler.check_integrity()
    counters, stats = core.scheduler.counters, core.stats()
    by_means = {means: n - before[means] for means, n in core.metrics.preemptions_by_means.items()}
    assert by_means == {"swap": counters.swap_preemptions, "recompute": counters.recompute_preemptions}
    assert stats.num_preemptions == sum(by_means.values())
    assert (stats.num_swapped_blocks, stats.num_swap_blocks) == (0, 64)
    num_prompt = sum(len(prompt) for prompt, _ in requests)
    if costs is COMPUTES:
        assert by_means["swap"] == 0 < by_means["recompute"]
    else:
        assert by_means["recompute"] == 0 < by_means["swap"]
        assert num_fed <= num_prompt + by_means["swap"], "one token is fed again for each that comes back"
        assert core.metrics.swapped_out.blocks >= core.metrics.swapped_in.blocks > 0


def test_logprobs_survive_a_swap(small_core: EngineCore, fresh: EngineCore, requests: list, run_all: Callable) -> None:
    """Of prompts and outputs, to 1e-4: steps of other sizes round their last bits differently."""
    core = with_costs(small_core, SWAPS)
    asked = [
        (p, SamplingParams(temperature=0, max_tokens=20, logprobs=1, prompt_logprobs=1, ignore_eos=True))
        for p, _ in requests[:8]
    ]
    want, got = run_all(fresh, asked), run_all(core, asked)
    assert core.scheduler.counters.swap_preemptions > 0
    for one, other in zip(want, got, strict=True):
        assert tokens_of(one) == tokens_of(other)
        assert logprobs_of(one) == pytest.approx(logprobs_of(other), abs=1e-4)


def logprobs_of(deltas: list[Delta]) -> list[float]:
    prompt = deltas[0].prompt_logprobs or ()
    output = [entry for d in deltas for entry in d.logprobs or ()]
    return [entry.logprob for entry in (*prompt, *output) if entry is not None]


def test_a_failed_step_while_a_swap_is_on_its_way_loses_nobody(
    small_core: EngineCore, requests: list, alone: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks on their way are lost, and computed again; those in host memory are not."""
    core = with_costs(small_core, SWAPS)
    fetch, run = core.runner.fetch, core.runner.run
    failures: list[str] = []

    def failing_fetch(running: Any) -> Any:
        if core.runner.store.num_pending and not core._num_failures and len(failures) % 3 != 2:
            failures.append("on its way")
            raise RuntimeError("INTERNAL: injected while blocks are on their way")
        return fetch(running)

    def failing_run(plan: Any, *args: Any) -> Any:
        if len(plan.swap_out_slots) and not core._num_failures and len(failures) % 3 == 2:
            failures.append("not begun")
            raise RuntimeError("INTERNAL: injected before the copy began")
        return run(plan, *args)

    monkeypatch.setattr(core.runner, "fetch", failing_fetch)
    monkeypatch.setattr(core.runner, "run", failing_run)
    deltas: list[list[Delta]] = [[] for _ in requests]
    for i, (prompt, params) in enumerate(requests):
        core.add(f"r{i}", core.check(prompt, params), i)
    while core.has_work:
        for i, delta in core.step():
            deltas[i].append(delta)
        core.scheduler.check_integrity()
    assert {"on its way", "not begun"} == set(failures)
    assert [outcome(d) for d in deltas] == alone
    assert core.scheduler.num_free_blocks == core.limits.num_blocks - 1


def test_a_torn_swap_is_noticed_and_computed_again(
    small_core: EngineCore, requests: list, alone: list, run_all: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = with_costs(small_core, SWAPS)
    store, tears = core.runner.store, iter(range(10**6))
    drain = store.drain

    def tear() -> None:
        drain()
        if not store.num_pending and (tear := next(tears)) % 5 == 0:
            store._slots.view(np.uint8)[:, 0, 0, 0, 0] ^= np.uint8(tear % 255 + 1)

    monkeypatch.setattr(store, "drain", tear)
    failures = []
    recover = core._recover
    monkeypatch.setattr(core, "_recover", lambda error: (failures.append(str(error)), recover(error)))
    assert [outcome(d) for d in run_all(core, requests)] == alone
    assert failures
    assert all("does not hold what was stored" in failure for failure in failures)


def test_a_prompt_that_is_cached_as_a_whole_feeds_one_token(fresh: EngineCore, run_all: Callable) -> None:
    request = (PROMPT, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    (cold,), num_cold = prefilled(fresh, lambda: run_all(fresh, [request]))
    queries, hits = fresh.metrics.prefix_queries, fresh.metrics.prefix_hits
    (warm,), num_warm = prefilled(fresh, lambda: run_all(fresh, [request]))
    assert (num_cold, num_warm) == (16, 1)
    assert tokens_of(warm) == tokens_of(cold)
    assert [d.num_cached_tokens for d in cold] == [0] * len(cold)
    assert [d.num_cached_tokens for d in warm] == [15] + [0] * (len(warm) - 1)
    assert (fresh.metrics.prefix_queries - queries, fresh.metrics.prefix_hits - hits) == (16, 15)


def test_the_next_turn_of_a_conversation_computes_only_what_is_new(
    fresh: EngineCore, run_all: Callable, greedy: Callable
) -> None:
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    answer = tokens_of(run_all(fresh, [(PROMPT, params)])[0])
    turn = [*PROMPT, *answer, 7, 8]
    (deltas,), num_fed = prefilled(fresh, lambda: run_all(fresh, [(turn, params)]))
    assert (deltas[0].num_cached_tokens, num_fed) == (24, 3), "six of its blocks are full and known"
    assert tokens_of(deltas)[:4] == greedy(turn, 4)


def test_salts_and_resets_hide_what_is_cached(fresh: EngineCore) -> None:
    params = SamplingParams(temperature=0, max_tokens=2)

    def num_cached(salt: str | None) -> int:
        fresh.add("x", fresh.check(PROMPT, params, salt), 0)
        deltas = []
        while fresh.has_work:
            deltas += fresh.step()
        return deltas[0][1].num_cached_tokens

    assert [num_cached(salt) for salt in (None, "a", "b", "salt ", None, "a")] == [0, 0, 0, 0, 15, 15]
    assert fresh.stats().num_cached_blocks == 16
    assert fresh.reset_prefix_cache() == 16
    assert fresh.stats().num_cached_blocks == 0
    assert num_cached("a") == 0
    with pytest.raises(ParameterError, match="cache_salt"):
        fresh.check(PROMPT, params, "")


@pytest.mark.parametrize(
    "penalties",
    [{"repetition_penalty": 1.7}, {"presence_penalty": 1.5, "frequency_penalty": 0.8}],
    ids=lambda p: next(iter(p)),
)
def test_penalties_know_the_tokens_that_were_not_fed(
    fresh: EngineCore, run_all: Callable, penalties: dict[str, float]
) -> None:
    """Of a hit and of a fork. With the prompt's tokens forgotten the outputs differ."""
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, **penalties)
    cold = tokens_of(run_all(fresh, [(PROMPT, params)])[0])
    assert tokens_of(run_all(fresh, [(PROMPT, params)])[0]) == cold
    several = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, n=3, **penalties)
    deltas = run_all(fresh, [(PROMPT, several)])[0]
    assert [tokens_of(deltas, index) for index in range(3)] == [cold] * 3
    turn = [*PROMPT, *cold[:4]]
    longer = tokens_of(run_all(fresh, [(turn, params)])[0])
    fresh.reset_prefix_cache()
    assert longer == tokens_of(run_all(fresh, [(turn, params)])[0])


def test_prompt_logprobs_of_a_cached_prompt_are_computed(fresh: EngineCore, run_all: Callable) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2, ignore_eos=True)
    plain = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    (cold,) = run_all(fresh, [(PROMPT, params)])
    (again,), num_fed = prefilled(fresh, lambda: run_all(fresh, [(PROMPT, params)]))
    assert num_fed == len(PROMPT)
    assert again[0].num_cached_tokens == 0
    assert again[0].prompt_logprobs == cold[0].prompt_logprobs
    assert None not in (again[0].prompt_logprobs or ())[1:]
    assert run_all(fresh, [(PROMPT, plain)])[0][0].num_cached_tokens == 15
    several = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2, ignore_eos=True, n=3)
    (deltas,), num_fed = prefilled(fresh, lambda: run_all(fresh, [(PROMPT, several)]))
    assert num_fed == len(PROMPT) + 2
    assert deltas[0].prompt_logprobs == cold[0].prompt_logprobs
    assert all(d.prompt_logprobs is None for d in deltas[1:])


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:11]], ids=["full block", "partial block"])
def test_each_of_n_is_the_request_with_its_own_seed(fresh: EngineCore, run_all: Callable, prompt: list[int]) -> None:
    """Six sequences on four rows: the prompt is computed once, the others fork it or find it in the cache."""
    several = SamplingParams(temperature=1.0, max_tokens=8, seed=11, n=6, ignore_eos=True, logprobs=0)
    seeds = fresh.check(prompt, several).seeds
    assert seeds[0] == 11
    assert len(set(seeds)) == 6
    (deltas,), num_fed = prefilled(fresh, lambda: run_all(fresh, [(prompt, several)]))
    assert num_fed <= len(prompt) + 5 + 2 * 3, "two more may enter by the cache when the others have ended"
    assert sorted(d.index for d in deltas if d.finish_reason) == list(range(6))
    for index, seed in enumerate(seeds):
        single = SamplingParams(temperature=1.0, max_tokens=8, seed=seed, ignore_eos=True)
        assert tokens_of(deltas, index) == tokens_of(run_all(fresh, [(prompt, single)])[0]), index
    for index in range(6):
        own = [d for d in deltas if d.index == index]
        assert own[-1].cumulative_logprob == pytest.approx(sum(logprobs_of(own)), abs=1e-6)
        assert all(d.cumulative_logprob is None for d in own[:-1])


def test_best_of_scores_without_reporting(fresh: EngineCore, run_all: Callable) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=4, seed=1, n=1, best_of=3, ignore_eos=True)
    scored = SamplingParams(temperature=1.0, max_tokens=4, seed=1, n=3, ignore_eos=True, logprobs=0)
    (deltas,), (want,) = run_all(fresh, [(PROMPT, params)]), run_all(fresh, [(PROMPT, scored)])
    assert all(d.logprobs is None for d in deltas)
    for index in range(3):
        assert tokens_of(deltas, index) == tokens_of(want, index)
        (score,) = [d.cumulative_logprob for d in deltas if d.index == index and d.finish_reason]
        assert score == pytest.approx(sum(logprobs_of([d for d in want if d.index == index])), abs=1e-5)


def test_a_request_of_several_sequences_is_counted_once(make_core: Callable, run_all: Callable) -> None:
    core = make_core(swap_space=0.0)
    assert (core.stats().num_swap_blocks, core.runner.compiled.gather, core.runner.costs.swap_block_s) == (0, {}, 0.0)
    run_all(core, [(PROMPT, SamplingParams(temperature=1.0, seed=1, max_tokens=5, n=3, ignore_eos=True))])
    run_all(core, [(PROMPT[:9], BeamSearchParams(beam_width=4, max_tokens=6, ignore_eos=True))])
    m = core.metrics
    assert m.request_success == {"stop": 0, "length": 2, "abort": 0, "error": 0}
    assert m.generation_tokens == 15 + 24
    assert m.request_generation_tokens.read().sum == 39
    assert m.request_longest_tokens.read().sum == 5 + 6
    assert m.params_n.read().sum == 3 + 4
    assert sum(m.ttft.read().counts) == 2
    assert sum(m.inter_token.read().counts) == 12, "four each; a beam search tells of none"
    assert m.cached_tokens == 8, "of the beam search's prompt, two blocks"
    core.add("late", core.check(PROMPT, SamplingParams(n=2)), "owner")
    assert core.refuse("late", "queue_timeout") == "owner"
    assert core.refuse("late", "queue_timeout") is None
    assert m.request_success == {"stop": 0, "length": 2, "abort": 0, "error": 0}
    assert m.rejections["queue_timeout"] == 1
    assert not core._generations


def test_one_of_several_ends_alone_and_the_last_ends_the_request(fresh: EngineCore) -> None:
    before = dict(fresh.metrics.request_success)
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=40, n=3, ignore_eos=True)
    fresh.add("x", fresh.check(PROMPT, params), "owner")
    seen: list[int] = []
    while set(seen) != {0, 1, 2}:
        seen += [d.index for _, d in fresh.step()]
    assert fresh.abort_sequence("x", 1, "stop") == "owner"
    assert fresh.abort_sequence("x", 1, "stop") is None
    later = [d.index for _ in range(4) for _, d in fresh.step()]
    assert set(later) == {0, 2}
    fresh.scheduler.check_integrity()
    assert fresh.abort_sequence("x", 0, "stop") == "owner"
    assert fresh.metrics.request_success == before
    assert fresh.abort_sequence("x", 2, "stop") == "owner"
    assert fresh.metrics.request_success == before | {"stop": before["stop"] + 1}
    while fresh.has_work:
        assert fresh.step() == []


def test_an_error_of_one_ends_all_with_one_delta(make_core: Callable, params: Any, run_all: Callable) -> None:
    """The embedding of token 149 is NaN, and each sequence samples 149 or another by its own seed."""
    core = make_core(params={**params, "embed": params["embed"].at[149].set(jnp.nan)})
    several = SamplingParams(temperature=1.0, seed=2, max_tokens=12, n=4, allowed_token_ids=[20, 21, 22, 149])
    beams = BeamSearchParams(beam_width=3, max_tokens=12)
    never = {149: -100.0}
    good = (PROMPT, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logit_bias=never))
    results = run_all(core, [(PROMPT, several), good, ([149, 5], beams)])
    for deltas in (results[0], results[2]):
        assert [d.finish_reason for d in deltas if d.finish_reason] == ["error"]
        assert isinstance(deltas[-1].error, NumericalError)
    assert len(results[0]) > 1, "it failed after its first tokens"
    assert results[1][-1].finish_reason == "length"
    core.scheduler.check_integrity()
    assert core.metrics.request_success["error"] == 2
    assert core.scheduler.num_free_blocks == core.limits.num_blocks - 1


def test_a_search_wider_than_the_batch_is_refused(core: EngineCore) -> None:
    with pytest.raises(ParameterError, match=r"'beam_width' must be at most max_num_seqs=4.*got 5"):
        core.check(PROMPT, BeamSearchParams(beam_width=5))


def test_costs_are_measured(core: EngineCore) -> None:
    costs = core.runner._warm_up()
    assert 0 < costs.prefill_token_s < 1
    assert 0 < costs.swap_fixed_s + 16 * costs.swap_block_s < 1


def test_nothing_is_compiled_for_what_memory_pressure_does(
    small_core: EngineCore, requests: list, run_all: Callable
) -> None:
    core = with_costs(small_core, SWAPS)
    before = core.stats().num_compilations_after_ready
    forked = [(p, SamplingParams(temperature=1.0, seed=3, max_tokens=9, n=5)) for p, _ in requests[:6]]
    run_all(core, [*forked, *requests, *forked, (PROMPT, BeamSearchParams(beam_width=3, max_tokens=9))])
    run_all(core, [(PROMPT, BeamSearchParams(beam_width=3, max_tokens=9))])
    counters = core.scheduler.counters
    assert min(counters.swap_preemptions, counters.copied_blocks, counters.prefix_hits) > 0
    assert core.stats().num_compilations_after_ready == before
    assert np.isfinite([core.metrics.swapped_out.seconds, core.metrics.swapped_in.seconds]).all()
