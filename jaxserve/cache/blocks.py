"""`BlockPool`: which KV blocks are free, and how many holders each of the others has.

Owns ids and counts. It knows neither the device's memory nor who holds a block (`block_table` does).
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

NULL_BLOCK = 0  # what padding points to; never handed out, so that a wrong read meets zeros and not a tenant

_Counts = TypeVar("_Counts", int, np.ndarray)


def blocks_for(num_tokens: _Counts, block_size: int) -> _Counts:
    """How many blocks hold `num_tokens` tokens: an int, or an array of them."""
    return (num_tokens + (block_size - 1)) // block_size


class BlockPool:
    """Hands out block ids, oldest freed first.

    The free ids stand in a ring: blocks are taken at its head and returned at its tail, so both are slices,
    and what the next allocations will get can be read before anything is taken.

    Attributes:
        num_blocks: P, the null block included.
        ref_count: int32[P] holders of each block; 0 for free ones, 1 always for the null block.
    """

    def __init__(self, num_blocks: int):
        assert num_blocks >= 2, f"{num_blocks} blocks: one is the null block, at least one must be usable"
        self.num_blocks = num_blocks
        self.ref_count = np.zeros(num_blocks, np.int32)
        self.ref_count[NULL_BLOCK] = 1
        self._ring = np.arange(1, num_blocks, dtype=np.int32)
        self._head = 0
        self._num_free = num_blocks - 1

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out when nothing runs."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return self._num_free

    def peek(self, count: int) -> np.ndarray:
        """int32[count]: the ids that the next `allocate` calls give out, in order. Takes nothing."""
        assert 0 <= count <= self._num_free, f"{count} blocks asked, {self._num_free} free"
        end = self._head + count
        if end <= len(self._ring):
            return self._ring[self._head : end].copy()
        return np.concatenate([self._ring[self._head :], self._ring[: end - len(self._ring)]])

    def allocate(self, count: int) -> np.ndarray:
        """int32[count]: ids of blocks that now have one holder.

        Cost: three slices, whatever the count.
        """
        ids = self.peek(count)
        self.ref_count[ids] = 1
        self._head = (self._head + count) % len(self._ring)
        self._num_free -= count
        return ids

    def free(self, ids: np.ndarray) -> None:
        """Takes one holder from each block; those without any return to the pool in this order.

        Cost: six numpy operations, whatever the count.
        """
        np.subtract.at(self.ref_count, ids, 1)
        counts = self.ref_count[ids]
        assert (counts >= 0).all(), f"double free among blocks {ids}"
        assert self.ref_count[NULL_BLOCK] == 1, "the null block was freed"
        self._push(ids[counts == 0])

    def _push(self, ids: np.ndarray) -> None:
        tail = (self._head + self._num_free) % len(self._ring)
        first = min(len(ids), len(self._ring) - tail)
        self._ring[tail : tail + first] = ids[:first]
        self._ring[: len(ids) - first] = ids[first:]
        self._num_free += len(ids)

    def check_integrity(self, holders: np.ndarray) -> None:
        """Asserts I1 to I4 of the pool: counts, and each block in exactly one of null, free, used.

        Args:
            holders: int32[P] holders of each block, counted from scratch by who knows them.
        """
        assert holders[NULL_BLOCK] == 0, "the null block is held"
        assert self.ref_count[NULL_BLOCK] == 1, "the null block's count moved"
        wrong = np.flatnonzero(self.ref_count[1:] != holders[1:]) + 1
        assert not len(wrong), f"blocks {wrong}: counted {self.ref_count[wrong]}, held {holders[wrong]}"
        free = np.sort(self.peek(self._num_free))
        unheld = np.flatnonzero(self.ref_count == 0)
        assert np.array_equal(free, unheld), f"free list {free} is not the blocks without holder {unheld}"
