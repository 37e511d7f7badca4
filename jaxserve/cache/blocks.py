"""`BlockPool`: which KV blocks are free, how many holders each of the others has, and whose content is kept.

Owns ids and counts. It knows neither the device's memory, nor who holds a block (`block_table` does), nor what is in
it (`prefix` does).
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from jaxserve.cache.release_order import ReleaseOrder

NULL_BLOCK = 0  # what padding points to; never handed out, so that a wrong read meets zeros and not a tenant

_Counts = TypeVar("_Counts", int, np.ndarray)


def blocks_for(num_tokens: _Counts, block_size: int) -> _Counts:
    """How many blocks hold `num_tokens` tokens: an int, or an array of them."""
    return (num_tokens + (block_size - 1)) // block_size


class BlockPool:
    """Hands out block ids: those without content first, then those whose content was used longest ago.

    A block without holders is free. If its content is kept it can still be shared, until it is handed out anew.
    Ids come as intp: numpy indexes with it in a fifth of the time that int32 takes.

    Attributes:
        num_blocks: P, the null block included.
        ref_count: int32[P] holders of each block; 0 for free ones, 1 always for the null block.
        generation: int64[P] raised whenever the block is handed out: with another one, its content is another.
        is_kept: bool[P] the content is worth keeping when nobody holds it.
    """

    def __init__(self, num_blocks: int):
        assert num_blocks >= 2, f"{num_blocks} blocks: one is the null block, at least one must be usable"
        self.num_blocks = num_blocks
        self.ref_count = np.zeros(num_blocks, np.int32)
        self.ref_count[NULL_BLOCK] = 1
        self.generation = np.zeros(num_blocks, np.int64)
        self._clock = 0  # no block's generation is higher
        self.is_kept = np.zeros(num_blocks, bool)
        # Free ids without content stand in a ring, oldest first: taken at its head, returned at its tail, in slices.
        self._ring = np.arange(1, num_blocks, dtype=np.intp)
        self._head = 0
        self._num_empty = num_blocks - 1
        self._kept = ReleaseOrder(num_blocks)
        self._last_index = np.zeros(num_blocks, np.intp)  # scratch of `_count`

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out when nothing runs."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, those whose content is kept included."""
        return self._num_empty + self._kept.count

    @property
    def num_kept_free(self) -> int:
        """Free blocks whose content is kept."""
        return self._kept.count

    def allocate(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Hands out blocks, each with one holder.

        Returns: intp[count] their ids; intp[e] those among them whose content was kept until now.
        Cost: four slices, whatever the count.
        """
        assert 0 <= count <= self.num_free, f"{count} blocks asked, {self.num_free} free"
        num_empty = min(count, self._num_empty)
        end = self._head + num_empty
        ids = self._ring[self._head : end].copy()
        if end > len(self._ring):
            ids = np.concatenate([ids, self._ring[: end - len(self._ring)]])
        self._head = end % len(self._ring)
        self._num_empty -= num_empty
        evicted = ids[:0]
        if num_empty < count:
            evicted = self._kept.pop(count - num_empty)
            self.is_kept[evicted] = False
            ids = np.concatenate([ids, evicted]) if num_empty else evicted
        self.ref_count[ids] = 1
        self._clock += 1
        self.generation[ids] = self._clock  # a third of the time of adding one to each
        return ids, evicted

    def share(self, ids: np.ndarray) -> None:
        """Gives each block one holder more; a block may occur several times. Free ones must have kept content."""
        ids, before, _ = self._count(ids, 1)
        idle = ids[before == 0]
        if len(idle):
            self._kept.take_out(idle)

    def free(self, ids: np.ndarray) -> None:
        """Takes one holder from each block, which may occur several times.

        Those without any are free, in this order (of several occurrences the last counts): give the blocks of a
        sequence from its end to its beginning, so that no block is handed out before those that continue it.

        Cost: ten numpy operations, whatever the count.
        """
        if not len(ids):
            return
        ids, _, counts = self._count(ids, -1)
        assert counts.min() >= 0, f"double free among blocks {ids}"
        assert self.ref_count[NULL_BLOCK] == 1, "the null block was freed"
        idle = ids[counts == 0]
        kept = self.is_kept[idle]
        num_kept = np.count_nonzero(kept)
        if num_kept:
            self._kept.push(idle[kept])
        if num_kept < len(idle):
            self._push_empty(idle[~kept])

    def keep(self, ids: np.ndarray) -> None:
        """Marks held blocks: their content is worth keeping."""
        assert np.count_nonzero(self.ref_count[ids]) == len(ids), f"blocks {ids} are not all held"
        self.is_kept[ids] = True

    def drop(self, ids: np.ndarray) -> None:
        """The content of these kept blocks, distinct ones, is worth nothing any more."""
        assert self.is_kept[ids].all(), f"blocks {ids} are not all kept"
        self.is_kept[ids] = False
        idle = ids[self.ref_count[ids] == 0]
        self._kept.take_out(idle)
        self._push_empty(idle)

    def lose_content(self) -> None:
        """Every block's content is gone: as if all had been handed out anew."""
        self.drop(np.flatnonzero(self.is_kept))
        self._clock += 1
        self.generation[:] = self._clock

    def has_content(self, ids: np.ndarray, generations: np.ndarray) -> np.ndarray:
        """bool[n]: whether each block still has what it had in that generation, and can be shared."""
        here = (self.ref_count[ids] > 0) | self.is_kept[ids]
        return here & (self.generation[ids] == generations)

    def _count(self, ids: np.ndarray, change: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Adds to the holders of each block as often as it occurs.

        Returns: intp[d] the blocks without repetition, each where it stands last; their holders before, and now.
        """
        ids = ids.astype(np.intp)
        indices = np.arange(len(ids))
        self._last_index[ids] = indices  # numpy writes in order: the last of several stays
        is_last = self._last_index[ids] == indices
        if np.count_nonzero(is_last) == len(ids):  # no block twice, as nearly always: `add.at` takes ten times as long
            before = self.ref_count[ids]
            after = self.ref_count[ids] = before + change
            return ids, before, after
        distinct = ids[is_last]
        before = self.ref_count[distinct]
        np.add.at(self.ref_count, ids, change)
        return distinct, before, self.ref_count[distinct]

    def _push_empty(self, ids: np.ndarray) -> None:
        tail = (self._head + self._num_empty) % len(self._ring)
        first = min(len(ids), len(self._ring) - tail)
        self._ring[tail : tail + first] = ids[:first]
        self._ring[: len(ids) - first] = ids[first:]
        self._num_empty += len(ids)

    def check_integrity(self, holders: np.ndarray) -> None:
        """Asserts I1 to I4: counts, and each block in exactly one of null, empty and free, kept and free, held.

        Args:
            holders: int64[P] holders of each block, counted from scratch by who knows them.
        """
        assert holders[NULL_BLOCK] == 0, "the null block is held"
        assert self.ref_count[NULL_BLOCK] == 1, "the null block's count moved"
        assert not self.is_kept[NULL_BLOCK], "the null block is kept"
        wrong = np.flatnonzero(self.ref_count[1:] != holders[1:]) + 1
        assert not len(wrong), f"blocks {wrong}: counted {self.ref_count[wrong]}, held {holders[wrong]}"
        places = np.arange(self._head, self._head + self._num_empty) % len(self._ring)
        empty = np.sort(self._ring[places])
        free = self.ref_count == 0
        assert np.array_equal(empty, np.flatnonzero(free & ~self.is_kept)), f"{empty} are not the empty free blocks"
        self._kept.check_integrity()
        kept = np.sort(self._kept.in_order())
        assert np.array_equal(kept, np.flatnonzero(free & self.is_kept)), f"{kept} are not the kept free blocks"
