"""What must hold between the scheduler's tables, whatever has happened: checked from scratch.

Property tests ask after every operation, the idle engine asks itself. The names I1 to I21 are those of
`docs/kv-memory.md`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from jaxserve.cache.blocks import blocks_for
from jaxserve.cache.kv_memory import KVMemory
from jaxserve.scheduler import policy
from jaxserve.scheduler.sequences import Request, SequenceTable
from jaxserve.scheduler.waiting import WaitingQueue


def check_integrity(
    sequences: SequenceTable,
    memory: KVMemory,
    waiting: WaitingQueue,
    requests: Iterable[Request],
    num_in_flight: int,
) -> None:
    """Asserts the invariants of every table and those between them."""
    sequences.check_integrity(num_in_flight, memory.block_size)
    waiting.check_integrity()
    memory.check_integrity(s.swapped for s in waiting if s.swapped is not None)
    wanted = blocks_for(sequences.num_computed, memory.block_size)
    assert np.array_equal(memory.table.num_blocks, wanted), "rows do not hold the blocks of their tokens (I9)"
    running = sequences.sequences[sequences.active].tolist()
    here = [*running, *waiting]
    ours = [s for request in requests for s in request.sequences]
    assert len(here) == len(ours), "a sequence is lost, or here twice"
    assert set(map(id, here)) == set(map(id, ours)), "a sequence is here that nobody asked for"
    assert all(a.place < b.place for a, b in pairwise(ours)), "requests are out of order"
    assert all(s.num_preemptions <= policy.MAX_PREEMPTIONS for s in here), "preempted too often (I18)"
    assert sequences.num_reserved.sum() <= memory.pool.num_usable, "more is reserved than there is"
    _check_writable(sequences, memory)
    for row in np.flatnonzero(sequences.active).tolist():
        _check_published(sequences, memory, row)
    _check_line(sequences, waiting)


def _check_writable(sequences: SequenceTable, memory: KVMemory) -> None:
    """A row whose next token goes to a block of others, or to a cached one, knows it (I7, I8)."""
    rows = sequences.decode_rows()
    positions = sequences.num_tokens[rows] - 1
    inside = positions % memory.block_size != 0
    tails = memory.table.ids[rows[inside], positions[inside] // memory.block_size]
    shared = (memory.pool.ref_count[tails] > 1) | memory.pool.is_kept[tails]
    assert sequences.shares_tail[rows[inside][shared]].all(), f"blocks {tails[shared]} are written without a copy"
    rows = sequences.prefill_rows()
    starts = sequences.num_computed[rows]
    inside = starts % memory.block_size != 0
    tails = memory.table.ids[rows[inside], starts[inside] // memory.block_size]
    shared = (memory.pool.ref_count[tails] > 1) | memory.pool.is_kept[tails]
    assert not shared.any(), f"blocks {tails[shared]} are written by a prefill, which never copies"


def _check_published(sequences: SequenceTable, memory: KVMemory, row: int) -> None:
    """What the cache says of the row's published blocks is what they hold (I5)."""
    num_published = int(sequences.num_published[row])
    num_full = int(sequences.num_computed[row]) // memory.block_size
    assert num_published <= num_full, f"row {row} counts {num_published} cached blocks of {num_full} full ones"
    blocks = memory.table.row(row)[:num_published]
    kept = memory.pool.is_kept[blocks]
    num_kept = int(np.count_nonzero(kept))  # fewer if the cache was reset, or lost the prefix by a fault of another
    assert kept[:num_kept].all(), f"row {row} holds cached blocks after others that are not: {blocks}, {kept}"
    tokens = sequences.token_ids[row, : num_kept * memory.block_size]
    found = memory.match(tokens, sequences.sequences[row].request.namespace)
    assert np.array_equal(found, blocks[:num_kept]), f"row {row} holds {blocks}, the cache says {found}"


def _check_line(sequences: SequenceTable, waiting: WaitingQueue) -> None:
    """Nobody was overtaken by more than the choice of victims allows (I17)."""
    in_line = sequences.active & ~sequences.is_protected & ~sequences.is_ending()
    places = np.sort(sequences.place[in_line])
    if not len(places) or not len(waiting):
        return
    bounds = [policy.VICTIM_WINDOW if sequence.num_preemptions else 1 for sequence in waiting]
    num_younger = len(places) - np.searchsorted(places, [sequence.place for sequence in waiting])
    assert (num_younger < bounds).all(), f"{num_younger} overtook those that wait, at most {bounds} less 1 may"
