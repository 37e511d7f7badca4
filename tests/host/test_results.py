"""What `LLM` makes of a request's deltas: continuations in order, the best of several, hypotheses."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.results import Collected, likeliest, ranked_params
from jaxserve.text.token_bytes import TokenBytes
from jaxserve.types import BeamSearchParams, Delta, SamplingParams, TokenLogprobs


class LetterTokenizer:
    """Token i is the i-th letter."""

    token_bytes_table = TokenBytes(tuple(bytes([97 + i]) for i in range(26)), frozenset(), frozenset(), 0)


@pytest.fixture
def collect() -> Any:
    def make(params: SamplingParams | BeamSearchParams) -> Collected:
        return Collected(0, "r", "ab", [0, 1], params, LetterTokenizer())  # type: ignore[arg-type]

    return make


def delta(token: int, logprob: float | None = None, **fields: Any) -> Delta:
    logprobs = None if logprob is None else (TokenLogprobs(token, logprob, 1),)
    return Delta((token,), logprobs, **fields)


def test_continuations_stand_in_the_order_of_their_index(collect: Any) -> None:
    collected = collect(SamplingParams(n=3, stop="cd"))
    assert collected.push(delta(2, num_cached_tokens=1)) == []
    assert collected.push(delta(5, index=2, finish_reason="stop")) == []
    assert collected.push(delta(4, index=1)) == []
    assert collected.push(delta(3)) == [0]  # a stop string ended it
    assert collected.push(delta(3)) == []
    assert not collected.finished
    assert collected.push(delta(4, index=1, finish_reason="length")) == []
    assert collected.finished
    output = collected.request_output()
    assert [(o.index, o.text, o.finish_reason, o.stop_reason) for o in output.outputs] == [
        (0, "", "stop", "cd"), (1, "ee", "length", None), (2, "", "stop", None)
    ]  # fmt: skip
    assert [o.token_ids for o in output.outputs] == [(2, 3), (4, 4), (5,)]
    assert all(o.logprobs is None and o.cumulative_logprob is None for o in output.outputs)
    assert (output.num_cached_tokens, collected.num_output_tokens) == (1, 5)


def test_the_best_of_several_come_best_first_and_renumbered(collect: Any) -> None:
    params = SamplingParams(n=2, best_of=3)
    assert ranked_params(params).logprobs == 0
    collected = collect(params)
    for index, logprobs in enumerate(([-2.0], [-0.5, -0.5], [-0.2, -0.2, -0.2, -0.9])):
        for place, logprob in enumerate(logprobs, start=1):
            reason = "length" if place == len(logprobs) else None
            collected.push(delta(index, logprob, index=index, finish_reason=reason))
    outputs = collected.request_output().outputs
    assert [(o.index, o.text) for o in outputs] == [(0, "cccc"), (1, "bb")]
    assert [o.cumulative_logprob for o in outputs] == [pytest.approx(-1.5), -1.0]
    assert all(o.logprobs is None for o in outputs)  # they were not asked
    assert collected.num_output_tokens == 7


def test_logprobs_are_asked_only_where_they_are_needed() -> None:
    for params in (SamplingParams(n=3), SamplingParams(n=3, best_of=3), SamplingParams(n=1, best_of=2, logprobs=5)):
        assert ranked_params(params) is params


def test_the_mean_ranks_and_equals_keep_their_order() -> None:
    assert likeliest([-1.0, -1.0, -0.5, -2.0], [1, 2, 1, 4], 4) == [1, 2, 3, 0]
    assert likeliest([0.0, -3.0], [0, 3], 2) == [1, 0]  # nothing generated is never the best


def test_a_failure_ends_all_continuations(collect: Any) -> None:
    collected = collect(SamplingParams(n=2))
    collected.push(delta(0, index=1))
    collected.push(Delta(finish_reason="error", error=ValueError("NaN")))
    assert collected.finished
    assert [(o.text, o.finish_reason) for o in collected.request_output().outputs] == [("", "error"), ("a", "error")]


def test_hypotheses_keep_the_engines_order_and_scores(collect: Any) -> None:
    collected = collect(BeamSearchParams(beam_width=2))
    collected.push(Delta((0, 1, 2), None, None, "stop", 2, 1, None, 0, -1.5, -0.5))
    assert not collected.finished
    collected.push(Delta((0, 3), None, None, "length", None, 0, None, 1, -2.0, -1.0))
    output = collected.beam_output()
    assert (output.prompt, output.prompt_token_ids) == ("ab", (0, 1))
    best, other = output.sequences
    assert (best.token_ids, best.text, best.cum_logprob, best.score) == ((0, 1, 2), "ab", -1.5, -0.5)
    assert (best.finish_reason, best.stop_reason) == ("stop", 2)
    assert (other.token_ids, other.text, other.finish_reason) == ((0, 3), "ad", "length")


def test_a_search_that_failed_has_no_hypotheses(collect: Any) -> None:
    collected = collect(BeamSearchParams(beam_width=2))
    collected.push(Delta(finish_reason="error", error=ValueError("NaN")))
    assert collected.finished
    assert collected.beam_output().sequences == ()
