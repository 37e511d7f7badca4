"""`Simulation`: a scheduler on an echo device, with every client's view of its request."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from jaxserve.scheduler.finish import ERROR, StepEvents
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequences import Request

from .echo_device import POISON, EchoDevice, EchoStore, TornCopyError, reference_output
from .invariants import check_counts, check_writes

MAX_STEPS = 20_000  # without an end of any sequence: past it, it is a livelock

Name = tuple[str, int]  # request id, index of the sequence
ChooseRows = Callable[[np.ndarray], list[int]]


@dataclass(slots=True)
class Result:
    """What a client saw of one sequence.

    Attributes:
        num_fed: tokens fed for it in chunks, not as decode tokens.
        was_moved: it lost its row, so that some tokens were fed again.
    """

    token_ids: list[int] = field(default_factory=list)
    reason: str | None = None
    stop_reason: int | None = None
    num_fed: int = 0
    was_moved: bool = False


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the device said: int32 and bool [num_steps, S]."""

    plan: StepPlan
    tokens: np.ndarray
    failed: np.ndarray


class Simulation:
    """A scheduler on an EchoDevice; the invariants are checked after each operation.

    Args:
        depth: plans dispatched before the oldest is digested: 0 in step, 1 one step ahead.
        deep_every: `check_integrity` runs after every so many operations, counts are checked after each; 0: neither.
        is_slow: copies to host memory arrive when somebody waits for them, or `store.arrive` is called.

    Attributes:
        max_steps: decode steps that a plan may have in one loop.
        num_loops: plans that had more than one.
        num_operations: commits, digests, adds, aborts, resets and losses so far.
    """

    def __init__(self, scheduler: Scheduler, depth: int = 1, deep_every: int = 1, is_slow: bool = False):
        limits = scheduler.limits
        self.scheduler, self.depth, self.deep_every, self.is_slow = scheduler, depth, deep_every, is_slow
        self.store = EchoStore(limits.num_swap_blocks, limits.block_size)
        self.device = self._new_device()
        self.undigested: deque[_Answer] = deque()
        self.requests: dict[str, Request] = {}
        self.results: dict[Name, Result] = {}
        self.preemptions: dict[Name, int] = {}
        self.admitted: list[str] = []
        self.num_operations = self.num_delivered = self.num_faults = 0
        self.max_steps, self.num_loops = 1, 0
        self._num_open = self._num_idle_steps = 0

    def _new_device(self) -> EchoDevice:
        limits = self.scheduler.limits
        return EchoDevice(limits.num_blocks, limits.block_size, limits.max_num_seqs, limits.max_blocks_per_row)

    @property
    def has_requests(self) -> bool:
        return self.scheduler.num_running + self.scheduler.num_waiting > 0

    @property
    def aborted(self) -> set[str]:
        return {name for (name, _), result in self.results.items() if result.reason == "abort"}

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.requests[request.request_id] = request
        for index in range(request.num_sequences):
            self.results[request.request_id, index] = Result()
        self._num_open += request.num_sequences
        self._check()

    def _open(self, request_id: str) -> list[Result]:
        """The request's sequences that have not ended."""
        request = self.requests.get(request_id)
        results = [] if request is None else [self.results[request_id, i] for i in range(request.num_sequences)]
        return [result for result in results if result.reason is None]

    def _close(self, results: list[Result], reason: str) -> None:
        for result in results:
            assert result.reason is None, "a second end"
            result.reason = reason
        self._num_open -= len(results)
        self._num_idle_steps = 0

    def abort(self, request_id: str) -> None:
        open_ones = self._open(request_id)
        request = self.scheduler.abort(request_id)
        assert request is (self.requests[request_id] if open_ones else None)
        self._close(open_ones, "abort")
        self._check()

    def abort_sequence(self, request_id: str, index: int) -> None:
        result = self.results.get((request_id, index))
        ended = self.scheduler.abort_sequence(request_id, index)
        if result is None or result.reason is not None:
            assert ended is None, "a sequence ended twice"
        else:
            assert ended is not None
            self._close([result], "abort")
            assert (ended[0].index, ended[1]) == (index, not self._open(request_id))
        self._check()

    def reset_cache(self) -> None:
        num_cached = len(self.scheduler.memory.index)
        assert self.scheduler.reset_prefix_cache() == num_cached
        assert len(self.scheduler.memory.index) == 0
        self._check()

    def step(self, *, raises: bool = False, tears: bool = False, choose_nan: ChooseRows | None = None) -> StepPlan:
        """plan, commit, dispatch, and digest what is due.

        Args:
            raises: the step fails: the device's memory is lost.
            tears: a copy to host memory that starts here will be torn.
            choose_nan: of the step's rows, those whose KV is not finite.
        """
        scheduler, pool = self.scheduler, self.scheduler.memory.pool
        generation = pool.generation.copy()
        plan = self._plan_and_commit()
        sequences = scheduler.sequences.sequences
        chunks = zip(plan.prefill_rows.tolist(), plan.prefill_starts.tolist(), plan.prefill_lens.tolist(), strict=True)
        prefill_tokens = []
        for row, start, length in chunks:
            prefill_tokens.append(scheduler.sequences.token_ids[row, start : start + length].copy())
            self.results[sequences[row].request.request_id, sequences[row].index].num_fed += length
        entered = {admitted.row: sequences[admitted.row] for admitted in plan.admitted}
        fresh = (pool.generation != generation).nonzero()[0]
        nan_rows = [] if choose_nan is None else choose_nan(np.concatenate([plan.decode_rows, plan.prefill_rows]))
        if raises:
            self.lose_device()
            return plan
        try:
            answer = self.device.run(plan, prefill_tokens, entered, fresh, self.store, nan_rows)
        except TornCopyError as error:
            self.lose_device(error.slots)
            return plan
        self.num_faults += len(nan_rows)
        if tears:
            self.store.tear()
        self._settle()
        self.undigested.append(_Answer(plan, *answer))
        while len(self.undigested) > self.depth:
            self.digest()
        return plan

    def _plan_and_commit(self) -> StepPlan:
        scheduler, limits = self.scheduler, self.scheduler.limits
        in_line = scheduler.num_running, scheduler.num_waiting
        self._num_idle_steps += 1
        assert self._num_idle_steps <= MAX_STEPS, f"livelock: {in_line} running and waiting after {MAX_STEPS} steps"
        decision = scheduler.plan(self.max_steps)
        assert (scheduler.num_running, scheduler.num_waiting) == in_line
        assert decision.num_tokens <= limits.max_num_batched_tokens
        assert 1 <= decision.num_steps <= max(1, min(self.max_steps, limits.block_size))
        assert decision.num_steps == 1 or not scheduler.num_waiting, "somebody waits and the device loops"
        self.num_loops += decision.num_steps > 1
        if not self.undigested:
            assert decision.is_empty == (not any(in_line)), "somebody is here and nobody is served"
        plan = scheduler.commit(decision)
        assert plan.num_tokens == decision.num_tokens
        sequences = scheduler.sequences.sequences
        self.admitted += [sequences[admitted.row].request.request_id for admitted in plan.admitted]
        for gone in plan.preempted:
            name = gone.request_id, gone.index
            self.preemptions[name] = self.preemptions.get(name, 0) + 1
            self.results[name].was_moved = True
        if self.deep_every:
            check_writes(scheduler, plan)
        self._check()
        return plan

    def _settle(self) -> None:
        """Lets copies arrive, and poisons what nobody may read any more."""
        if not self.is_slow:
            self.store.arrive(len(self.store.pending))
        pool, host = self.scheduler.memory.pool, self.scheduler.memory.host
        self.device.poison((pool.ref_count == 0) & ~pool.is_kept)
        self.device.poison(np.zeros(1, int))
        self.store.slots[host.ref_count == 0] = POISON

    def digest(self, failed: np.ndarray | None = None) -> None:
        """Takes the oldest answer and hands its tokens to their clients.

        Args:
            failed: rows that fail in the first step beside those that read what is not finite.
        """
        answer = self.undigested.popleft()
        fails = answer.failed.copy()
        fails[0] |= False if failed is None else failed
        table = self.scheduler.memory.table
        rows = answer.plan.sampled_rows[fails.any(axis=0)]
        worthless = table.blocks_of(rows) if len(rows) else None
        if answer.plan.num_steps == 1:
            steps = (self.scheduler.digest(answer.plan, answer.tokens[0], fails[0] if fails.any() else None),)
        else:
            steps = self.scheduler.digest_loop(answer.plan, answer.tokens, fails if fails.any() else None)
        hit = np.zeros(fails.shape[1], bool)
        for index, events in enumerate(steps):
            assert np.array_equal(events.rows, answer.plan.sampled_rows)
            assert np.array_equal(events.finish_codes == ERROR, events.live & fails[index]), "the wrong row failed"
            hit |= events.live & fails[index]
            self._deliver(events, fails[index])
        if worthless is not None and hit[fails.any(axis=0)].all():
            assert not self.scheduler.memory.pool.is_kept[worthless].any(), "what a failed row read is still cached"
        self._check()

    def _deliver(self, events: StepEvents, fails: np.ndarray) -> None:
        """Gives each client its token, and the ends."""
        for index in events.live.nonzero()[0].tolist():
            sequence = events.sequences[index]
            request = sequence.request
            result = self.results[request.request_id, sequence.index]
            assert result.reason is None, "a token after the end"
            num_output, num_prompt = len(result.token_ids), len(request.prompt_token_ids)
            assert events.positions[index] == num_prompt + num_output, "a token lost or repeated"
            if not num_output and not result.was_moved and sequence.index == 0:
                assert sequence.num_cached_tokens == num_prompt - result.num_fed, "usage says what was not"
            if not fails[index]:
                result.token_ids.append(int(events.tokens[index]))
                self.num_delivered += 1
        for item in events.finished:
            assert events.finish_codes[item.index] > 0
            request_id = item.sequence.request.request_id
            result = self.results[request_id, item.sequence.index]
            self._close(self._open(request_id) if item.reason == "error" else [result], item.reason)
            result.stop_reason = item.stop_reason
            assert item.is_last == (not self._open(request_id))

    def lose_device(self, torn_slots: np.ndarray | None = None) -> None:
        """The device's memory is gone, and with it every answer that is due and every copy that was on its way."""
        lost = self.store.lose_pending()
        if torn_slots is not None:
            lost = np.concatenate([lost, torn_slots])
        for sequence in self.scheduler.sequences.sequences[self.scheduler.sequences.active]:
            self.results[sequence.request.request_id, sequence.index].was_moved = True
        self.undigested.clear()
        self.device = self._new_device()
        self.scheduler.requeue_running(lost)
        assert self.scheduler.num_running == 0
        self._check()

    def drain(self) -> None:
        """Steps until nothing is left, then looks for leaks."""
        while self.has_requests:
            self.step()
        while self.undigested:
            self.digest()
        assert not self.scheduler.has_work
        memory = self.scheduler.memory
        assert memory.pool.num_free == self.scheduler.limits.num_blocks - 1, "blocks leaked"
        assert memory.host.num_free == self.scheduler.limits.num_swap_blocks, "slots leaked"

    def check_outputs(self) -> None:
        """Every client got what its request gives alone; whose sequence was cut short got a prefix of it."""
        for (request_id, index), result in self.results.items():
            request = self.requests[request_id]
            tokens, reason, stop_reason = reference_output(request, self.scheduler.limits.eos_token_ids, index)
            if result.reason in ("abort", "error"):
                assert result.token_ids == tokens[: len(result.token_ids)], (request_id, index)
            else:
                seen = (result.token_ids, result.reason, result.stop_reason)
                assert seen == (tokens, reason, stop_reason), (request_id, index)

    def _check(self) -> None:
        self.num_operations += 1
        if not self.deep_every:
            return
        check_counts(self.scheduler, self._num_open)
        if self.num_operations % self.deep_every == 0:
            self.scheduler.check_integrity()
