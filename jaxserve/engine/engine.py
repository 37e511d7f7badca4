"""`EngineCore`: the step loop. Introduces the scheduler, who decides, to the runner, who computes.

One iteration: plan and commit step n + 1, dispatch it, then digest step n, which the device finished
meanwhile or is about to. Single-threaded; `async_engine` and `llm` drive it.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine.admission import AdmittedParams, admit
from jaxserve.engine.compiled import OnProgress, compile_counter, use_compilation_cache
from jaxserve.engine.resolve import resolve_engine_config
from jaxserve.engine.runner import Runner, RunningStep, StepAnswer
from jaxserve.errors import EngineDeadError, NumericalError
from jaxserve.metrics import EngineMetrics
from jaxserve.ops.logprobs import unpack_logprobs
from jaxserve.scheduler.finish import FINISH_REASONS, StepEvents
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.policy import SchedulerLimits
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequences import Request
from jaxserve.state import tree_device_bytes
from jaxserve.types import Delta, EngineStats, FinishReason, SamplingParams, TokenLogprobs

logger = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 3  # of the device; then the engine is declared dead


@dataclass(slots=True, eq=False)
class Generation:
    """A request on its way through the engine: the payload of its scheduler `Request`.

    Attributes:
        owner: whoever asked; carried, never read.
        prompt_logprobs: filled in chunk by chunk, delivered with the first token; None if not asked.
    """

    request_id: str
    admitted: AdmittedParams
    owner: Any
    arrival_s: float
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_output: int = 0
    num_preemptions: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclass(slots=True)
class _Pending:
    """A dispatched step and whose prompt logprobs it carries: (generation, position, stream offset, length)."""

    running: RunningStep
    prompt_logprobs: list[tuple[Generation, int, int, int]] = field(default_factory=list)


class EngineCore:
    """The engine without threads: add requests, call `step` while `has_work`.

    Attributes:
        model, limits: what is served, in which sizes.
        metrics: what has happened since start.
        init_s: seconds that construction took, compilation included.
    """

    def __init__(
        self, model: ModelConfig, params: Any, config: EngineConfig, *, on_progress: OnProgress | None = None
    ) -> None:
        begin = time.monotonic()
        if config.compilation_cache_dir:
            use_compilation_cache(config.compilation_cache_dir)
        weight_bytes = tree_device_bytes(params)
        self.model, self.config = model, config
        self.limits = limits = resolve_engine_config(config, model, weight_bytes=weight_bytes)
        self.runner = Runner(params, model, limits, on_progress=on_progress)
        self.metrics = EngineMetrics(
            max_model_len=limits.max_model_len,
            cache_info={
                "block_size": str(limits.block_size),
                "num_gpu_blocks": str(limits.num_blocks - 1),
                "cache_dtype": limits.kv_dtype,
            },
        )
        for name, seconds in self.runner.compiled.compile_s.items():
            self.metrics.on_compiled(name, seconds)
        self.scheduler = self._make_scheduler()
        self._num_checked = itertools.count()
        self._pending: _Pending | None = None
        self._num_steps = self._num_failures = 0
        self._busy_since = self._last_token_s = time.monotonic()
        self._compilations = compile_counter()
        self._compilations_at_ready = self._compilations.count
        self.init_s = time.monotonic() - begin

    def _make_scheduler(self) -> Scheduler:
        limits = self.limits
        return Scheduler(
            SchedulerLimits(
                num_blocks=limits.num_blocks,
                block_size=limits.block_size,
                max_num_seqs=limits.max_num_seqs,
                max_model_len=limits.max_model_len,
                max_num_batched_tokens=limits.max_num_batched_tokens,
                max_num_queued_reqs=limits.max_num_queued_reqs,
                eos_token_ids=self.model.eos_token_ids,
            )
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._pending is not None

    def check(self, token_ids: Sequence[int], params: SamplingParams) -> AdmittedParams:
        """The request as it would be admitted. Any thread may ask.

        Raises:
            RequestError: it can never be served.
        """
        return admit(token_ids, params, self.model, self.limits, self._draw_seed())

    def _draw_seed(self) -> int:
        """A seed for a request that brings none, from the engine's seed and how many were checked before.

        From any thread: `next` of a counter is atomic, a numpy Generator is not.
        """
        digest = hashlib.sha256(f"{self.config.seed} {next(self._num_checked)}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)

    def add(self, request_id: str, admitted: AdmittedParams, owner: Any, arrival_s: float | None = None) -> None:
        """Puts a checked request in line.

        Args:
            owner: handed back with each of its deltas.

        Raises:
            KVBudgetError: the pool can never hold it.
            QueueFullError: too many wait.
        """
        if not self.has_work:
            self._busy_since = time.monotonic()
        generation = Generation(request_id, admitted, owner, time.monotonic() if arrival_s is None else arrival_s)
        if admitted.params.prompt_logprobs is not None:
            generation.prompt_logprobs = [None for _ in range(admitted.num_prompt)]
        self.scheduler.add(
            Request(
                request_id,
                admitted.prompt,
                admitted.max_total_len,
                stop_token_ids=admitted.stop_ids,
                min_tokens=admitted.params.min_tokens,
                payload=generation,
            )
        )

    def abort(self, request_id: str, reason: FinishReason = "abort") -> Any | None:
        """Ends a request in any state and frees what it holds; returns its owner, None if it is not here.

        Args:
            reason: what the metrics count: "stop" where the caller found a stop string in the text.
        """
        request = self.scheduler.abort(request_id)
        if request is None:
            return None
        self._finish_metrics(request.payload, reason, time.monotonic())
        return request.payload.owner

    def waiting_since(self, deadline_s: float) -> list[str]:
        """Ids of requests that arrived before `deadline_s` (`time.monotonic`) and had no step yet.

        Cost: a look at the head of the queue, which is in order of arrival.
        """
        late = []
        for sequence in self.scheduler.waiting:
            generation: Generation = sequence.request.payload
            if generation.arrival_s >= deadline_s:
                break
            if generation.scheduled_s is None:  # a preempted one has been served and stays
                late.append(generation.request_id)
        return late

    def step(self) -> list[tuple[Any, Delta]]:
        """One iteration; returns what each owner gained.

        Raises:
            EngineDeadError: the device failed several times in a row.
        """
        try:
            deltas = self._step()
        except Exception as error:  # any fault of the device or runtime: its classes are many and not public
            self._recover(error)
            return []
        self._num_failures = 0
        return deltas

    def _step(self) -> list[tuple[Any, Delta]]:
        before, self._pending = self._pending, None
        plan = self.scheduler.plan()
        if not plan.is_empty:
            self.scheduler.commit(plan)
            self._pending = self._dispatch(plan)
        deltas = self._digest(before) if before else []
        if self._pending and not self.config.async_scheduling:
            after, self._pending = self._pending, None
            deltas += self._digest(after)
        return deltas

    def _dispatch(self, plan: StepPlan) -> _Pending:
        sequences = self.scheduler.sequences
        now = time.monotonic()
        for row in plan.admitted:
            request: Request = sequences.requests[row]  # type: ignore[assignment]
            generation: Generation = request.payload
            self.runner.admit(row, generation.admitted, sequences.known_token_ids(row))
            if generation.scheduled_s is None:
                generation.scheduled_s = now
            generation.num_preemptions = int(sequences.num_preemptions[row])
        pending = _Pending(self.runner.run(plan, sequences))
        offset = len(plan.decode_rows)
        for row, start, length in zip(
            plan.prefill_rows.tolist(), plan.prefill_starts.tolist(), plan.prefill_lens.tolist(), strict=True
        ):
            prefilled: Request = sequences.requests[row]  # type: ignore[assignment]
            generation = prefilled.payload
            if generation.prompt_logprobs is not None:
                pending.prompt_logprobs.append((generation, start, offset, length))
            offset += length
        return pending

    def _digest(self, pending: _Pending) -> list[tuple[Any, Delta]]:
        plan = pending.running.plan
        answer = self.runner.fetch(pending.running)
        now = time.monotonic()
        for entry in pending.prompt_logprobs:
            self._collect_prompt_logprobs(*entry, answer)
        assert not len(answer.tokens) or 0 <= answer.tokens.min() <= answer.tokens.max() < self.model.vocab_size
        failed = answer.failed if answer.failed.any() else None
        events = self.scheduler.digest(plan, answer.tokens, failed)
        deltas, inter_token, ttft = self._deltas(events, answer, now)
        self._num_steps += 1
        if deltas:
            self._last_token_s = now
        num_prefill = int(plan.prefill_lens.sum())
        kind = "decode" if not num_prefill else "mixed" if len(plan.decode_rows) else "prefill"
        self.metrics.on_step(
            kind=kind,
            step_s=now - pending.running.dispatched_s,
            num_prompt_tokens=num_prefill,
            num_generation_tokens=len(deltas),
            inter_token_s=np.asarray(inter_token),
            ttft_s=np.asarray(ttft),
        )
        return deltas

    def _deltas(
        self, events: StepEvents, answer: StepAnswer, now: float
    ) -> tuple[list[tuple[Any, Delta]], list[float], list[float]]:
        """Each live row's delta; seconds since the last token, or since arrival for first ones."""
        stop_reasons = {item.index: item.stop_reason for item in events.finished}
        deltas, inter_token, ttft = [], [], []
        for index, (token, code, request, live) in enumerate(
            zip(
                events.tokens.tolist(),
                events.finish_codes.tolist(),
                events.requests.tolist(),
                events.live.tolist(),
                strict=True,
            )
        ):
            if not live:
                continue
            generation: Generation = request.payload
            reason = FINISH_REASONS[code]
            if reason == "error":
                error = NumericalError("The model's logits were not finite.")
                deltas.append((generation.owner, Delta(finish_reason="error", error=error)))
                self._finish_metrics(generation, "error", now)
                continue
            prompt_logprobs = None
            if generation.first_token_s is None:
                generation.first_token_s = now
                ttft.append(now - generation.arrival_s)
                if generation.prompt_logprobs is not None:
                    prompt_logprobs, generation.prompt_logprobs = tuple(generation.prompt_logprobs), None
            else:
                assert generation.last_token_s is not None
                inter_token.append(now - generation.last_token_s)
            generation.last_token_s = now
            generation.num_output += 1
            num_top = generation.admitted.params.logprobs
            logprobs = None
            if num_top is not None:
                assert answer.logprobs is not None
                logprobs = (unpack_logprobs(answer.logprobs[index], token, num_top),)
            delta = Delta((token,), logprobs, prompt_logprobs, reason, stop_reasons.get(index))
            deltas.append((generation.owner, delta))
            if reason is not None:
                self._finish_metrics(generation, reason, now)
        return deltas, inter_token, ttft

    def _collect_prompt_logprobs(
        self, generation: Generation, start: int, offset: int, length: int, answer: StepAnswer
    ) -> None:
        """Files a chunk's rows: the row of position p speaks of the prompt token at p + 1."""
        collected, num_top = generation.prompt_logprobs, generation.admitted.params.prompt_logprobs
        if collected is None or answer.prompt_logprobs is None or num_top is None:
            return
        prompt = generation.admitted.prompt
        for i in range(min(length, len(collected) - 1 - start)):
            token = int(prompt[start + i + 1])
            collected[start + i + 1] = unpack_logprobs(answer.prompt_logprobs[offset + i], token, num_top)

    def _finish_metrics(self, generation: Generation, reason: FinishReason, now: float) -> None:
        first, scheduled, last = generation.first_token_s, generation.scheduled_s, generation.last_token_s
        self.metrics.on_finished(
            reason=reason,
            num_prompt_tokens=generation.admitted.num_prompt,
            num_generation_tokens=generation.num_output,
            num_preemptions=generation.num_preemptions,
            max_tokens=generation.admitted.params.max_tokens,
            queue_s=(now if scheduled is None else scheduled) - generation.arrival_s,
            prefill_s=None if first is None or scheduled is None else first - scheduled,
            decode_s=None if first is None or last is None else last - first,
            e2e_s=now - generation.arrival_s,
        )

    def _recover(self, error: Exception) -> None:
        """A failed step took the donated cache with it. The host has every token id: all are computed again."""
        self._num_failures += 1
        logger.exception("step failed (%d in a row); rebuilding the KV cache", self._num_failures, exc_info=error)
        self._pending = None
        if self._num_failures >= MAX_FAILURES_IN_A_ROW:
            raise EngineDeadError(f"The device failed {self._num_failures} steps in a row.") from error
        self.scheduler.requeue_running()
        self.runner.reset()

    def stats(self) -> EngineStats:
        scheduler, now = self.scheduler, time.monotonic()
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=self.limits.num_blocks - 1,
            num_free_blocks=scheduler.num_free_blocks,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_compilations_after_ready=self._compilations.count - self._compilations_at_ready,
            last_commit_age_s=now - max(self._busy_since, self._last_token_s) if self.has_work else 0.0,
        )
