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
from typing import NamedTuple

import numpy as np

from jaxserve.cache.kv_memory import KVMemory
from jaxserve.cache.prefix import namespace
from jaxserve.errors import QueueFullError
from jaxserve.scheduler import committing, finish, integrity, planner, policy, publishing
from jaxserve.scheduler.counters import Counters
from jaxserve.scheduler.decision import Decision
from jaxserve.scheduler.finish import BeamAnswer, Finished, StepEvents
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.policy import SchedulerLimits
from jaxserve.scheduler.roster import Roster
from jaxserve.scheduler.searches import EndedSearch, Searches
from jaxserve.scheduler.sequences import Request, Sequence, SequenceTable
from jaxserve.scheduler.waiting import WaitingQueue
from jaxserve.types import MAX_N, MAX_STOP_TOKEN_IDS


class _InFlight(NamedTuple):
    """A committed plan whose answer is due.

    Attributes:
        roster: the rows that sample.
        positions: [S] of the first token that each samples.
        may_end: whether one of them may get to its longest with that.
    """

    plan: StepPlan
    roster: Roster
    positions: np.ndarray
    may_end: bool


class Scheduler:
    """Continuous batching over paged KV, first come first served.

    Attributes:
        limits: the bounds it works in.
        sequences, memory, waiting: the tables; others may read them.
        counters: since start.
    """

    def __init__(self, limits: SchedulerLimits):
        self.limits = limits
        self.sequences = SequenceTable(limits.max_num_seqs, limits.max_model_len)
        self.memory = KVMemory(
            limits.num_blocks,
            limits.block_size,
            limits.max_num_seqs,
            limits.max_blocks_per_row,
            limits.num_swap_blocks,
            limits.enable_prefix_caching,
        )
        self.waiting = WaitingQueue()
        self.counters = Counters()
        self._view = planner.SchedulerView(limits, self.sequences, self.memory, self.waiting)
        self._requests: dict[str, Request] = {}
        self._searches = Searches(self.sequences, self.memory, limits.eos_token_ids)
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
        """Tokens that a row may be ahead of what the host knows: one for each step committed and not digested."""
        return sum(flight.plan.num_steps for flight in self._in_flight)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out, those that only the prefix cache holds included."""
        return self.memory.pool.num_free

    @property
    def num_preemptions(self) -> int:
        return self.counters.swap_preemptions + self.counters.recompute_preemptions

    @property
    def has_work(self) -> bool:
        """Whether a request runs or waits, or an answer is due."""
        return bool(self._requests or self._in_flight)

    def add(self, request: Request) -> None:
        """Puts a request at the end of the queue and gives it its place in line.

        Raises:
            ValueError: the request's id is in use.
            KVBudgetError: the whole pool could not hold it.
            QueueFullError: too many wait.
        """
        num_prompt, limits = len(request.prompt_token_ids), self.limits
        assert 1 <= num_prompt < request.max_total_len <= limits.max_model_len, (
            f"{num_prompt} prompt tokens, {request.max_total_len} in all, model {limits.max_model_len}"
        )
        assert len(request.stop_token_ids) <= MAX_STOP_TOKEN_IDS
        assert min(request.stop_token_ids, default=0) >= 0
        assert 1 <= request.num_sequences <= MAX_N
        assert request.beam is None or request.num_sequences == request.beam.beam_width <= limits.max_num_seqs
        if request.request_id in self._requests:
            raise ValueError(f"Request id {request.request_id!r} is in use. Wait for its end or choose another.")
        policy.check_budget(request, limits)
        # Whoever finds a free row at the next step does not queue: a burst into an idle engine is no overload.
        num_free_rows = limits.max_num_seqs - self.num_running
        if self.num_waiting >= limits.max_num_queued_reqs + num_free_rows:
            raise QueueFullError(
                f"The queue is full: {self.num_waiting} sequences wait, the bound is {limits.max_num_queued_reqs}. "
                "Retry later or raise max_num_queued_reqs."
            )
        request.arrival = self._num_arrivals
        request.namespace = namespace(limits.model_version, request.cache_salt)
        self._num_arrivals += 1
        self._requests[request.request_id] = request
        for index in range(request.num_sequences):
            sequence = Sequence(request, index, np.array(request.prompt_token_ids, np.int32))
            request.sequences.append(sequence)
            self.waiting.push(sequence)

    def abort(self, request_id: str) -> Request | None:
        """Ends a request in whatever state, and frees what it holds; answers in flight for it are dropped.

        Returns: the request, or None if no such request is here.
        """
        request = self._requests.get(request_id)
        if request is not None:
            self._end(list(request.sequences))
        return request

    def abort_sequence(self, request_id: str, index: int) -> tuple[Sequence, bool] | None:
        """Ends one of a request's continuations.

        Returns: the sequence, and whether it was the last of the request; None if no such sequence is here.
        """
        request = self._requests.get(request_id)
        found = [] if request is None else [s for s in request.sequences if s.index == index]
        if not found:
            return None
        assert request is not None
        assert request.beam is None, "a beam is no continuation of its own"
        self._end(found)
        return found[0], not request.sequences

    def plan(self, max_steps: int = 1) -> Decision:
        """What the next step should do; changes nothing. Empty when all running sequences await their last answer.

        Args:
            max_steps: decode steps that the device may run in one loop if there is nothing else to do.
        """
        return planner.decide_step(self._view, self._num_steps, max_steps)

    def commit(self, decision: Decision) -> StepPlan:
        """Carries out the decision, which must be the last one made, with no add's or abort's effect in between.

        Cost: a few numpy operations on the step's rows; Python only for sequences that enter or give way.
        """
        assert decision.step == self._num_steps, f"decision {decision.step} is stale: step {self._num_steps} is next"
        assert decision.decodes.num_releases == self.sequences.num_releases, (
            f"decision {decision.step} is stale: rows were taken away since"
        )
        for victim in decision.victims:
            publishing.publish(self.sequences, self.memory, victim.row)
        plan = committing.commit(decision, self.sequences, self.memory, self.waiting)
        if decision.victims:
            self.counters.count_preemptions(decision.victims, plan.preempted)
        self.counters.copied_blocks += len(plan.copy_from)
        for entry in decision.entries:
            self.counters.count_hits(entry.sequence, entry.num_stored, caches=self.memory.caches)
        for group in plan.beam_groups:
            self._searches.start(group)
        self._in_flight.append(self._advance(decision.decodes, plan))
        self._num_steps += 1
        return plan

    def _advance(self, decodes: Roster, plan: StepPlan) -> _InFlight:
        """Moves the rows' counts past the plan's tokens; returns what its answer will be matched with."""
        sequences, positions = self.sequences, plan.decode_positions + 1
        if plan.num_steps > 1:
            ends = np.minimum(plan.decode_positions + plan.num_steps, decodes.max_total_len - 1)
            return _InFlight(plan, decodes, positions, sequences.advance(decodes, ends, plan.num_steps))
        may_end = sequences.advance(decodes, positions)
        if not len(plan.prefill_rows):
            return _InFlight(plan, decodes, positions, may_end)
        ends = plan.prefill_starts + plan.prefill_lens
        sequences.num_computed[plan.prefill_rows] = ends
        if not np.count_nonzero(plan.prefill_samples):
            return _InFlight(plan, decodes, positions, may_end)
        sampled = plan.prefill_rows[plan.prefill_samples]
        sequences.begin_decoding(sampled)
        roster = sequences.roster_of(np.concatenate([decodes.rows, sampled]))
        return _InFlight(plan, roster, np.concatenate([positions, ends[plan.prefill_samples]]), may_end=True)

    def digest(
        self, plan: StepPlan, tokens: np.ndarray, failed: np.ndarray | None = None, beams: BeamAnswer | None = None
    ) -> StepEvents:
        """Takes the device's answer to the oldest undigested plan, of one step; frees the sequences that end with it.

        Args:
            tokens: int32[S] in the order of `plan.sampled_rows`.
            failed: bool[S] rows whose answer is worthless (NaN); their requests end with "error".
            beams: what it says of beams, if the plan has any.

        Cost: a few numpy operations on the step's rows; Python only for sequences that end.
        """
        assert plan.num_steps == 1, f"plan {plan.step} has {plan.num_steps} steps"
        return self._digest(self._take_flight(plan, len(tokens)), tokens, failed, beams)

    def digest_loop(
        self, plan: StepPlan, tokens: np.ndarray, failed: np.ndarray | None = None
    ) -> tuple[StepEvents, ...]:
        """The same for a plan of one or more steps without beams; the events of each step, until all rows have ended.

        Args:
            tokens: int32[num_steps, S].
            failed: bool[num_steps, S].
        """
        flight = self._take_flight(plan, tokens.shape[1])
        events: list[StepEvents] = []
        for index in range(plan.num_steps):
            one = flight if index == 0 else flight._replace(positions=flight.positions + index)
            events.append(self._digest(one, tokens[index], None if failed is None else failed[index], None))
            if not np.count_nonzero(events[-1].live & (events[-1].finish_codes == finish.CONTINUES)):
                break
        return tuple(events)

    def _digest(
        self, flight: _InFlight, tokens: np.ndarray, failed: np.ndarray | None, beams: BeamAnswer | None
    ) -> StepEvents:
        plan, roster, sequences = flight.plan, flight.roster, self.sequences
        live = roster.everyone
        if roster.num_releases != sequences.num_releases:
            live = sequences.generation[roster.rows] == roster.generations
        if live is roster.everyone or np.count_nonzero(live) == len(live):
            codes = self._append(plan, roster, flight.positions, tokens, failed, may_end=flight.may_end)
        else:
            alive, alive_failed = roster.subset(live), None if failed is None else failed[live]
            codes = np.zeros(len(live), np.int8)
            codes[live] = self._append(plan, alive, flight.positions[live], tokens[live], alive_failed)
        ended_searches: list[EndedSearch] = []
        is_beam = live & sequences.is_beam[roster.rows] if sequences.has_beams else None
        if is_beam is not None and np.count_nonzero(is_beam):
            codes = np.where(is_beam & (codes != finish.ERROR), np.int8(finish.CONTINUES), codes)  # its search says
            ended_searches = self._advance_searches(flight, is_beam, codes, tokens, beams)
            live = live & ~is_beam
        ends = codes is not roster.all_continue and np.count_nonzero(codes)
        return StepEvents(
            step=plan.step,
            rows=roster.rows,
            positions=flight.positions,
            tokens=tokens,
            live=live,
            finish_codes=codes,
            sequences=roster.sequences,
            finished=self._finish(roster, codes, tokens) if ends else (),
            beams=tuple(ended_searches),
        )

    def _append(
        self,
        plan: StepPlan,
        roster: Roster,
        positions: np.ndarray,
        tokens: np.ndarray,
        failed: np.ndarray | None,
        may_end: bool = True,
    ) -> np.ndarray:
        """Takes in the tokens of live rows, and what the plan's chunks have computed; returns finish codes."""
        lengths = self.sequences.append_known(roster, positions, tokens)
        if len(plan.prefill_rows):
            healthy = roster.rows if failed is None else roster.rows[~failed]
            publishing.answer_chunks(plan, self.sequences, self.memory, healthy)
        return finish.finish_codes(roster, lengths, tokens, failed, may_end=may_end)

    def _take_flight(self, plan: StepPlan, num_tokens: int) -> _InFlight:
        assert self._in_flight, f"plan {plan.step} was not committed"
        flight = self._in_flight.popleft()
        assert flight.plan.step == plan.step, f"plan {plan.step} digested before plan {flight.plan.step}"
        assert num_tokens == len(flight.roster), f"{num_tokens} tokens for {len(flight.roster)} rows"
        return flight

    def _advance_searches(
        self, flight: _InFlight, is_beam: np.ndarray, codes: np.ndarray, tokens: np.ndarray, beams: BeamAnswer | None
    ) -> list[EndedSearch]:
        """Lets the searches follow the step, those excepted of which a beam failed; ends those that are over."""
        assert beams is not None, f"plan {flight.plan.step} has beams, its answer has none"
        rows, sequences = flight.roster.rows, flight.roster.sequences
        failing = {sequences[index].request.request_id for index in codes.nonzero()[0].tolist()}
        healthy = [
            int(rows[index])
            for index in is_beam.nonzero()[0].tolist()
            if sequences[index].request.request_id not in failing
        ]
        ended = self._searches.advance(rows, flight.positions, tokens, np.array(healthy, np.intp), beams)
        for request, _ in ended:
            self._end(list(request.sequences))
        return ended

    def _finish(self, roster: Roster, codes: np.ndarray, tokens: np.ndarray) -> tuple[Finished, ...]:
        """Ends the sequences with a code, and with an error all of its request."""
        finished = []
        for index in codes.nonzero()[0].tolist():
            sequence: Sequence = roster.sequences[index]
            request = sequence.request
            if sequence.row < 0:
                continue  # it fell with a sibling
            code, token = int(codes[index]), int(tokens[index])
            reason = finish.FINISH_REASONS[code]
            assert reason is not None
            if code == finish.ERROR:
                self._end(list(request.sequences), is_worthless=True)
            else:
                self._end([sequence])
            stop_reason = token if code == finish.STOP and token not in self.limits.eos_token_ids else None
            finished.append(Finished(index, sequence, reason, stop_reason, not request.sequences))
        return tuple(finished)

    def _end(self, sequences: list[Sequence], *, is_worthless: bool = False) -> None:
        """Takes everything from sequences of one request; what they computed stays in the cache if it is worth it."""
        request = sequences[0].request
        rows = [sequence.row for sequence in sequences if sequence.row >= 0]
        for sequence in sequences:
            request.sequences.remove(sequence)
            if sequence.row < 0:
                self.waiting.remove(sequence)
            if sequence.swapped is not None:
                self.memory.host.release(sequence.swapped)
                sequence.swapped = None
        for row in () if is_worthless else rows:
            publishing.publish(self.sequences, self.memory, row)
        if is_worthless:
            self.memory.forget(self.memory.table.blocks_of(np.array(rows, np.intp)))
        if rows:
            self.memory.release(np.array(rows, np.intp))
            self.sequences.release(np.array(rows, np.intp))
        if not request.sequences:
            del self._requests[request.request_id]
            self._searches.end(request.request_id)

    def reset_prefix_cache(self) -> int:
        """Forgets every cached block; returns how many there were. What runs goes on, and is not cached any more."""
        for request in self._requests.values():
            for sequence in request.sequences:
                sequence.caches = False
        return self.memory.reset_cache()

    def requeue_running(self, lost_slots: np.ndarray | None = None) -> None:
        """Sends every running sequence back and forgets what is in flight: the device lost its cache.

        No preemption: nobody took their blocks, and they keep their right to stay. Beam searches begin anew.

        Args:
            lost_slots: int32[n] slots of host memory whose content did not arrive; who relies on one computes again.
        """
        self._in_flight.clear()
        self._searches.clear()
        rows = np.flatnonzero(self.sequences.active)
        committing.send_back(self.sequences, self.memory, self.waiting, rows)
        self.memory.lose_device()
        lost = set() if lost_slots is None else set(lost_slots.tolist())
        for sequence in self.waiting if lost else ():
            if sequence.swapped is not None and not lost.isdisjoint(sequence.swapped.tolist()):
                self.memory.host.release(sequence.swapped)
                sequence.swapped, sequence.num_swapped = None, 0

    def check_integrity(self) -> None:
        """Asserts the invariants of every table and those between them; counts are taken from scratch."""
        requests = self._requests.values()
        integrity.check_integrity(self.sequences, self.memory, self.waiting, requests, self.num_in_flight)
