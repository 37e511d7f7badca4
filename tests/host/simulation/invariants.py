"""What must hold after every operation, counted from scratch and cheaply; `Scheduler.check_integrity` is deeper."""

from __future__ import annotations

import numpy as np

from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.scheduler import Scheduler


def check_counts(scheduler: Scheduler, num_sequences: int) -> None:
    """Asserts I1 to I4, I9, I12 by counts alone, and that nobody is lost.

    Args:
        num_sequences: how many have not ended, as their clients know.
    """
    memory, rows = scheduler.memory, scheduler.sequences
    pool, table, host = memory.pool, memory.table, memory.host
    holders = np.bincount(table.ids.ravel(), minlength=pool.num_blocks)  # unused entries name the null block
    holders[0] = 1
    assert holders.tolist() == pool.ref_count.tolist(), f"held {holders}, counted {pool.ref_count}"
    idle, kept = holders == 0, pool.is_kept
    assert pool.num_free == np.count_nonzero(idle), "free blocks leaked"
    assert pool.num_kept_free == np.count_nonzero(idle & kept), "cached blocks leaked"
    assert len(memory.index) == np.count_nonzero(kept), "the cache names blocks that are not kept"
    num_blocks = np.count_nonzero(table.ids, axis=1).tolist()
    assert num_blocks == table.num_blocks.tolist() == (-(-rows.num_computed // memory.block_size)).tolist(), (
        "rows do not have the blocks of their tokens"
    )
    assert rows.num_active + len(scheduler.waiting) == num_sequences, "a sequence is lost, or here twice"
    if host.num_slots:
        saved = [0] * host.num_slots
        for sequence in scheduler.waiting:
            for slot in () if sequence.swapped is None else sequence.swapped.tolist():
                saved[slot] += 1
        assert saved == host.ref_count.tolist(), "slots are not counted as they are held"
        assert host.num_free == saved.count(0), "slots leaked"


def check_writes(scheduler: Scheduler, plan: StepPlan) -> None:
    """Asserts that the step writes no token to a block that others hold, or that is cached (I7).

    Rows that feed a stored token do not count as others: they write nothing, and read only what was there before.
    """
    memory, size = scheduler.memory, scheduler.limits.block_size
    table = memory.table.ids
    if plan.prefill_stored.any():
        table = table.copy()
        table[plan.prefill_rows[plan.prefill_stored]] = 0
    holders = np.bincount(table.ravel(), minlength=memory.pool.num_blocks)
    last = (
        np.minimum(plan.decode_positions + plan.num_steps, scheduler.sequences.max_total_len[plan.decode_rows] - 1) - 1
    )
    written = [memory.table.ids[plan.decode_rows, position // size] for position in (plan.decode_positions, last)]
    chunks = (plan.prefill_rows, plan.prefill_starts, plan.prefill_lens, plan.prefill_stored)
    for row, start, length, stored in zip(*(column.tolist() for column in chunks), strict=True):
        if not stored:
            written.append(memory.table.ids[row, start // size : (start + length - 1) // size + 1])
    blocks = np.concatenate(written)  # a loop of no more steps than a block has tokens writes to two at most
    assert (holders[blocks] == 1).all(), f"blocks of others are among the written {blocks}"
    assert not memory.pool.is_kept[blocks].any(), f"cached blocks are among the written {blocks}"
