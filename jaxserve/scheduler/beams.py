"""`BeamSearch`: one search's beams and hypotheses, and when it is over.

Owns the rules by which candidates become hypotheses. The device ranks a step's continuations and says what came of
them; this mirrors it. It knows no rows, no blocks and no device.

Source: Hugging Face transformers 5, `GenerationMixin._beam_search` and the functions it calls.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

import numpy as np

from jaxserve.scheduler.finish import Hypothesis
from jaxserve.scheduler.sequences import Request
from jaxserve.types import BeamSearchParams


@dataclass(frozen=True, slots=True)
class _Ended:
    """A hypothesis as a place in the search: `length` tokens, the last one after beam `parent` of the step before."""

    score: float
    cumulative_logprob: float
    length: int
    parent: int
    token: int
    is_stop: bool


class BeamSearch:
    """One beam search, from its first step to its end.

    Args:
        params: width, length penalty and end condition.
        max_output_tokens: tokens at which beams end as they are.
        eos_token_ids: stop tokens that are no stop reason of their own.
    """

    def __init__(self, params: BeamSearchParams, max_output_tokens: int, eos_token_ids: tuple[int, ...] = ()):
        self._params, self._eos_token_ids = params, frozenset(eos_token_ids)
        self._max_len = max_output_tokens
        self._len = 0
        # [tokens, beams]: by step, which beam each beam continued, and with which token. Touched as it is written.
        self._parents = np.empty((max_output_tokens, params.beam_width), np.int8)
        self._tokens = np.empty((max_output_tokens, params.beam_width), np.int32)
        self._ended: list[_Ended] = []  # best first

    @classmethod
    def for_request(cls, request: Request, eos_token_ids: tuple[int, ...]) -> BeamSearch:
        """The search of a request that asks for one, before its first step."""
        assert request.beam is not None
        return cls(request.beam, request.max_total_len - len(request.prompt_token_ids), eos_token_ids)

    def advance(
        self,
        parents: np.ndarray,
        tokens: np.ndarray,
        scores: np.ndarray,
        stop_tokens: np.ndarray,
        stop_scores: np.ndarray,
    ) -> bool:
        """Takes one step's beams in; returns whether the search is over.

        Args:
            parents: [k] which beam each beam continues.
            tokens: [k] with which token; never a stop token.
            scores: float32[k] sums of logprobs, descending.
            stop_tokens: [k, n] stop tokens with which the beams before this step could end, the likeliest first;
                as many as can stand among the k likeliest continuations.
            stop_scores: float32[k, n] the sums of logprobs with them; -inf where there is none.

        Cost: 3 us at width 8 where no stop token is likely, 23 us where two a beam are (one core of a Zen 4).
        """
        assert self._len < self._max_len, "the search is over"
        self._parents[self._len], self._tokens[self._len] = parents, tokens
        self._len += 1
        is_last = self._len == self._max_len
        if is_last or stop_scores[:, 0].max() >= scores[-1]:
            self._end_some(parents, tokens, scores, stop_tokens, stop_scores, is_last)
        return is_last or self._is_over(float(scores[0]))

    def _end_some(
        self,
        parents: np.ndarray,
        tokens: np.ndarray,
        scores: np.ndarray,
        stop_tokens: np.ndarray,
        stop_scores: np.ndarray,
        is_last: bool,
    ) -> None:
        """Of the k likeliest continuations, those that end become hypotheses: with a stop token, or by length.

        Equal sums rank by beam, then by token id.
        """
        width = self._params.beam_width
        beam, place = np.nonzero(stop_scores >= scores[-1])
        going = zip((-scores).tolist(), parents.tolist(), tokens.tolist(), [False] * width, strict=True)
        ending = zip(
            (-stop_scores[beam, place]).tolist(),
            beam.tolist(),
            stop_tokens[beam, place].tolist(),
            [True] * len(beam),
            strict=True,
        )
        penalty = self._len**self._params.length_penalty
        for loss, parent, token, is_stop in sorted([*going, *ending])[:width]:
            if is_stop or is_last:
                found = _Ended(-loss / penalty, -loss, self._len, parent, token, is_stop)
                insort(self._ended, found, key=lambda ended: -ended.score)
        del self._ended[width:]

    def _is_over(self, best_score: float) -> bool:
        """Whether no beam is expected to become better than the worst hypothesis."""
        params = self._params
        if len(self._ended) < params.beam_width:
            return False
        if params.early_stopping is True:
            return True
        # Dividing by a power of the length raises a negative sum where the penalty is above 0.
        at_best = self._max_len if params.early_stopping == "never" and params.length_penalty > 0 else self._len
        return best_score / at_best**params.length_penalty <= self._ended[-1].score

    def hypotheses(self) -> tuple[Hypothesis, ...]:
        """The hypotheses so far, the best first; beam_width of them when the search is over."""
        return tuple(self._hypothesis(ended) for ended in self._ended)

    def _hypothesis(self, ended: _Ended) -> Hypothesis:
        tokens, beam = [ended.token], ended.parent
        for step in range(ended.length - 2, -1, -1):
            tokens.append(int(self._tokens[step, beam]))
            beam = self._parents[step, beam]
        tokens.reverse()
        return Hypothesis(
            token_ids=tuple(tokens),
            cumulative_logprob=ended.cumulative_logprob,
            score=ended.score,
            reason="stop" if ended.is_stop else "length",
            stop_reason=ended.token if ended.is_stop and ended.token not in self._eos_token_ids else None,
        )
