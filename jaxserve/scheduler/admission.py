"""Who enters the running batch, and with what of its KV already there.

Owns the rules, as pure functions of the tables; it changes nothing. First come, first served: nobody enters before
the head of the queue does.
"""

from __future__ import annotations

import numpy as np

from jaxserve.cache.blocks import blocks_for
from jaxserve.cache.kv_memory import KVMemory
from jaxserve.scheduler.decision import Entry
from jaxserve.scheduler.policy import MAX_PREEMPTIONS, SchedulerLimits, blocks_at_longest
from jaxserve.scheduler.sequences import NO_BOUND, Sequence, SequenceTable

_NO_BLOCKS = np.empty(0, np.int32)


class Admission:
    """One plan's decisions about the queue.

    A sequence enters when the free blocks hold its known tokens, what the running prefills still need for theirs,
    and one more block for it and for each running sequence. Without those for the running ones it would soon have
    to give way: on the workload of `benchmarks/scheduler.py`, with a pool of 40 % of the demand, 30 % more tokens
    are then computed than needed; with them 3 %, at 2 % more steps. When nothing runs the head always enters. A
    protected one enters only where it can stay.

    A sequence whose prefix a running one is just computing waits for it instead of computing it again.

    Args:
        num_free: free blocks when the step's decode rows have theirs.
    """

    def __init__(self, limits: SchedulerLimits, sequences: SequenceTable, memory: KVMemory, num_free: int):
        self._limits, self._sequences, self._memory = limits, sequences, memory
        prefilling = sequences.prefill_rows()
        owed = blocks_for(sequences.num_known[prefilling], limits.block_size) - memory.table.num_blocks[prefilling]
        self._spare = num_free - int(owed.sum())
        self._num_running = sequences.num_active
        self._num_reserved = int(sequences.num_reserved.sum())
        self._rows = sequences.free_rows()
        self._entries: list[Entry] = []
        self._woken: set[int] = set()

    @property
    def num_rows(self) -> int:
        """Rows that are still free."""
        return len(self._rows)

    def enter(self, sequence: Sequence) -> Entry | None:
        """How the sequence enters, or None if it cannot now. If it does, it counts in the next decisions."""
        request = sequence.request
        num_rows = request.num_sequences if request.beam else 1
        if len(self._rows) < num_rows:
            return None
        source = self._source(sequence)
        if source is None:
            return None
        shared, num_stored, fork_of = source
        num_taken = self._num_idle(shared)
        if sequence.swapped is not None:
            num_taken += len(sequence.swapped) - len(shared)
        num_blocks = len(shared) if sequence.swapped is None else len(sequence.swapped)
        needed = num_taken + blocks_for(len(sequence.known_token_ids), self._limits.block_size) - num_blocks
        headroom = 1 + self._num_running if self._num_running else 0
        if needed + headroom > self._spare:
            return None
        num_reserved = -1
        if request.beam is not None or sequence.num_preemptions >= MAX_PREEMPTIONS:
            num_reserved = blocks_at_longest(request, self._limits.block_size)
            if self._num_reserved + num_reserved > self._limits.num_blocks - 1:
                return None
            self._num_reserved += num_reserved
        self._spare -= needed
        return self._note(Entry(sequence, self._rows[0], shared, num_stored, num_taken, fork_of, num_reserved))

    def enter_beam(self, sequence: Sequence, leader: int) -> Entry:
        """How a beam joins its search, whose first row is `leader`: rows and blocks are reserved for it."""
        num_prompt = int(self._sequences.num_prompt[leader])
        shared = self._memory.table.row(leader).copy()
        return self._note(Entry(sequence, self._rows[0], shared, num_prompt, 0, leader, 0))

    def _note(self, entry: Entry) -> Entry:
        del self._rows[0]
        self._num_running += 1
        self._entries.append(entry)
        self._woken.update(entry.shared.tolist())
        return entry

    def _num_idle(self, shared: np.ndarray) -> int:
        """Free blocks among those to be shared that no entry before has woken."""
        idle = shared[self._memory.pool.ref_count[shared] == 0]
        return sum(block not in self._woken for block in idle.tolist())

    def _source(self, sequence: Sequence) -> tuple[np.ndarray, int, int] | None:
        """Blocks to share, tokens that they and host memory hold, row to fork from; None: better wait."""
        if sequence.swapped is not None:
            homes = self._memory.host.on_device(sequence.swapped, self._memory.pool)
            return homes[homes >= 0], sequence.num_swapped, -1
        request, known = sequence.request, sequence.known_token_ids
        if not sequence.has_output:
            siblings = [sibling.row for sibling in request.sequences if sibling.row >= 0]
            if siblings or any(entry.sequence.request is request for entry in self._entries):
                return self._fork(siblings, len(known))
        if not request.reads_cache and not sequence.has_output:
            return _NO_BLOCKS, 0, -1
        hits = self._memory.match(known, request.namespace)
        if self._is_being_computed(known, len(hits), request.namespace):
            return None
        return hits, len(hits) * self._limits.block_size, -1

    def _fork(self, siblings: list[int], num_prompt: int) -> tuple[np.ndarray, int, int] | None:
        """The prompt's blocks of a sibling that has computed them all."""
        for row in siblings:
            if self._sequences.num_computed[row] >= num_prompt:
                num_blocks = blocks_for(num_prompt, self._limits.block_size)
                return self._memory.table.ids[row, :num_blocks].copy(), num_prompt, row
        return None

    def _is_being_computed(self, known: np.ndarray, num_hits: int, salt: bytes) -> bool:
        """Whether a running sequence will enter the block after the hits into the cache soon."""
        if not self._memory.caches:
            return False
        sequences, size = self._sequences, self._limits.block_size
        begin, end = num_hits * size, (num_hits + 1) * size
        if end > len(known):
            return False
        fed = [
            (sequences.sequences[row].request.namespace, sequences.token_ids[row, : sequences.num_known[row]])
            for row in np.flatnonzero(sequences.active & (sequences.num_answered < NO_BOUND)).tolist()
        ]
        fed += [(entry.sequence.request.namespace, entry.sequence.known_token_ids) for entry in self._entries]
        return any(
            other_salt == salt
            and len(tokens) >= end
            and np.array_equal(tokens[begin:end], known[begin:end])
            and np.array_equal(tokens[:begin], known[:begin])
            for other_salt, tokens in fed
        )
