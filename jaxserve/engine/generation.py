"""`Generation`: a request on its way through the engine; and `Gains`: what a step gave to whom.

Owns how a step's events become deltas, and what is timed of each request. It dispatches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxserve.engine.admission import AdmittedParams
from jaxserve.engine.runner import StepAnswer
from jaxserve.errors import NumericalError
from jaxserve.metrics import EngineMetrics
from jaxserve.ops.logprobs import unpack_logprobs
from jaxserve.scheduler.finish import Finished, Hypothesis, StepEvents
from jaxserve.types import Delta, FinishReason, SamplingParams, TokenLogprobs


@dataclass(slots=True, eq=False)
class Continuation:
    """What one sequence of a request has had so far. Times are of `time.monotonic`."""

    num_output: int = 0
    last_token_s: float = 0.0
    logprob_sum: float = 0.0


@dataclass(slots=True, eq=False)
class Generation:
    """A request on its way through the engine: the payload of its scheduler `Request`.

    Attributes:
        owner: whoever asked; carried, never read.
        continuations: one a sequence.
        first_token_s: when its first token came; of a beam search, when its first step was answered.
        num_preemptions: of all its sequences.
        num_cached_tokens: prompt tokens whose KV came from a cache.
        prompt_logprobs: filled in chunk by chunk, delivered with the first token; None if not asked, and after.
    """

    request_id: str
    admitted: AdmittedParams
    owner: Any
    arrival_s: float
    continuations: list[Continuation] = field(init=False)
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = field(init=False)

    def __post_init__(self) -> None:
        asked = self.admitted.sampling.prompt_logprobs is not None
        self.prompt_logprobs = [None for _ in range(self.admitted.num_prompt)] if asked else None
        self.continuations = [Continuation() for _ in self.admitted.seeds]

    def collect_prompt_logprobs(self, start: int, offset: int, length: int, answer: StepAnswer) -> None:
        """Files a chunk's rows: the row of position p speaks of the prompt token at p + 1.

        Args:
            start: the chunk's first position.
            offset: where in the step's stream the chunk begins.
        """
        collected, num_top = self.prompt_logprobs, self.admitted.sampling.prompt_logprobs
        if collected is None or answer.prompt_logprobs is None or num_top is None:
            return
        for i in range(min(length, len(collected) - 1 - start)):
            token = int(self.admitted.prompt[start + i + 1])
            collected[start + i + 1] = unpack_logprobs(answer.prompt_logprobs[offset + i], token, num_top)

    def take_prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        """The prompt's logprobs, once."""
        taken, self.prompt_logprobs = self.prompt_logprobs, None
        return None if taken is None else tuple(taken)

    def report(self, metrics: EngineMetrics, reason: FinishReason, now: float) -> None:
        """Tells the metrics of its end."""
        first, scheduled, last = self.first_token_s, self.scheduled_s, self.last_token_s
        params, counts = self.admitted.params, [c.num_output for c in self.continuations]
        metrics.on_finished(
            reason=reason,
            num_prompt_tokens=self.admitted.num_prompt,
            num_generation_tokens=sum(counts),
            num_longest_tokens=max(counts) if len(counts) > 1 else None,
            num_cached_tokens=self.num_cached_tokens,
            num_preemptions=self.num_preemptions,
            max_tokens=params.max_tokens,
            n=params.n if isinstance(params, SamplingParams) else params.beam_width,
            queue_s=(now if scheduled is None else scheduled) - self.arrival_s,
            prefill_s=None if first is None or scheduled is None else first - scheduled,
            decode_s=None if first is None or last is None else last - first,
            e2e_s=now - self.arrival_s,
        )


@dataclass(slots=True, eq=False)
class Gains:
    """What a step gave to whom.

    Attributes:
        now: when the step's answer was there, of `time.monotonic`.
        deltas: with their requests' owners.
        inter_token_s: seconds since the sequence's last token, of those that had one.
        ttft_s: seconds since the request's arrival, of those that got their first token.
        num_tokens: in the deltas.
        ended: requests that ended, and how the last of their sequences did.
    """

    now: float
    deltas: list[tuple[Any, Delta]] = field(default_factory=list)
    inter_token_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    ended: list[tuple[Generation, FinishReason]] = field(default_factory=list)

    def fail(self, generation: Generation) -> None:
        """One delta ends all of the request."""
        error = NumericalError("The model's logits were not finite.")
        self.deltas.append((generation.owner, Delta(finish_reason="error", error=error)))
        self.ended.append((generation, "error"))

    def add_tokens(
        self,
        generation: Generation,
        index: int,
        tokens: tuple[int, ...],
        columns: np.ndarray | None,
        ending: Finished | None,
    ) -> None:
        """One sequence's new tokens, as one delta.

        Args:
            index: which of the request's sequences.
            tokens: at least one.
            columns: int32[len(tokens), 42] their logprobs (`ops.logprobs`), if the step has any.
            ending: how the sequence ended with the last of them, if it did.
        """
        num_cached, prompt_logprobs, num_new = 0, None, len(tokens)
        continuation, sampling = generation.continuations[index], generation.admitted.sampling
        if generation.first_token_s is None:
            generation.first_token_s = self.now
            self.ttft_s.append(self.now - generation.arrival_s)
            num_cached, prompt_logprobs = generation.num_cached_tokens, generation.take_prompt_logprobs()
        elif continuation.num_output:
            self.inter_token_s += [(self.now - continuation.last_token_s) / num_new] * num_new
        generation.last_token_s = continuation.last_token_s = self.now
        continuation.num_output += num_new
        self.num_tokens += num_new
        logprobs = logprob_sum = None
        if generation.admitted.is_scored:
            assert columns is not None
            num_top = sampling.logprobs or 0
            entries = tuple(unpack_logprobs(row, token, num_top) for row, token in zip(columns, tokens, strict=True))
            for entry in entries:
                continuation.logprob_sum += entry.logprob
            logprobs = entries if sampling.logprobs is not None else None
            logprob_sum = None if ending is None else continuation.logprob_sum
        delta = Delta(
            tokens,
            logprobs,
            prompt_logprobs,
            None if ending is None else ending.reason,
            None if ending is None else ending.stop_reason,
            num_cached,
            None,
            index,
            logprob_sum,
        )
        self.deltas.append((generation.owner, delta))
        if ending is not None and ending.is_last:
            self.ended.append((generation, ending.reason))

    def add_hypotheses(self, generation: Generation, hypotheses: tuple[Hypothesis, ...]) -> None:
        """A beam search's result, the best first."""
        self.ttft_s.append(self.now - generation.arrival_s)
        generation.last_token_s = self.now
        for index, found in enumerate(hypotheses):
            delta = Delta(
                token_ids=found.token_ids,
                finish_reason=found.reason,
                stop_reason=found.stop_reason,
                num_cached_tokens=0 if index else generation.num_cached_tokens,
                index=index,
                cumulative_logprob=found.cumulative_logprob,
                score=found.score,
            )
            self.deltas.append((generation.owner, delta))
            generation.continuations[index].num_output = len(found.token_ids)
            self.num_tokens += len(found.token_ids)
        self.ended.append((generation, hypotheses[-1].reason))


def gains_of(steps: Sequence[StepEvents], answer: StepAnswer, now: float) -> Gains:
    """The deltas of a digested plan, and what is to be counted of it.

    Args:
        steps: the events of each of its steps; a row is live in the first so many.

    Cost: 4 us a row.
    """
    gains = Gains(now)
    endings = {ending.index: ending for events in steps for ending in events.finished}
    failed = {ending.sequence.request for ending in endings.values() if ending.reason == "error"}
    for request in failed:
        gains.fail(request.payload)
    first = steps[0]
    counts = first.live if len(steps) == 1 else np.sum([events.live for events in steps], axis=0)
    rows = zip(answer.tokens.T.tolist(), first.sequences.tolist(), counts.tolist(), strict=True)
    for place, (tokens, sequence, count) in enumerate(rows):
        if count and sequence.request not in failed:  # siblings of one that failed end with it
            columns = None if answer.logprobs is None else answer.logprobs[:count, place]
            made = tuple(tokens[:count])
            gains.add_tokens(sequence.request.payload, sequence.index, made, columns, endings.get(place))
    for request, hypotheses in first.beams:
        gains.add_hypotheses(request.payload, hypotheses)
    return gains
