"""Several decode steps in one call of the device: the same tokens, and nobody is kept waiting for more than one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.engine import EngineCore
from jaxserve.scheduler.plan import StepPlan
from jaxserve.types import Delta, SamplingParams

PROMPT = [10, 20, 30, 40]


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@pytest.fixture(scope="module")
def looping(make_core: Callable[..., EngineCore]) -> EngineCore:
    """As many steps as a block has tokens: four; and readers who never look."""
    return make_core(max_decode_steps=16, stream_interval_ms=float("inf"))


@pytest.fixture
def plans(looping: EngineCore, monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """What the engine dispatches from now on."""
    seen, run = [], looping.runner.run

    def noting(plan: StepPlan, sequences: Any) -> Any:
        seen.append(plan)
        return run(plan, sequences)

    monkeypatch.setattr(looping.runner, "run", noting)
    return seen


def test_every_feature_gives_the_tokens_of_single_steps(
    looping: EngineCore, make_core: Callable, run_all: Callable, make_requests: Callable, plans: list[StepPlan]
) -> None:
    requests = make_requests(30, seed=9)
    single = make_core(max_decode_steps=1)
    want, got = run_all(single, requests), run_all(looping, requests)
    for alone, looped in zip(want, got, strict=True):
        assert tokens_of(looped) == tokens_of(alone)
        assert (looped[-1].finish_reason, looped[-1].stop_reason) == (alone[-1].finish_reason, alone[-1].stop_reason)
        values = [[e.logprob for d in deltas for e in d.logprobs or ()] for deltas in (alone, looped)]
        np.testing.assert_allclose(values[1], values[0], atol=1e-4)
    assert max(plan.num_steps for plan in plans) > 1


def test_the_device_sees_the_stop_by_itself(
    looping: EngineCore, run_all: Callable, greedy: Callable, plans: list[StepPlan]
) -> None:
    """The row's end in the middle of a loop ends the loop, and nothing is fed for it afterwards."""
    want = greedy(PROMPT, 12)
    stop = want[5]
    assert stop not in want[:5]
    answers, fetch = [], looping.runner.fetch

    def noting(running: Any) -> Any:
        answers.append((running, fetch(running)))
        return answers[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looping.runner, "fetch", noting)
        deltas = run_all(looping, [(PROMPT, SamplingParams(temperature=0, max_tokens=40, stop_token_ids=[stop]))])[0]
    assert tokens_of(deltas) == want[:6]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
    fed = [(running.plan, answer.tokens[:, 0].tolist()) for running, answer in answers]
    at = next(index for index, (_, tokens) in enumerate(fed) if stop in tokens)
    plan, tokens = fed[at]
    assert plan.num_steps == 4
    assert 0 <= tokens.index(stop) < 3, "the stop is not in the middle of the loop"
    assert not any(tokens[tokens.index(stop) + 1 :]), "the loop went on after its last row had ended"
    assert all(plan.num_steps == 4 for plan, _ in fed[at + 1 :])
    assert bool(looping.runner._state.ended[plan.decode_rows[0]])


def test_a_newcomer_is_in_the_first_plan_after_the_loop(looping: EngineCore, plans: list[StepPlan]) -> None:
    endless = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    looping.add("old", looping.check(PROMPT, endless), "old")
    while not plans or plans[-1].num_steps == 1:
        looping.step()
    assert looping.scheduler.num_in_flight == 4, "one loop is on its way, and not a second behind it"
    looping.wait_for_loop()
    looping.add("new", looping.check([8, 9], endless), "new")
    looping.step()
    assert len(plans[-1].prefill_rows) == 1
    for name in ("old", "new"):
        looping.abort(name)
    while looping.has_work:
        looping.step()


def test_loops_are_as_long_as_the_readers_allow(looping: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    for step_s, steps in ((0.0, 1), (0.050, 1), (0.020, 1), (0.010, 2), (0.006, 3), (0.0001, 4)):
        monkeypatch.setattr(looping, "_decode_step_s", step_s)
        monkeypatch.setattr(looping, "config", type("", (), {"stream_interval_ms": 20.0}))
        assert looping._num_steps_ahead() == steps


def test_a_failed_row_ends_in_the_loop_and_the_others_go_on(
    make_core: Callable, params: Any, run_all: Callable, greedy: Callable
) -> None:
    """Token 149's embedding is NaN: whoever samples it fails when it is fed."""
    core = make_core(params={**params, "embed": params["embed"].at[149].set(jnp.nan)}, stream_interval_ms=float("inf"))
    forced = SamplingParams(temperature=0, max_tokens=20, logit_bias={149: 100.0}, min_tokens=5)
    good = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    failed, fine = run_all(core, [([9, 8], forced), (PROMPT, good)])
    assert failed[-1].finish_reason == "error"
    assert tokens_of(fine)[:4] == greedy(PROMPT, 4)
    core.scheduler.check_integrity()
    assert core.scheduler.num_free_blocks == core.limits.num_blocks - 1
