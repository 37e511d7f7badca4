"""`HostPool`: which slots of host memory hold which blocks of preempted sequences.

Owns slots and counts, and for each slot where the same content lies on the device. It moves no bytes: the engine's
`SwapStore` does.
"""

from __future__ import annotations

import numpy as np

from jaxserve.cache.blocks import BlockPool

_NOWHERE = -1


class HostPool:
    """Slots for blocks, each held by the sequences whose content it has.

    A full block never changes, so one slot serves all sequences that shared it when they were preempted, and a
    sequence that comes back shares the block again if it is still on the device, or if another brought it back: what
    was shared stays shared, and is copied once.

    Attributes:
        num_slots: H.
        ref_count: int32[H] sequences that hold each slot.
    """

    def __init__(self, num_slots: int, num_blocks: int):
        self.num_slots = num_slots
        self.ref_count = np.zeros(num_slots, np.int32)
        self._free = np.arange(num_slots - 1, -1, -1, dtype=np.int32)  # a stack: warm pages are used again first
        self._num_free = num_slots
        self._home = np.full(num_slots, _NOWHERE, np.int32)  # the block with the same content, if it still has it
        self._home_generation = np.zeros(num_slots, np.int64)
        self._slot_of_block = np.full(num_blocks, _NOWHERE, np.int32)

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_used(self) -> int:
        return self.num_slots - self._num_free

    def copied(self, blocks: np.ndarray, pool: BlockPool) -> np.ndarray:
        """int32[n]: the slot that has each block's present content already, -1 where none has."""
        slots = self._slot_of_block[blocks]
        if self.num_slots:
            current = (slots != _NOWHERE) & (self._home_generation[slots] == pool.generation[blocks])
            slots = np.where(current & (self._home[slots] == blocks), slots, _NOWHERE)
        return slots

    def take(self, blocks: np.ndarray, num_full: int, pool: BlockPool) -> tuple[np.ndarray, np.ndarray]:
        """Gives a sequence a hold on slots for its blocks.

        Args:
            blocks: int32[n] the sequence's blocks; the first `num_full` are full and will not change.

        Returns: int32[n] slots; bool[n] which of them the blocks must be copied to.
        """
        slots = self.copied(blocks, pool)
        slots[num_full:] = _NOWHERE
        missing = slots == _NOWHERE
        count = int(missing.sum())
        assert count <= self._num_free, f"{count} slots asked, {self._num_free} free"
        new = self._free[self._num_free - count : self._num_free].copy()
        self._num_free -= count
        slots[missing] = new
        self.ref_count[slots] += 1
        self.settle(slots[:num_full], blocks[:num_full], pool)
        return slots, missing

    def settle(self, slots: np.ndarray, blocks: np.ndarray, pool: BlockPool) -> None:
        """Notes that these full blocks have the content of these slots."""
        old = self._home[slots]
        old_home = old[old != _NOWHERE]
        stale = old_home[self._slot_of_block[old_home] == slots[old != _NOWHERE]]
        self._slot_of_block[stale] = _NOWHERE
        self._home[slots] = blocks
        self._home_generation[slots] = pool.generation[blocks]
        self._slot_of_block[blocks] = slots

    def on_device(self, slots: np.ndarray, pool: BlockPool) -> np.ndarray:
        """int32[n]: the blocks that have a sequence's content and can be shared, -1 from the first that is missing on.

        A sequence never holds a block without those before it: the cache gives them back in that order.
        """
        homes = self._home[slots]
        here = (homes != _NOWHERE) & pool.has_content(homes, self._home_generation[slots])
        return np.where(np.logical_and.accumulate(here), homes, _NOWHERE).astype(np.int32)

    def release(self, slots: np.ndarray) -> None:
        """Takes one holder from each slot; those without any are free."""
        self.ref_count[slots] -= 1
        assert (self.ref_count[slots] >= 0).all(), f"double release among slots {slots}"
        free = slots[self.ref_count[slots] == 0]
        homes = self._home[free]
        known = homes != _NOWHERE
        stale = homes[known][self._slot_of_block[homes[known]] == free[known]]
        self._slot_of_block[stale] = _NOWHERE
        self._home[free] = _NOWHERE
        self._free[self._num_free : self._num_free + len(free)] = free
        self._num_free += len(free)

    def check_integrity(self, holders: np.ndarray) -> None:
        """Asserts I12: counts, and each slot either free or held.

        Args:
            holders: int64[H] sequences that hold each slot, counted from scratch.
        """
        assert np.array_equal(self.ref_count, holders), "slots are not counted as they are held"
        free = np.sort(self._free[: self._num_free])
        assert np.array_equal(free, np.flatnonzero(holders == 0)), "the free slots are not those without holder"
        mapped = (self._slot_of_block != _NOWHERE).nonzero()[0]
        slots = self._slot_of_block[mapped]
        assert (self._home[slots] == mapped).all(), "a block is mapped to a slot of another"
        assert (self.ref_count[slots] > 0).all(), "a block is mapped to a free slot"
