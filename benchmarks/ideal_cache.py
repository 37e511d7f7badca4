"""Prefix caches that cost nothing and never make anybody wait: what a real one is measured against.

They hold names of blocks, and know nothing of the scheduler. A name stands for a block and all before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence


class IdealCache:
    """The blocks used last, as many as there is room for.

    Nobody holds a block: whoever runs can lose one from the cache without harm, and needs no room for what the cache
    does not keep. A request's blocks count as used from its end to its beginning, so that a block goes before those
    that it continues.

    Args:
        capacity: blocks; None for no bound.
    """

    def __init__(self, capacity: int | None = None):
        self._capacity = capacity
        self._blocks: OrderedDict[Hashable, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def num_hits(self, names: Sequence[Hashable]) -> int:
        """How many of a request's first blocks are here."""
        return next((index for index, name in enumerate(names) if name not in self._blocks), len(names))

    def use(self, names: Sequence[Hashable]) -> None:
        """A request's blocks are used: those that are not here come in, for those not used for longest."""
        for name in reversed(names):
            self._blocks[name] = None
            self._blocks.move_to_end(name)
        while self._capacity is not None and len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
