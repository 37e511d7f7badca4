"""From the tables to one step's `Decision`.

Owns the composition of a step: decode rows, then prefill chunks, then admissions, within the token budget and
the free blocks. Pure: it reads the tables, takes nothing and changes nothing. Who enters is `admission`'s, who gives
way `policy`'s.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from jaxserve.cache.blocks import blocks_for
from jaxserve.cache.kv_memory import KVMemory
from jaxserve.scheduler import policy
from jaxserve.scheduler.admission import Admission
from jaxserve.scheduler.decision import Chunk, Decision, Entry, Victim
from jaxserve.scheduler.plan import frozen
from jaxserve.scheduler.policy import SchedulerLimits
from jaxserve.scheduler.roster import Roster
from jaxserve.scheduler.sequences import SequenceTable
from jaxserve.scheduler.waiting import WaitingQueue

_NO_ROWS = frozen((), np.intp)


@dataclass(frozen=True, slots=True)
class SchedulerView:
    """The tables that a decision is made from."""

    limits: SchedulerLimits
    sequences: SequenceTable
    memory: KVMemory
    waiting: WaitingQueue


@dataclass(slots=True)
class _Decodes:
    """The decode half of a decision in the making.

    Attributes:
        positions: int32[D] of the token that each row feeds.
        opening_rows: intp[n] the rows whose token is the first of a block.
        copy_rows: rows whose token goes to a block that others hold.
        num_copies: blocks that takes; of the rows that share a block and all write, one keeps it.
    """

    roster: Roster
    positions: np.ndarray
    opening_rows: np.ndarray
    copy_rows: np.ndarray
    num_copies: int

    def num_blocks(self) -> int:
        return len(self.opening_rows) + self.num_copies

    def without(self, rows: list[int]) -> _Decodes:
        keep = ~np.isin(self.roster.rows, rows)
        opening_rows, copy_rows = (
            frozen(some[~np.isin(some, rows)], np.intp) for some in (self.opening_rows, self.copy_rows)
        )
        return _Decodes(
            self.roster.subset(keep), frozen(self.positions[keep]), opening_rows, copy_rows, self.num_copies
        )


@dataclass(slots=True)
class _Prefills:
    """The prefill half of a decision in the making: chunks, and what is left for more.

    Attributes:
        token_budget: tokens that the step can still take.
        num_free: blocks that nothing in the step has taken yet.
    """

    block_size: int
    token_budget: int
    num_free: int
    chunks: list[Chunk] = field(default_factory=list)

    def feed(self, row: int, start: int, num_known: int, num_blocks: int, *, stored: bool, samples: bool) -> bool:
        """Takes as long a chunk as budget and blocks allow; false if not even one token.

        Args:
            samples: whether the last known token is sampled after.
        """
        reach = (num_blocks + self.num_free) * self.block_size
        length = min(num_known - start, self.token_budget, reach - start)
        if length <= 0:
            return False
        added = blocks_for(start + length, self.block_size) - num_blocks
        samples = samples and start + length == num_known
        self.chunks.append(Chunk(row, start, length, samples, stored, num_blocks, added))
        self.token_budget -= length
        self.num_free -= added
        return True


def decide_step(view: SchedulerView, step: int, max_steps: int = 1) -> Decision:
    """The next step's decision.

    Args:
        max_steps: decode steps that the device may run in one loop, at most the tokens of a block. It does where there
            is nothing to do but to decode, nothing waits, and the blocks are free.

    Cost: a decode iteration touches no Python object of a sequence; prefill rows and admissions are looped over.
    """
    decodes, victims, num_free = _plan_decodes(view)
    budget = view.limits.max_num_batched_tokens - len(decodes.roster)
    prefills = _Prefills(view.limits.block_size, budget, num_free)
    if view.sequences.num_prefilling:
        _feed_running(view, prefills, [victim.row for victim in victims])
    entries: list[Entry] = []
    groups: list[tuple[int, ...]] = []
    # What gave way would only come back to give way again.
    if not victims and (len(view.waiting) or view.sequences.has_beams):
        admission = Admission(view.limits, view.sequences, view.memory, num_free)
        groups = _start_searches(view, prefills, admission, entries)
        _feed_admitted(view, prefills, admission, entries)
    num_steps = 1
    if max_steps > 1 and not (prefills.chunks or victims or len(view.waiting)):
        num_steps = _look_ahead(view, decodes, max_steps)
    return Decision(
        step=step,
        decodes=decodes.roster,
        decode_positions=decodes.positions,
        num_steps=num_steps,
        opening_rows=decodes.opening_rows,
        copy_rows=decodes.copy_rows,
        chunks=tuple(prefills.chunks),
        entries=tuple(entries),
        beam_groups=tuple(groups),
        victims=tuple(victims),
    )


def _plan_decodes(view: SchedulerView) -> tuple[_Decodes, list[Victim], int]:
    """The decode rows that have their blocks, the rows that give way for that, and the blocks that stay free."""
    sequences, memory = view.sequences, view.memory
    front = sequences.decoding()
    opening_rows = front.opening_rows(view.limits.block_size)
    copy_rows, num_copies = _rows_to_copy(view, front.roster.rows, front.positions)
    decodes = _Decodes(front.roster, front.positions, opening_rows, copy_rows, num_copies)
    shortage = decodes.num_blocks() - memory.pool.num_free
    if shortage <= 0:
        return decodes, [], -shortage
    needy = np.concatenate([opening_rows, copy_rows])
    victims, num_freed = policy.Victims(sequences, memory, view.limits.costs, needy).choose(shortage)
    gone = [victim.row for victim in victims]
    decodes = decodes.without(gone)
    decodes.num_copies = min(num_copies, len(decodes.copy_rows))
    return decodes, victims, memory.pool.num_free + num_freed - decodes.num_blocks()


def _look_ahead(view: SchedulerView, decodes: _Decodes, max_steps: int) -> int:
    """How many decode steps can follow each other without a look at the host: the most for which blocks are free.

    Marks the rows that open a block in any of them: one at most, with no more steps than a block has tokens.
    """
    sequences, block_size = view.sequences, view.limits.block_size
    # Entries that were replaced go to the device with this step, too: more than a small one has room for.
    if not len(decodes.roster) or view.memory.table.has_replaced or sequences.has_beams:
        return 1
    left = decodes.roster.max_total_len - decodes.positions - 1
    num_steps = min(max_steps, block_size, int(left.max()))
    to_border = -decodes.positions % block_size  # tokens before the first of a block
    while num_steps > 1:
        opens_block = to_border < np.minimum(left, num_steps)
        if int(np.count_nonzero(opens_block)) + decodes.num_copies <= view.memory.pool.num_free:
            decodes.opening_rows = frozen(decodes.roster.rows[opens_block], np.intp)
            return num_steps
        num_steps //= 2
    return 1


def _rows_to_copy(view: SchedulerView, rows: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, int]:
    """The rows whose token goes to a block that others hold, and how many copies that takes."""
    if not view.sequences.has_shared_tails:
        return _NO_ROWS, 0
    block_size = view.limits.block_size
    flagged = view.sequences.shares_tail[rows] & (positions % block_size != 0)
    rows, cols = rows[flagged], positions[flagged] // block_size
    pool = view.memory.pool
    ids = view.memory.table.ids[rows, cols]
    # A sibling that has ended may have entered the block that it shared, filled, into the cache.
    foreign = (pool.ref_count[ids] > 1) | pool.is_kept[ids]
    num_copies = 0
    for block, num_writers in Counter(ids[foreign].tolist()).items():
        num_others = int(pool.ref_count[block]) - 1
        num_copies += num_writers if pool.is_kept[block] else min(num_writers, num_others)
    return frozen(rows[foreign], np.intp), num_copies


def _feed_running(view: SchedulerView, prefills: _Prefills, gone: list[int]) -> None:
    """Feeds rows in prefill, most senior first.

    One that finds no block waits with what it has: its blocks were free when it was admitted, so they come
    back when the decode rows that took them end or give way.
    """
    sequences = view.sequences
    rows = sequences.prefill_rows()
    if gone:
        rows = rows[~np.isin(rows, gone)]
    if len(rows) == 0:
        return
    for row in policy.by_seniority(sequences, rows).tolist():
        start, known = int(sequences.num_computed[row]), int(sequences.num_known[row])
        num_blocks = int(view.memory.table.num_blocks[row])
        samples = not sequences.is_beam[row]
        if not prefills.feed(row, start, known, num_blocks, stored=False, samples=samples):
            return


def _start_searches(
    view: SchedulerView, prefills: _Prefills, admission: Admission, entries: list[Entry]
) -> list[tuple[int, ...]]:
    """Starts the beam searches whose prompt is computed, where there are rows for all their beams.

    Every beam feeds the last prompt token again, whose KV is stored, and so takes part in the first selection.
    """
    groups = []
    sequences = view.sequences
    ready = sequences.is_beam & ~sequences.on_device & (sequences.num_computed == sequences.num_known)
    for leader in np.flatnonzero(ready).tolist():
        others = sequences.sequences[leader].request.sequences[1:]
        if len(others) > admission.num_rows or len(others) + 1 > prefills.token_budget:
            continue
        joined = [admission.enter_beam(sequence, leader) for sequence in others]
        entries += joined
        group = (leader, *(entry.row for entry in joined))
        known = int(sequences.num_known[leader])
        num_blocks = int(view.memory.table.num_blocks[leader])
        for row in group:
            prefills.feed(row, known - 1, known, num_blocks, stored=True, samples=True)
        groups.append(group)
    return groups


def _feed_admitted(view: SchedulerView, prefills: _Prefills, admission: Admission, entries: list[Entry]) -> None:
    """Feeds the queue's first sequences, as many as may enter."""
    starting = {id(entry.sequence) for entry in entries}
    for sequence in view.waiting:
        if id(sequence) in starting:
            continue
        if not prefills.token_budget or not admission.num_rows:
            break
        if sequence.request.beam is not None and sequence.index > 0:
            break  # its search starts with all its beams, as soon as there are rows for them
        entry = admission.enter(sequence)
        if entry is None:
            break
        entries.append(entry)
        prefills.num_free -= entry.num_taken
        known = len(sequence.known_token_ids)
        num_blocks = len(entry.shared) if sequence.swapped is None else len(sequence.swapped)
        fed = prefills.feed(
            entry.row,
            min(entry.num_stored, known - 1),
            known,
            num_blocks,
            stored=entry.num_stored == known,
            samples=sequence.request.beam is None,
        )
        assert fed, f"row {entry.row} was admitted without a free block"
