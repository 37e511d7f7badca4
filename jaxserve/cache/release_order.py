"""`ReleaseOrder`: blocks in the order in which their last holder left, any of which may be taken out again.

A ring of (block, stamp) entries and the newest stamp of each block: an entry whose stamp is not its block's is dead and
skipped. Taking a block out is one write; nothing is moved, so everything is numpy in bulk and O(1) a block, amortised.
"""

from __future__ import annotations

import numpy as np

_NOT_HERE = 0


class ReleaseOrder:
    """Blocks without holders whose content is kept, least recently used first.

    Attributes:
        count: blocks in it.
    """

    def __init__(self, num_blocks: int):
        self.count = 0
        # Room for every block twice: a pack-up, which costs one pass, comes after num_blocks pushes at the earliest.
        self._ids = np.empty(2 * num_blocks, np.intp)
        self._stamps = np.empty(2 * num_blocks, np.int64)
        self._head = self._tail = 0
        self._stamp_of = np.full(num_blocks, _NOT_HERE, np.int64)
        self._clock = 0

    def __contains__(self, block: int) -> bool:
        return bool(self._stamp_of[block] != _NOT_HERE)

    def push(self, ids: np.ndarray) -> None:
        """Puts blocks at the end, in this order; they are distinct and not in it."""
        count = len(ids)
        if self._tail + count > len(self._ids):
            self._pack_up()
        stamps = np.arange(self._clock + 1, self._clock + count + 1)
        self._ids[self._tail : self._tail + count] = ids
        self._stamps[self._tail : self._tail + count] = stamps
        self._stamp_of[ids] = stamps
        self._clock += count
        self._tail += count
        self.count += count

    def take_out(self, ids: np.ndarray) -> None:
        """Removes distinct blocks that are in it, wherever they stand."""
        assert np.count_nonzero(self._stamp_of[ids]) == len(ids), f"blocks {ids} are not all here"
        self._stamp_of[ids] = _NOT_HERE
        self.count -= len(ids)

    def pop(self, count: int) -> np.ndarray:
        """intp[count]: takes out those released longest ago."""
        assert count <= self.count, f"{count} blocks asked, {self.count} here"
        found = []
        missing = count
        while missing:
            end = min(self._head + max(missing, 64), self._tail)
            window = self._ids[self._head : end]
            live = (self._stamp_of[window] == self._stamps[self._head : end]).nonzero()[0][:missing]
            self._head = self._head + int(live[-1]) + 1 if len(live) == missing else end
            found.append(window[live])
            missing -= len(live)
        ids = found[0] if len(found) == 1 else np.concatenate([self._ids[:0], *found])
        self._stamp_of[ids] = _NOT_HERE
        self.count -= count
        return ids

    def in_order(self) -> np.ndarray:
        """intp[count]: the blocks, least recently used first."""
        window = self._ids[self._head : self._tail]
        return window[self._stamp_of[window] == self._stamps[self._head : self._tail]]

    def _pack_up(self) -> None:
        """Moves the live entries to the front."""
        ids = self.in_order()
        self._ids[: len(ids)] = ids
        self._stamps[: len(ids)] = self._stamp_of[ids]
        self._head, self._tail = 0, len(ids)

    def check_integrity(self) -> None:
        """Asserts that the blocks with a stamp are those with one live entry."""
        ids = self.in_order()
        assert len(ids) == self.count, f"{len(ids)} entries live, {self.count} counted"
        assert np.array_equal(np.sort(ids), np.flatnonzero(self._stamp_of)), "a stamp without its entry"
        stamps = self._stamp_of[ids]
        assert (stamps[1:] > stamps[:-1]).all(), "out of order"
