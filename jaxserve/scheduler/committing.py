"""Carrying a `Decision` out on the tables: what `Scheduler.commit` does, and the `StepPlan` that comes of it.

The order matters. Who gives way comes first, for what they give back; then cached blocks that somebody will share are
held, so that no allocation takes them; then blocks are handed out.
"""

from __future__ import annotations

import numpy as np

from jaxserve.cache.blocks import blocks_for
from jaxserve.cache.kv_memory import KVMemory
from jaxserve.scheduler.decision import Chunk, Decision, Entry
from jaxserve.scheduler.plan import NO_FLAGS, NO_IDS, Admitted, Preempted, StepPlan, frozen
from jaxserve.scheduler.sequences import Sequence, SequenceTable
from jaxserve.scheduler.waiting import WaitingQueue

_Pairs = tuple[np.ndarray, np.ndarray]
_Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_NO_CHUNKS: _Columns = (NO_IDS, NO_IDS, NO_IDS, NO_FLAGS, NO_FLAGS, NO_IDS)


def commit(decision: Decision, sequences: SequenceTable, memory: KVMemory, waiting: WaitingQueue) -> StepPlan:
    """Changes the tables as decided."""
    preempted, swap_out = _make_way(decision, sequences, memory, waiting)
    held = _hold_cached(decision.entries, memory)
    copies = _copy_on_write(decision, sequences, memory)
    rows = decision.opening_rows
    cols = memory.table.num_blocks[rows]
    ids = memory.extend(rows, cols)
    swap_in = _let_in(decision.entries, sequences, memory, waiting)
    if decision.chunks:
        more_rows, more_cols, more_ids = _extend_chunks(decision, memory)
        rows, cols = np.concatenate([rows, more_rows]), np.concatenate([cols, more_cols])
        ids = np.concatenate([ids, more_ids])
    if len(held):
        memory.let_go(held)
    if memory.table.has_replaced:
        more_rows, more_cols = memory.table.take_replaced()
        rows, cols = np.concatenate([rows, more_rows]), np.concatenate([cols, more_cols])
        ids = np.concatenate([ids, memory.table.ids[more_rows, more_cols]])
    for array in (rows, cols, ids):
        array.setflags(write=False)
    # By place: names would take 0.7 us more in each step.
    return StepPlan(
        decision.step,
        decision.decodes.rows,
        decision.decode_positions,
        decision.num_steps,
        *_columns(decision.chunks, sequences),
        *(rows, cols, ids),
        *copies,
        *swap_out,
        *swap_in,
        _admitted(decision.entries, memory) if decision.entries else (),
        decision.beam_groups,
        preempted,
    )


def _admitted(entries: tuple[Entry, ...], memory: KVMemory) -> tuple[Admitted, ...]:
    return tuple(Admitted(entry.row, frozen(memory.table.row(entry.row).copy()), entry.num_stored) for entry in entries)


def send_back(sequences: SequenceTable, memory: KVMemory, waiting: WaitingQueue, rows: np.ndarray) -> list[Sequence]:
    """Returns the rows' sequences to their places in the queue with the tokens that the host knows.

    Beams go back to their prompt: nothing of a search has been shown to anybody before its end.
    """
    gone = sequences.sequences[rows].tolist()
    for sequence in gone:
        prompt = sequence.request.prompt_token_ids
        known = sequences.known_token_ids(sequence.row)
        sequence.known_token_ids = known if sequence.request.beam is None else np.array(prompt, np.int32)
    if len(rows):
        memory.release(rows)
        sequences.release(rows)
    for sequence in gone:
        waiting.push(sequence)
    return gone


def _make_way(
    decision: Decision, sequences: SequenceTable, memory: KVMemory, waiting: WaitingQueue
) -> tuple[tuple[Preempted, ...], _Pairs]:
    """Takes the victims' rows away; returns who they were, and the blocks to copy out with their slots."""
    if not decision.victims:
        return (), (NO_IDS, NO_IDS)
    out_blocks, out_slots, preempted = [NO_IDS], [NO_IDS], []
    for victim in decision.victims:
        sequence = sequences.at(victim.row)
        sequence.num_preemptions += 1
        # Tokens in flight are dropped: the host does not know them, so their KV is worth nothing.
        num_stored = int(min(sequences.num_computed[victim.row], sequences.num_known[victim.row]))
        ids = memory.table.row(victim.row)[: blocks_for(num_stored, memory.block_size)]
        num_full = num_stored // memory.block_size
        # Entered into the cache a moment ago, the row may have got other blocks, of which fewer have a copy.
        swaps = victim.swaps and memory.num_to_copy(ids, num_full) <= memory.host.num_free
        if swaps:
            sequence.swapped, slots, blocks = memory.save(ids, num_full)
            sequence.num_swapped = num_stored
            out_blocks.append(blocks)
            out_slots.append(slots)
        preempted.append(Preempted(sequence.request.request_id, sequence.index, swaps))
    send_back(sequences, memory, waiting, np.array([victim.row for victim in decision.victims], np.intp))
    return tuple(preempted), (frozen(np.concatenate(out_blocks)), frozen(np.concatenate(out_slots)))


def _hold_cached(entries: tuple[Entry, ...], memory: KVMemory) -> np.ndarray:
    """Holds the free blocks among those that the entries will share; returns them."""
    if not entries:
        return NO_IDS
    shared = np.unique(np.concatenate([entry.shared for entry in entries]))
    idle = shared[memory.pool.ref_count[shared] == 0]
    memory.hold(idle)
    return idle


def _copy_on_write(decision: Decision, sequences: SequenceTable, memory: KVMemory) -> _Pairs:
    """Blocks of their own for decode rows that are about to write to one that others hold; sources and targets."""
    if sequences.has_shared_tails:
        sequences.own_tails(decision.decode_rows)  # each has one after this
    if not len(decision.copy_rows):
        return NO_IDS, NO_IDS
    position_of = dict(zip(decision.decode_rows.tolist(), decision.decode_positions.tolist(), strict=True))
    copies = [memory.copy_on_write(row, position_of[row] // memory.block_size) for row in decision.copy_rows.tolist()]
    pairs = np.array([copy for copy in copies if copy is not None], np.int32).reshape(-1, 2)
    return frozen(pairs[:, 0]), frozen(pairs[:, 1])


def _let_in(entries: tuple[Entry, ...], sequences: SequenceTable, memory: KVMemory, waiting: WaitingQueue) -> _Pairs:
    """Gives the entries their rows and what is stored of them; returns the slots and blocks to copy in."""
    if not entries:
        return NO_IDS, NO_IDS
    in_slots, in_blocks = [NO_IDS], [NO_IDS]
    for entry in entries:
        sequence, row = entry.sequence, entry.row
        waiting.remove(sequence)
        restored = sequence.swapped is not None
        if sequence.swapped is not None:
            slots, blocks = memory.restore(row, sequence.swapped, entry.num_stored // memory.block_size)
            in_slots.append(slots)
            in_blocks.append(blocks)
            sequence.swapped, sequence.num_swapped = None, 0
        else:
            memory.share(row, entry.shared)
        sequences.admit(row, sequence, entry.num_stored)
        if entry.num_reserved >= 0:
            sequences.protect(row, entry.num_reserved)
        if entry.fork_of >= 0:
            num_full = entry.num_stored // memory.block_size
            sequences.num_published[row] = min(int(sequences.num_published[entry.fork_of]), num_full)
            # Whoever of them holds the last block now: in this very commit it may have passed to another.
            sequences.share_tails([s.row for s in sequence.request.sequences if s.row >= 0])
        elif not restored:
            sequences.num_published[row] = len(entry.shared)
    return frozen(np.concatenate(in_slots)), frozen(np.concatenate(in_blocks))


def _extend_chunks(decision: Decision, memory: KVMemory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gives the chunks their new blocks; returns rows, columns and ids, those of admitted rows left out."""
    new_rows = {entry.row for entry in decision.entries}
    running = [c for c in decision.chunks if c.row not in new_rows]
    rows, cols = _new_entries(running)
    ids = memory.extend(rows, cols)
    memory.extend(*_new_entries([c for c in decision.chunks if c.row in new_rows]))
    return rows, cols, ids


def _new_entries(chunks: list[Chunk]) -> _Pairs:
    """Rows and columns of the block table that the chunks add."""
    if not chunks:
        return NO_IDS, NO_IDS
    rows = np.repeat([c.row for c in chunks], [c.num_new_blocks for c in chunks])
    cols = np.concatenate([np.arange(c.num_blocks, c.num_blocks + c.num_new_blocks) for c in chunks])
    return rows, cols


def _columns(chunks: tuple[Chunk, ...], sequences: SequenceTable) -> _Columns:
    """The chunks as the plan's arrays, `prefill_rows` to `prefill_generations`."""
    if not chunks:
        return _NO_CHUNKS
    rows = [c.row for c in chunks]
    return (
        frozen(rows),
        frozen([c.start for c in chunks]),
        frozen([c.length for c in chunks]),
        frozen([c.samples for c in chunks], bool),
        frozen([c.stored for c in chunks], bool),
        frozen(sequences.generation[rows]),
    )
