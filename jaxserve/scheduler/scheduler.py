"""`Scheduler`: the host's half of the engine. Add requests; then, step by step, plan, commit, digest.

Owns the tables and is the only one that changes them. It knows no device, no clock, no text and no thread.
One step ahead, a plan is committed before the answer to the one before it is digested:

    plan n+1 · commit n+1 · (device runs n+1) · digest n · plan n+2 · …

A sequence that ends in digest n may stand in plan n+1 already. Its row and blocks are free at once all the
same: whoever gets them does so in plan n+2, which the device runs after n+1, and the row's generation, moved
on, makes digest n+1 drop its token.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from jaxserve.cache.block_table import BlockTable
from jaxserve.cache.blocks import BlockPool, blocks_for
from jaxserve.errors import KVBudgetError, QueueFullError
from jaxserve.scheduler import finish, planner, policy
from jaxserve.scheduler.finish import StepEvents
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.policy import SchedulerLimits
from jaxserve.scheduler.sequences import Request, Sequence, SequenceTable, WaitingQueue
from jaxserve.types import MAX_STOP_TOKEN_IDS


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A committed plan whose answer is due: one entry a sampled row."""

    plan: StepPlan
    rows: np.ndarray
    positions: np.ndarray
    generations: np.ndarray
    requests: np.ndarray


class Scheduler:
    """Continuous batching over paged KV, first come first served.

    Attributes:
        limits: the bounds it works in.
        sequences, block_table, pool, waiting: the tables; others may read them.
        num_preemptions: since start.
    """

    def __init__(self, limits: SchedulerLimits):
        self.limits = limits
        self.sequences = SequenceTable(limits.max_num_seqs, limits.max_model_len)
        self.block_table = BlockTable(limits.max_num_seqs, limits.max_blocks_per_row)
        self.pool = BlockPool(limits.num_blocks)
        self.waiting = WaitingQueue()
        self.num_preemptions = 0
        self._view = planner.SchedulerView(limits, self.sequences, self.block_table, self.pool, self.waiting)
        self._sequence_of_id: dict[str, Sequence] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._num_arrivals = 0
        self._num_steps = 0

    @property
    def num_running(self) -> int:
        return self.sequences.num_active

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_in_flight(self) -> int:
        """Plans committed and not digested."""
        return len(self._in_flight)

    @property
    def num_free_blocks(self) -> int:
        return self.pool.num_free

    @property
    def has_work(self) -> bool:
        """Whether a request runs or waits, or an answer is due."""
        return bool(self._sequence_of_id or self._in_flight)

    def add(self, request: Request) -> None:
        """Puts a request at the end of the queue and gives it its place in line.

        Raises:
            ValueError: the request's id is in use.
            KVBudgetError: the whole pool could not hold it.
            QueueFullError: too many requests wait.
        """
        num_prompt, limits = len(request.prompt_token_ids), self.limits
        assert 1 <= num_prompt < request.max_total_len <= limits.max_model_len, (
            f"{num_prompt} prompt tokens, {request.max_total_len} in all, model {limits.max_model_len}"
        )
        assert len(request.stop_token_ids) <= MAX_STOP_TOKEN_IDS
        assert min(request.stop_token_ids, default=0) >= 0
        if request.request_id in self._sequence_of_id:
            raise ValueError(f"Request id {request.request_id!r} is in use. Wait for its end or choose another.")
        needed = blocks_for(request.max_total_len, limits.block_size)
        if needed > self.pool.num_usable:
            raise KVBudgetError(
                f"The request needs {needed} KV blocks of {limits.block_size} tokens for its {num_prompt} prompt "
                f"tokens and {request.max_total_len - num_prompt} output tokens, but the KV cache has only "
                f"{self.pool.num_usable}. Shorten the prompt, lower max_tokens, or enlarge the KV cache.",
                param="max_tokens",
            )
        # Whoever finds a free row at the next step does not queue: a burst into an idle engine is no overload.
        num_free_rows = limits.max_num_seqs - self.num_running
        if self.num_waiting >= limits.max_num_queued_reqs + num_free_rows:
            raise QueueFullError(
                f"The queue is full: {self.num_waiting} requests wait, the bound is {limits.max_num_queued_reqs}. "
                "Retry later or raise max_num_queued_reqs."
            )
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        sequence = Sequence(request, np.array(request.prompt_token_ids, np.int32))
        self._sequence_of_id[request.request_id] = sequence
        self.waiting.push(sequence)

    def abort(self, request_id: str) -> Request | None:
        """Ends a request in whatever state, and frees what it holds; answers in flight for it are dropped.

        Returns: the request, or None if no such request is here.
        """
        sequence = self._sequence_of_id.pop(request_id, None)
        if sequence is None:
            return None
        if sequence.row >= 0:
            self._release(np.array([sequence.row]))
        else:
            self.waiting.remove(sequence)
        return sequence.request

    def plan(self) -> StepPlan:
        """The next step's plan; changes nothing. Empty when all running sequences await their last answer."""
        return planner.plan_step(self._view, self._num_steps)

    def commit(self, plan: StepPlan) -> None:
        """Carries out the plan, which must be the last one made, with no add's or abort's effect in between.

        Cost: a few numpy operations on the step's rows; Python only for sequences that enter or give way.
        """
        assert plan.step == self._num_steps, f"plan {plan.step} is stale: step {self._num_steps} is next"
        if plan.preempted:
            self._preempt(plan.preempted)
        if plan.admitted:
            for row, sequence in zip(plan.admitted, self.waiting.pop(len(plan.admitted)), strict=True):
                self.sequences.admit(row, sequence)
        if len(plan.block_ids):
            ids = self.pool.allocate(len(plan.block_ids))
            assert (ids == plan.block_ids).all(), f"plan {plan.step} is stale: its blocks are taken"
            self.block_table.append(plan.block_rows, plan.block_cols, ids)
        self._in_flight.append(self._advance(plan))
        self._num_steps += 1

    def _preempt(self, request_ids: tuple[str, ...]) -> None:
        gave_way = [self._sequence_of_id[request_id] for request_id in request_ids]
        for sequence in gave_way:
            sequence.num_preemptions += 1
        self._send_back(gave_way)
        self.num_preemptions += len(gave_way)

    def requeue_running(self) -> None:
        """Sends every running sequence back and forgets what is in flight: the device lost its cache.

        No preemption: nobody took their blocks, and they keep their right to stay.
        """
        self._in_flight.clear()
        self._send_back(list(self.sequences.sequences[self.sequences.active]))

    def _send_back(self, sequences: list[Sequence]) -> None:
        """Returns sequences to their places in the queue with the tokens that the host knows."""
        rows = np.array([sequence.row for sequence in sequences], np.intp)
        for sequence in sequences:
            sequence.known_token_ids = self.sequences.known_token_ids(sequence.row)
        self._release(rows)
        for sequence in sequences:
            self.waiting.push(sequence)

    def _advance(self, plan: StepPlan) -> _InFlight:
        """Moves the rows' counts past the plan's tokens; returns what its answer will be matched with."""
        sequences = self.sequences
        rows = plan.decode_rows.astype(np.intp)  # numpy indexes twice as fast with intp as with int32
        positions = plan.decode_positions + 1
        generations = plan.generations
        sequences.num_computed[rows] = positions
        if len(plan.prefill_rows):
            ends = plan.prefill_starts + plan.prefill_lens
            sequences.num_computed[plan.prefill_rows] = ends
            sampled, samples = plan.prefill_rows[plan.prefill_samples], plan.prefill_samples
            sequences.on_device[sampled] = True
            rows = np.concatenate([rows, sampled])
            positions = np.concatenate([positions, ends[samples]])
            num_decodes = len(plan.decode_rows)
            generations = np.concatenate([generations[:num_decodes], generations[num_decodes:][samples]])
        assert (sequences.generation[rows] == generations).all(), f"plan {plan.step} is stale: a row moved on"
        sequences.num_tokens[rows] = positions + 1
        return _InFlight(plan, rows, positions, generations, sequences.requests[rows])

    def digest(self, plan: StepPlan, tokens: np.ndarray, failed: np.ndarray | None = None) -> StepEvents:
        """Takes the device's answer to the oldest undigested plan; frees the sequences that end with it.

        Args:
            tokens: int32[S] in the order of `plan.sampled_rows`.
            failed: bool[S] rows whose answer is worthless (NaN); they end with "error".

        Cost: a few numpy operations on the step's rows; Python only for sequences that end.
        """
        assert self._in_flight, f"plan {plan.step} was not committed"
        flight = self._in_flight.popleft()
        assert flight.plan.step == plan.step, f"plan {plan.step} digested before plan {flight.plan.step}"
        rows, positions, alive_tokens, alive_failed = flight.rows, flight.positions, tokens, failed
        assert len(tokens) == len(rows), f"{len(tokens)} tokens for {len(rows)} rows"
        live = self.sequences.generation[rows] == flight.generations
        all_live = live.all()
        if not all_live:
            rows, positions, alive_tokens = rows[live], positions[live], tokens[live]
            alive_failed = None if failed is None else failed[live]
        self.sequences.append_known(rows, positions, alive_tokens)
        codes = finish.finish_codes(self.sequences, rows, positions + 1, alive_tokens, alive_failed)
        ended = rows[codes.nonzero()[0]]  # all codes but CONTINUES
        if not all_live:
            alive_codes, codes = codes, np.zeros(len(live), np.int8)
            codes[live] = alive_codes
        finished = finish.finished(codes, flight.requests, tokens, self.limits.eos_token_ids) if len(ended) else ()
        for item in finished:
            del self._sequence_of_id[item.request.request_id]
        if len(ended):
            self._release(ended)
        return StepEvents(plan.step, flight.rows, flight.positions, tokens, live, codes, flight.requests, finished)

    def _release(self, rows: np.ndarray) -> None:
        """Takes rows and blocks from their sequences."""
        self.pool.free(self.block_table.blocks_of(rows))
        self.block_table.clear(rows)
        self.sequences.release(rows)

    def check_integrity(self) -> None:
        """Asserts the invariants of every table and those between them; counts are taken from scratch."""
        limits, sequences = self.limits, self.sequences
        sequences.check_integrity(self.num_in_flight)
        self.waiting.check_integrity()
        self.block_table.check_integrity(limits.num_blocks)
        self.pool.check_integrity(self.block_table.holders(limits.num_blocks))
        wanted = blocks_for(sequences.num_computed, limits.block_size)
        assert np.array_equal(self.block_table.num_blocks, wanted), "rows do not hold the blocks of their tokens"
        here = [*sequences.sequences[sequences.active], *self.waiting]
        assert {s.request.request_id: s for s in here} == self._sequence_of_id
        assert len(here) == len(self._sequence_of_id)
        assert all(s.num_preemptions <= policy.MAX_PREEMPTIONS for s in here)
        assert policy.protected_blocks(sequences, limits.block_size) <= self.pool.num_usable
        in_line = sequences.active & ~policy.is_protected(sequences) & ~sequences.is_ending()
        youngest = max(sequences.arrival[in_line].tolist(), default=-1)
        assert all(s.request.arrival > youngest for s in self.waiting), "somebody was overtaken"
