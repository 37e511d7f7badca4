"""`EngineCore`: the step loop. Introduces the scheduler, who decides, to the runner, who computes.

One iteration: plan and commit step n + 1, dispatch it, then digest step n, which the device finished
meanwhile or is about to. Single-threaded; `async_engine` and `llm` drive it.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections import abc
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine.admission import AdmittedParams, admit
from jaxserve.engine.attention import try_attention
from jaxserve.engine.compiled import OnProgress, compile_counter, use_compilation_cache
from jaxserve.engine.generation import Gains, Generation, gains_of
from jaxserve.engine.resolve import resolve_engine_config
from jaxserve.engine.runner import Runner, RunningStep
from jaxserve.errors import EngineDeadError
from jaxserve.metrics import EngineMetrics
from jaxserve.models.params import are_in_panels, check_stacked
from jaxserve.parallel.mesh import bytes_on_each, first_device
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.policy import SchedulerLimits
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequences import Request
from jaxserve.state import PROMPT_LOGPROBS
from jaxserve.types import BeamSearchParams, Delta, EngineStats, FinishReason, SamplingParams

logger = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 3  # of the device; then the engine is declared dead
_STEP_WEIGHT = 0.25  # of the newest decode step in the moving average of what one takes
MAX_FRUITLESS_FAILURES = 20  # the same where steps go well in between, but none gives anybody a token


@dataclass(slots=True)
class _Pending:
    """A dispatched step.

    Attributes:
        prompt_logprobs: whose it carries: (generation, position, stream offset, length).
        searches: beam searches that begin with it.
    """

    running: RunningStep
    prompt_logprobs: list[tuple[Generation, int, int, int]] = field(default_factory=list)
    searches: list[Generation] = field(default_factory=list)


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
        cache = use_compilation_cache(config.compilation_cache_dir) if config.compilation_cache_dir else None
        device = first_device(params, config.tensor_parallel_size)
        check_stacked(params, model, config.stacked_layers)
        self.model, self.config = model, config
        weight_bytes, panels = bytes_on_each(params), are_in_panels(params)
        limits = resolve_engine_config(config, model, weight_bytes=weight_bytes, device=device, panels=panels)
        self.limits = limits = try_attention(limits, config, model)
        self.runner = Runner(
            params, model, limits, verify_swaps=config.verify_swaps, on_progress=on_progress, cache=cache
        )
        self.metrics = EngineMetrics(
            max_model_len=limits.max_model_len,
            cache_info={
                "block_size": str(limits.block_size),
                "num_gpu_blocks": str(limits.num_blocks - 1),
                "cache_dtype": limits.kv_dtype,
            },
            swapped_out=self.runner.store.out,
            swapped_in=self.runner.store.back,
        )
        for name, seconds in self.runner.compiled.compile_s.items():
            self.metrics.on_compiled(name, seconds)
        self.scheduler = self._make_scheduler()
        self._num_checked = itertools.count()
        self._generations: dict[str, Generation] = {}
        self._committed: StepPlan | None = None  # and not dispatched
        self._pending: _Pending | None = None
        self._num_steps = self._num_failures = self._num_fruitless = 0
        self._decode_step_s = 0.0  # of late; 0 before the first
        self._busy_since = self._last_answer_s = time.monotonic()
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
                num_swap_blocks=limits.num_swap_blocks,
                enable_prefix_caching=self.config.enable_prefix_caching,
                costs=self.runner.costs,
            )
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._pending is not None

    @property
    def open_requests(self) -> abc.KeysView[str]:
        """Ids of the requests that are in line, run or are swapped out."""
        return self._generations.keys()

    def check(
        self, token_ids: abc.Sequence[int], params: SamplingParams | BeamSearchParams, cache_salt: str | None = None
    ) -> AdmittedParams:
        """The request as it would be admitted. Any thread may ask.

        Raises:
            RequestError: it can never be served.
        """
        return admit(token_ids, params, self.model, self.limits, self._draw_seed(), cache_salt)

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
        self.scheduler.add(
            Request(
                request_id,
                admitted.prompt,
                admitted.max_total_len,
                stop_token_ids=admitted.stop_ids,
                min_tokens=admitted.sampling.min_tokens,
                payload=generation,
                num_sequences=admitted.params.num_sequences,
                beam=admitted.beam,
                cache_salt=admitted.cache_salt,
                reads_cache=admitted.sampling.prompt_logprobs is None,
            )
        )
        self._generations[request_id] = generation

    def abort(self, request_id: str, reason: FinishReason = "abort") -> Any | None:
        """Ends a request in any state and frees what it holds; returns its owner, None if it is not here.

        Args:
            reason: what the metrics count: "stop" where the caller found a stop string in the text.
        """
        request = self.scheduler.abort(request_id)
        return None if request is None else self._end(request.payload, reason, time.monotonic())

    def abort_sequence(self, request_id: str, index: int, reason: FinishReason = "abort") -> Any | None:
        """Ends one of a request's continuations; returns the request's owner, None if there is no such one.

        Args:
            reason: what the metrics count if it was the request's last.
        """
        ended = self.scheduler.abort_sequence(request_id, index)
        if ended is None:
            return None
        (sequence, is_last), now = ended, time.monotonic()
        generation: Generation = sequence.request.payload
        return self._end(generation, reason, now) if is_last else generation.owner

    def refuse(self, request_id: str, reason: str) -> Any | None:
        """Takes a request that has had no step back out of the queue; returns its owner, None if it is not here.

        Args:
            reason: by which the metrics count it among the refused ones, not among those that ended.
        """
        request = self.scheduler.abort(request_id)
        if request is None:
            return None
        self.metrics.on_rejected(reason)
        return self._generations.pop(request_id).owner

    def _end(self, generation: Generation, reason: FinishReason, now: float) -> Any:
        """Counts a request that has left the scheduler; returns its owner."""
        del self._generations[generation.request_id]
        generation.report(self.metrics, reason, now)
        return generation.owner

    def reset_prefix_cache(self) -> int:
        """Forgets the KV of past prompts and outputs; returns how many blocks of it there were."""
        return self.scheduler.reset_prefix_cache()

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
        if deltas:
            self._num_fruitless = 0
        return deltas

    def _step(self) -> list[tuple[Any, Delta]]:
        self.wait_for_loop()
        before, self._pending = self._pending, None
        decision = self.scheduler.plan(self._num_steps_ahead())
        if not decision.is_empty:
            self._committed = self.scheduler.commit(decision)
            self._pending = self._dispatch(self._committed)
            self._committed = None
        deltas = self._digest(before) if before else []
        if self._pending and not self.config.async_scheduling:
            after, self._pending = self._pending, None
            deltas += self._digest(after)
        return deltas

    def wait_for_loop(self) -> None:
        """Returns when the loop of several decode steps that the device may be in has ended.

        Who arrives meanwhile gets into the next plan, and so waits for one loop at most. Any other step is short
        enough to plan the next one while it runs.
        """
        if self._pending is not None and self._pending.running.plan.num_steps > 1:
            self.runner.wait(self._pending.running)

    def _num_steps_ahead(self) -> int:
        """Decode steps that fit the time after which readers want to see tokens, by what the latest ones took."""
        step_s, interval_s = self._decode_step_s, 1e-3 * self.config.stream_interval_ms
        if not step_s:
            return 1
        return int(min(max(interval_s / step_s, 1), self.runner.compiled.max_decode_steps))

    def _dispatch(self, plan: StepPlan) -> _Pending:
        sequences = self.scheduler.sequences
        if plan.admitted or plan.preempted:
            self._note_moves(plan)
        pending = _Pending(self.runner.run(plan, sequences))
        for group in plan.beam_groups:
            pending.searches.append(sequences.at(group[0]).request.payload)
        offset = len(plan.decode_rows)
        for row, start, length in zip(
            plan.prefill_rows.tolist(), plan.prefill_starts.tolist(), plan.prefill_lens.tolist(), strict=True
        ):
            generation: Generation = sequences.at(row).request.payload
            if generation.prompt_logprobs is not None:
                pending.prompt_logprobs.append((generation, start, offset, length))
            offset += length
        return pending

    def _note_moves(self, plan: StepPlan) -> None:
        """Tells the device of new rows, and notes who came and who gave way."""
        now, sequences, counters = time.monotonic(), self.scheduler.sequences, self.scheduler.counters
        for gone in plan.preempted:
            self._generations[gone.request_id].num_preemptions += 1
            self.metrics.preemptions_by_means["swap" if gone.swapped else "recompute"] += 1
        self.metrics.swap_space_full = counters.host_full
        for admitted in plan.admitted:
            sequence = sequences.at(admitted.row)
            generation: Generation = sequence.request.payload
            params = generation.admitted
            # Of prompt logprobs nothing is left to do where they were delivered, or no token but the last is fed.
            served = generation.prompt_logprobs is None or admitted.num_stored >= params.num_prompt - 1
            features = params.features & ~PROMPT_LOGPROBS if served else params.features
            known = sequences.known_token_ids(admitted.row)
            self.runner.admit(admitted, params, known, index=sequence.index, features=features)
            if generation.scheduled_s is None:
                generation.scheduled_s = now
            if sequence.index == 0:
                generation.num_cached_tokens = max(sequence.num_cached_tokens, 0)
        seen = self.metrics
        seen.on_prefix_lookup(counters.prefix_queries - seen.prefix_queries, counters.prefix_hits - seen.prefix_hits)

    def _digest(self, pending: _Pending) -> list[tuple[Any, Delta]]:
        plan = pending.running.plan
        answer = self.runner.fetch(pending.running)
        now = time.monotonic()
        for generation, start, offset, length in pending.prompt_logprobs:
            generation.collect_prompt_logprobs(start, offset, length, answer)
        tokens = answer.tokens
        assert not tokens.size or 0 <= tokens.min() <= tokens.max() < self.model.vocab_size
        failed = answer.failed if answer.failed.any() else None
        if plan.num_steps > 1:
            steps = self.scheduler.digest_loop(plan, tokens, failed)
        else:
            steps = (self.scheduler.digest(plan, tokens[0], None if failed is None else failed[0], answer.beams),)
        for generation in pending.searches:
            generation.first_token_s = now
        gains = gains_of(steps, answer, now)
        for generation, reason in gains.ended:
            self._end(generation, reason, now)
        self._num_steps += len(steps)
        if not plan.is_empty:
            self._count_step(pending.running, gains, len(steps))
            self._last_answer_s = now
        return gains.deltas

    def _count_step(self, running: RunningStep, gains: Gains, num_steps: int) -> None:
        num_prefill = int(running.plan.prefill_lens.sum())
        if not num_prefill:
            begin_s = max(running.dispatched_s, self._last_answer_s)  # the device took the one before first
            step_s = (gains.now - begin_s) / num_steps
            self._decode_step_s += _STEP_WEIGHT * (step_s - self._decode_step_s) if self._decode_step_s else step_s
        self.metrics.on_step(
            kind="decode" if not num_prefill else "mixed" if len(running.plan.decode_rows) else "prefill",
            step_s=gains.now - running.dispatched_s,
            num_prompt_tokens=num_prefill,
            num_generation_tokens=gains.num_tokens,
            inter_token_s=np.asarray(gains.inter_token_s),
            ttft_s=np.asarray(gains.ttft_s),
        )

    def _recover(self, error: Exception) -> None:
        """A failed step took the donated cache with it. The host has every token id: all are computed again.

        But for those in host memory whose blocks had arrived there.
        """
        self._num_failures += 1
        self._num_fruitless += 1
        logger.exception("step failed (%d in a row); rebuilding the KV cache", self._num_failures, exc_info=error)
        self._pending = None
        if self._num_failures >= MAX_FAILURES_IN_A_ROW:
            raise EngineDeadError(f"The device failed {self._num_failures} steps in a row.") from error
        if self._num_fruitless >= MAX_FRUITLESS_FAILURES:
            raise EngineDeadError(f"The device failed {self._num_fruitless} steps without a token between.") from error
        lost = self.runner.store.lose_pending()
        if self._committed is not None:
            lost, self._committed = np.concatenate([lost, self._committed.swap_out_slots]), None
        self.scheduler.requeue_running(lost)
        self.runner.reset()

    def stats(self) -> EngineStats:
        scheduler, memory, now = self.scheduler, self.scheduler.memory, time.monotonic()
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=self.limits.num_blocks - 1,
            num_free_blocks=scheduler.num_free_blocks,
            num_cached_blocks=memory.pool.num_kept_free,
            num_swapped_blocks=memory.host.num_used,
            num_swap_blocks=memory.host.num_slots,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_compilations_after_ready=self._compilations.count - self._compilations_at_ready,
            last_commit_age_s=now - max(self._busy_since, self._last_answer_s) if self.has_work else 0.0,
        )
