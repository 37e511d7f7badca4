"""`BeamSearch` against a reference that sorts whole sequences, on models that are tables of random numbers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from jaxserve.scheduler.beams import BeamSearch
from jaxserve.scheduler.finish import Hypothesis
from jaxserve.scheduler.sequences import Request
from jaxserve.types import BeamSearchParams

VOCAB = 40
PROMPT = (1, 2)


@pytest.fixture(scope="module")
def reference(repo: Path) -> ModuleType:
    """tests/engine/beam_reference.py."""
    spec = importlib.util.spec_from_file_location("beam_reference", repo / "tests" / "engine" / "beam_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


class TableModel:
    """Logits that depend on the last two tokens, with stop tokens as likely as wished."""

    def __init__(self, seed: int, stop_ids: Sequence[int], stop_bias: float):
        self._table = np.random.default_rng(seed).normal(0, 1.5, (VOCAB, VOCAB, VOCAB))
        self._table[:, :, list(stop_ids)] += stop_bias

    def __call__(self, sequences: Sequence[tuple[int, ...]]) -> np.ndarray:
        return np.stack([self._table[tokens[-2], tokens[-1]] for tokens in sequences])


def run_as_a_device_would(
    model: TableModel, log_softmax: Callable[[np.ndarray], Any], params: BeamSearchParams, stop_ids: Sequence[int]
) -> tuple[tuple[Hypothesis, ...], int]:
    """The search's hypotheses and its steps; sums in float32, k rows, equal ones far behind in the first step."""
    search = BeamSearch(params, params.max_tokens)
    width = params.beam_width
    outputs: list[tuple[int, ...]] = [()] * width
    scores = np.where(np.arange(width) == 0, 0, -1e9).astype(np.float32)
    for step in range(1, params.max_tokens + 1):
        logits = model([(*PROMPT, *tokens) for tokens in outputs])
        sums = scores[:, None] + log_softmax(logits).astype(np.float32)
        stop_sums = np.full((width, 16), -np.inf, np.float32)
        stop_tokens = np.full((width, 16), -1, np.int32)
        for beam in range(width):
            best = np.array(stop_ids, int)[np.argsort(-sums[beam, stop_ids])][:16]
            stop_tokens[beam, : len(best)] = best
            stop_sums[beam, : len(best)] = sums[beam, stop_tokens[beam, : len(best)]]
        sums[:, list(stop_ids)] = -np.inf
        order = np.argsort(-sums, axis=None, kind="stable")[:width]
        parents, tokens = np.unravel_index(order, sums.shape)
        scores = sums[parents, tokens]
        outputs = [(*outputs[parent], int(token)) for parent, token in zip(parents, tokens, strict=True)]
        if search.advance(parents, tokens.astype(np.int32), scores, stop_tokens, stop_sums):
            return search.hypotheses(), step
    raise AssertionError("a search ends with its last token")


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 16])
def test_hypotheses_are_the_reference_s(width: int, early_stopping: bool | str, reference: ModuleType) -> None:
    rng = np.random.default_rng(width)
    num_early = num_checked = 0
    for seed in range(24):
        stop_ids = rng.choice(np.arange(3, VOCAB), int(rng.integers(0, 20)), replace=False).tolist()
        model = TableModel(seed, stop_ids, float(rng.uniform(-3, 4)))
        penalty = [-1.0, 0.0, 0.6, 1.0, 1.5, 3.0][seed % 6]
        params = BeamSearchParams(
            beam_width=width,
            max_tokens=int(rng.integers(1, 24)),
            length_penalty=penalty,
            early_stopping=early_stopping,  # pyright: ignore[reportArgumentType]
        )
        searched = reference.beam_search(
            model,
            PROMPT,
            width=width,
            max_tokens=params.max_tokens,
            length_penalty=penalty,
            early_stopping=early_stopping,
            stop_ids=stop_ids,
        )
        if searched.margin < 1e-4:  # float32 sums below 128 are exact to 2^-17 a step
            continue
        num_checked += 1
        hypotheses, num_steps = run_as_a_device_would(model, reference.log_softmax, params, stop_ids)
        num_early += num_steps < params.max_tokens
        assert [h.token_ids for h in hypotheses] == [one.tokens for one in searched.found]
        assert len(hypotheses) == width
        for hypothesis, one in zip(hypotheses, searched.found, strict=True):
            assert abs(hypothesis.cumulative_logprob - one.logprob) < 1e-4
            assert abs(hypothesis.score - one.score) < 1e-4 * max(1, len(one.tokens) ** -penalty)
            assert hypothesis.reason == ("stop" if one.stopped else "length")
            assert hypothesis.stop_reason == (one.tokens[-1] if one.stopped else None)
    assert num_checked >= 12
    assert num_early >= 1


def advance(search: BeamSearch, scores: Sequence[float], stops: Sequence[tuple[int, int, float]] = ()) -> bool:
    """A step whose beams go on as they are, with token 10 + beam; `stops`: (beam, token, sum)."""
    width = len(scores)
    stop_tokens, stop_scores = np.full((width, 2), -1, np.int32), np.full((width, 2), -np.inf, np.float32)
    for beam, token, total in stops:
        place = int(stop_tokens[beam, 0] >= 0)
        stop_tokens[beam, place], stop_scores[beam, place] = token, total
    tokens = np.arange(10, 10 + width, dtype=np.int32)
    return search.advance(np.arange(width), tokens, np.float32(scores), stop_tokens, stop_scores)  # pyright: ignore


def test_a_stop_token_behind_the_first_k_makes_no_hypothesis() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=2), 8)
    assert not advance(search, [-1.0, -2.0], [(0, 3, -2.5)])
    assert search.hypotheses() == ()
    assert not advance(search, [-2.0, -3.0], [(1, 3, -2.5)])
    (only,) = search.hypotheses()
    assert (only.token_ids, only.cumulative_logprob, only.score) == ((11, 3), -2.5, -1.25)


def test_equal_sums_rank_by_beam_then_token() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=2), 8)
    advance(search, [-1.0, -1.0], [(0, 3, -1.0), (1, 2, -1.0)])  # (0, 3), (0, 10) are the first two
    assert [h.token_ids for h in search.hypotheses()] == [(3,)]


def test_the_model_s_own_stop_tokens_are_no_stop_reason() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=2, early_stopping=True), 8, eos_token_ids=(2,))
    assert advance(search, [-5.0, -6.0], [(0, 2, -1.0), (0, 7, -2.0)])
    assert [(h.reason, h.stop_reason) for h in search.hypotheses()] == [("stop", None), ("stop", 7)]


def test_a_negative_length_penalty_lets_long_beams_lose() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=1, length_penalty=-1.0, early_stopping="never"), 8)
    assert advance(search, [-1.5], [(0, 3, -1.0)])  # -1.5 at one token is worse than -1, and can only get worse
    search = BeamSearch(BeamSearchParams(beam_width=1, length_penalty=1.0, early_stopping="never"), 8)
    assert not advance(search, [-1.5], [(0, 3, -1.0)])  # -1.5 / 8 could be better


def test_a_request_s_search_has_its_length_and_begins_anew() -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    prompt = np.arange(1, 6, dtype=np.int32)
    request = Request("r", prompt, max_total_len=8, num_sequences=2, beam=params)
    for _ in range(2):
        search = BeamSearch.for_request(request, (2,))
        assert [advance(search, [-i - 1.0, -i - 2.0]) for i in range(3)] == [False, False, True]
        assert [h.token_ids for h in search.hypotheses()] == [(10, 10, 10), (11, 11, 11)]
        assert {h.reason for h in search.hypotheses()} == {"length"}
