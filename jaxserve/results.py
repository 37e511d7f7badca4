"""One prompt's result while it grows: from the engine's deltas to what `LLM` returns.

Owns how continuations are collected, ranked and numbered. Must not know the engine: whoever reads the deltas
tells it which continuations a stop string has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jaxserve.text.assembler import Continuations, TextDelta
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import (
    BeamSearchOutput,
    BeamSearchParams,
    BeamSearchSequence,
    CompletionOutput,
    Delta,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)


def ranked_params(params: SamplingParams) -> SamplingParams:
    """What the engine is asked: with the tokens' logprobs where the best are to be found among more than n.

    A stop string may end a continuation before its last tokens, which must not count: so each token's is needed.
    """
    return replace(params, logprobs=0) if params.num_sequences > params.n and params.logprobs is None else params


def likeliest(logprob_sums: Sequence[float], num_tokens: Sequence[int], n: int) -> list[int]:
    """The indices of the n continuations with the highest logprob a token, best first; of equals the earlier."""
    means = [total / count if count else -float("inf") for total, count in zip(logprob_sums, num_tokens, strict=True)]
    return sorted(range(len(means)), key=lambda i: -means[i])[:n]


@dataclass(slots=True, eq=False)
class _Draft:
    """One continuation while it grows. `last` is its newest gain, `beam` its delta where it is a hypothesis."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    last: TextDelta | None = None
    beam: Delta | None = None

    def add(self, gain: TextDelta) -> None:
        self.text.append(gain.text)
        self.token_ids.extend(gain.token_ids)
        self.logprobs.extend(gain.logprobs or ())
        self.last = gain

    @property
    def logprob_sum(self) -> float:
        return sum(entry.logprob for entry in self.logprobs)


class Collected:
    """One prompt's result while it grows; the owner of its request in the engine.

    Attributes:
        place: the prompt's, among all.
    """

    def __init__(
        self,
        place: int,
        request_id: str,
        prompt: str | None,
        token_ids: Sequence[int],
        params: SamplingParams | BeamSearchParams,
        tokenizer: Tokenizer,
    ) -> None:
        self.place = place
        self.request_id = request_id
        self.params = params
        self._prompt, self._token_ids = prompt, tuple(token_ids)
        self._texts = Continuations(tokenizer, params, token_ids)
        self._drafts = [_Draft() for _ in range(params.num_sequences)]
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self._num_cached_tokens = 0

    @property
    def finished(self) -> bool:
        return self._texts.finished

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Of all continuations, those that are not returned included."""
        return sum(len(draft.token_ids) for draft in self._drafts)

    def push(self, delta: Delta) -> list[int]:
        """Adds a delta; returns the continuations that a stop string ended with it."""
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
        self._num_cached_tokens = max(self._num_cached_tokens, delta.num_cached_tokens)
        parts = self._texts.push(delta)
        for part in parts:
            self._drafts[part.index].add(part.gain)
        if delta.score is not None:
            self._drafts[delta.index].beam = delta
        return [part.index for part in parts if part.cut]

    def request_output(self) -> RequestOutput:
        """The result of a request that sampled: n continuations, by index, or of best_of the best first."""
        params, drafts = self.params, self._drafts
        assert isinstance(params, SamplingParams)
        if params.num_sequences > params.n:
            sums = [draft.logprob_sum for draft in drafts]
            best = likeliest(sums, [len(draft.token_ids) for draft in drafts], params.n)
            drafts = [drafts[i] for i in best]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._token_ids,
            outputs=tuple(_completion(index, draft, params) for index, draft in enumerate(drafts)),
            finished=True,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
        )

    def beam_output(self) -> BeamSearchOutput:
        """The result of a beam search: its hypotheses, the best first; none if it failed."""
        found = [draft for draft in self._drafts if draft.beam is not None]
        return BeamSearchOutput(self._prompt, self._token_ids, tuple(_hypothesis(draft) for draft in found))


def _completion(index: int, draft: _Draft, params: SamplingParams) -> CompletionOutput:
    assert draft.last is not None
    is_scored = params.logprobs is not None or params.num_sequences > params.n
    return CompletionOutput(
        index=index,
        text="".join(draft.text),
        token_ids=tuple(draft.token_ids),
        cumulative_logprob=draft.logprob_sum if is_scored else None,
        logprobs=tuple(draft.logprobs) if params.logprobs is not None else None,
        finish_reason=draft.last.finish_reason,
        stop_reason=draft.last.stop_reason,
    )


def _hypothesis(draft: _Draft) -> BeamSearchSequence:
    beam = draft.beam
    assert beam is not None
    assert beam.cumulative_logprob is not None
    assert beam.score is not None
    assert beam.finish_reason is not None
    return BeamSearchSequence(
        token_ids=beam.token_ids,
        text="".join(draft.text),
        cum_logprob=beam.cumulative_logprob,
        score=beam.score,
        finish_reason=beam.finish_reason,
        stop_reason=beam.stop_reason,
    )
