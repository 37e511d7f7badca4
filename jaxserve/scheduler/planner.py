"""From the tables to one step's `StepPlan`.

Owns the composition of a step: decode rows, then prefill chunks, then admissions, within the token budget and
the free blocks. Pure: it reads the tables, takes nothing and changes nothing. Who goes first is `policy`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jaxserve.cache.block_table import BlockTable
from jaxserve.cache.blocks import BlockPool, blocks_for
from jaxserve.scheduler import policy
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.policy import SchedulerLimits
from jaxserve.scheduler.sequences import SequenceTable, WaitingQueue


def _frozen(values: np.ndarray | tuple, dtype: type = np.int32) -> np.ndarray:
    """The values as a read-only array."""
    array = np.asarray(values, dtype)
    array.flags.writeable = False
    return array


_NOTHING = _frozen(())
_NO_FLAGS = _frozen((), bool)


@dataclass(frozen=True, slots=True)
class SchedulerView:
    """The tables that a plan is made from."""

    limits: SchedulerLimits
    sequences: SequenceTable
    block_table: BlockTable
    pool: BlockPool
    waiting: WaitingQueue


@dataclass(slots=True)
class _Decodes:
    """The decode half of a plan in the making: rows, their positions, and which of them open a block."""

    rows: np.ndarray
    positions: np.ndarray
    opens_block: np.ndarray

    @property
    def needy_rows(self) -> np.ndarray:
        return self.rows[self.opens_block]

    def without(self, rows: np.ndarray) -> _Decodes:
        keep = ~np.isin(self.rows, rows)
        return _Decodes(self.rows[keep], self.positions[keep], self.opens_block[keep])


@dataclass(slots=True)
class _Prefills:
    """The prefill half of a plan in the making: chunks, and what is left for more.

    Attributes:
        token_budget: tokens that the step can still take.
        num_free: blocks that nothing in the step has taken yet.
        chunks: (row, start, length, whether it samples) of each chunk.
        new_blocks: (row, columns in use, columns it adds) of each chunk.
    """

    block_size: int
    token_budget: int
    num_free: int
    chunks: list[tuple[int, int, int, bool]] = field(default_factory=list)
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)

    def feed(self, row: int, start: int, num_known: int, num_blocks: int) -> bool:
        """Takes as long a chunk as budget and blocks allow; false if not even one token."""
        reach = (num_blocks + self.num_free) * self.block_size
        length = min(num_known - start, self.token_budget, reach - start)
        if length <= 0:
            return False
        added = blocks_for(start + length, self.block_size) - num_blocks
        self.chunks.append((row, start, length, start + length == num_known))
        self.new_blocks.append((row, num_blocks, added))
        self.token_budget -= length
        self.num_free -= added
        return True


def plan_step(view: SchedulerView, step: int) -> StepPlan:
    """The next step's plan.

    Cost: a decode iteration touches no Python object of a sequence; prefill rows and admissions are looped over.
    """
    decodes, evicted = _plan_decodes(view)
    num_free = view.pool.num_free - int(np.count_nonzero(decodes.opens_block))
    if len(evicted):
        num_free += int(view.block_table.num_blocks[evicted].sum())
    budget = view.limits.max_num_batched_tokens - len(decodes.rows)
    prefills = _Prefills(view.limits.block_size, budget, num_free)
    _feed_running(view, prefills, evicted)
    admitted: tuple[int, ...] = ()
    if len(view.waiting) and not len(evicted):  # what gave way would only come back to give way again
        admitted = _feed_admitted(view, prefills, num_free)
    return _assemble(view, step, decodes, prefills, admitted, evicted)


def _plan_decodes(view: SchedulerView) -> tuple[_Decodes, np.ndarray]:
    """The decode rows that have their blocks, and the rows that give way for that."""
    sequences, table = view.sequences, view.block_table
    rows = sequences.decode_rows()
    positions = sequences.num_tokens[rows] - 1
    # A row's blocks hold its computed tokens exactly, so one is missing where a position starts a block.
    decodes = _Decodes(rows, positions, (positions & (view.limits.block_size - 1)) == 0)
    shortage = int(np.count_nonzero(decodes.opens_block)) - view.pool.num_free
    if shortage <= 0:
        return decodes, rows[:0]
    evicted = policy.victims(sequences, table, decodes.needy_rows, shortage)
    return decodes.without(evicted), evicted


def _feed_running(view: SchedulerView, prefills: _Prefills, evicted: np.ndarray) -> None:
    """Feeds rows in prefill, most senior first.

    One that finds no block waits with what it has: its blocks were free when it was admitted, so they come
    back when the decode rows that took them end or give way.
    """
    sequences = view.sequences
    rows = sequences.prefill_rows()
    if len(evicted):
        rows = rows[~np.isin(rows, evicted)]
    if len(rows) == 0:
        return
    for row in policy.by_seniority(sequences, rows).tolist():
        start, known = int(sequences.num_computed[row]), int(sequences.num_known[row])
        if not prefills.feed(row, start, known, int(view.block_table.num_blocks[row])):
            return


def _feed_admitted(view: SchedulerView, prefills: _Prefills, num_free: int) -> tuple[int, ...]:
    """Feeds the queue's first sequences, as many as may enter; returns the rows they get.

    Args:
        num_free: free blocks when the step's decode rows have theirs.
    """
    if not len(view.waiting) or not prefills.token_budget:
        return ()
    admission = policy.Admission(view.limits, view.sequences, view.block_table, num_free)
    admitted = []
    for row, sequence in zip(np.flatnonzero(~view.sequences.active).tolist(), view.waiting, strict=False):
        if not prefills.token_budget or not admission.admit(sequence):
            break
        fed = prefills.feed(row, 0, len(sequence.known_token_ids), 0)
        assert fed, f"row {row} was admitted without a free block"
        admitted.append(row)
    return tuple(admitted)


def _assemble(
    view: SchedulerView,
    step: int,
    decodes: _Decodes,
    prefills: _Prefills,
    admitted: tuple[int, ...],
    evicted: np.ndarray,
) -> StepPlan:
    """The finished plan; block ids are those that the pool will give out after the victims' return to it."""
    rows = decodes.rows
    chunk_rows = starts = lens = block_rows = block_cols = block_ids = _NOTHING
    samples = _NO_FLAGS
    if decodes.opens_block.any():
        block_rows = decodes.needy_rows
        block_cols = decodes.positions[decodes.opens_block] // view.limits.block_size
    if prefills.chunks:
        chunk_rows, starts, lens, samples = (_frozen(column) for column in zip(*prefills.chunks, strict=True))
        samples = _frozen(samples, bool)
        rows = np.concatenate([rows, chunk_rows])
        block_rows, block_cols = _with_prefill_blocks(block_rows, block_cols, prefills.new_blocks)
    if len(block_rows):
        block_ids = _frozen(_next_blocks(view, evicted, len(block_rows)))
    gave_way = view.sequences.requests[evicted] if len(evicted) else ()
    return StepPlan(
        step=step,
        decode_rows=_frozen(decodes.rows),
        decode_positions=_frozen(decodes.positions),
        prefill_rows=chunk_rows,
        prefill_starts=starts,
        prefill_lens=lens,
        prefill_samples=samples,
        block_rows=_frozen(block_rows),
        block_cols=_frozen(block_cols),
        block_ids=block_ids,
        admitted=admitted,
        preempted=tuple(request.request_id for request in gave_way),
        generations=_frozen(view.sequences.generation[rows]),
    )


def _with_prefill_blocks(
    block_rows: np.ndarray, block_cols: np.ndarray, new_blocks: list[tuple[int, int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """The decode rows' new table entries, followed by those of the prefill chunks."""
    rows, used, added = np.array(new_blocks).T
    runs = [np.arange(first, first + count) for first, count in zip(used, added, strict=True)]
    return np.concatenate([block_rows, np.repeat(rows, added)]), np.concatenate([block_cols, *runs])


def _next_blocks(view: SchedulerView, evicted: np.ndarray, count: int) -> np.ndarray:
    """int32[count]: what the pool gives out once the evicted rows' blocks are back in it."""
    num_free = view.pool.num_free
    if count <= num_free:
        return view.pool.peek(count)
    returned = view.block_table.blocks_of(evicted)[: count - num_free]
    return np.concatenate([view.pool.peek(num_free), returned])
