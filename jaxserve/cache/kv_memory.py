"""`KVMemory`: the rows' blocks, the prefix cache and the host's slots, kept consistent with each other.

Owns who holds which block. Every move of a hold goes through here: the pool counts, the table says where, the index
says what, the host pool says what was saved. It knows token ids only as content, and neither sequences nor the device.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jaxserve.cache.block_table import BlockTable
from jaxserve.cache.blocks import BlockPool
from jaxserve.cache.prefix import PrefixIndex
from jaxserve.cache.swap import HostPool

_NO_BLOCKS = np.empty(0, np.int32)


class KVMemory:
    """Blocks of one KV pool.

    Attributes:
        block_size: tokens a block.
        pool, table, index, host: the parts; others may read them.
        caches: whether full blocks are entered into the index.
    """

    def __init__(
        self, num_blocks: int, block_size: int, num_rows: int, max_blocks_per_row: int, num_slots: int, caches: bool
    ):
        self.block_size = block_size
        self.caches = caches
        self.pool = BlockPool(num_blocks)
        self.table = BlockTable(num_rows, max_blocks_per_row)
        self.index = PrefixIndex(num_blocks, block_size)
        self.host = HostPool(num_slots, num_blocks)

    def match(self, token_ids: np.ndarray, salt: bytes) -> np.ndarray:
        """int32[h]: blocks of the longest prefix that the cache has. They are not held yet."""
        if not self.caches:
            return _NO_BLOCKS
        return np.array(self.index.match(token_ids, salt), np.int32)

    def num_idle(self, ids: np.ndarray) -> int:
        """How many of these blocks are free: to share them takes them from those that can be handed out."""
        return int(np.count_nonzero(self.pool.ref_count[ids] == 0))

    def share(self, row: int, ids: np.ndarray) -> None:
        """Gives an empty row its first blocks, which others may hold or have held."""
        self.pool.share(ids)
        self.table.set_row(row, ids)

    def extend(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """intp[U]: new blocks for these table entries, in their order."""
        if not len(rows):
            return _NO_BLOCKS
        ids = self._allocate(len(rows))
        self.table.append(rows, cols, ids)
        return ids

    def copy_on_write(self, row: int, col: int) -> tuple[int, int] | None:
        """Gives the row a block of its own there, if others hold the one it has, or it is in the cache.

        Returns: (block to copy from, block to copy to), or None.
        """
        shared = int(self.table.ids[row, col])
        if self.pool.ref_count[shared] == 1 and not self.pool.is_kept[shared]:
            return None
        own = int(self._allocate(1)[0])
        self.pool.free(np.array([shared], np.int32))
        self.table.replace(row, [col], [own])
        return shared, own

    def publish(
        self, row: int, token_ids: np.ndarray, num_known: int, num_full: int, salt: bytes, *, keeps_own: bool = False
    ) -> int:
        """Makes the row's full blocks findable; where the cache has the same content, the row uses that from now on.

        Args:
            token_ids: int32[>= num_full * block_size] the row's tokens.
            num_known: its first blocks that are in the cache already.
            num_full: its first blocks that are full, and written by steps that were answered.
            keeps_own: the row goes on using its own blocks all the same, and is not published any further.

        Returns: how many of its first blocks are in the cache now.
        """
        if not self.caches or num_full <= num_known:
            return num_known
        own = self.table.ids[row, :num_full].tolist()
        entered = self.index.enter(token_ids[: num_full * self.block_size], own, num_known, salt)
        if not entered:
            return num_known
        if entered == own[num_known:]:
            self.pool.keep(np.array(entered, np.intp))
            return num_full
        changed = [col for col, block in enumerate(entered, num_known) if block != own[col]]
        kept = [b for b, mine in zip(entered, own[num_known:], strict=True) if b == mine]
        self.pool.keep(np.array(kept, np.intp))
        if keeps_own:
            return num_full
        canonical = [entered[col - num_known] for col in changed]
        self.pool.share(np.array(canonical, np.intp))
        self.pool.free(np.array([own[col] for col in changed], np.intp))
        self.table.replace(row, changed, canonical)
        return num_full

    def release(self, rows: np.ndarray) -> None:
        """Takes the rows' blocks away, ends before beginnings."""
        self.pool.free(self.table.blocks_of(rows)[::-1])
        self.table.clear(rows)

    def inherit(self, rows: np.ndarray, parents: np.ndarray, num_blocks: int) -> None:
        """Each row's first blocks become those of its parent, all at once; the rows' later blocks stay.

        Args:
            rows: [k] distinct rows.
            parents: [k] a row of `rows` for each.
        """
        moved = rows != parents
        if not num_blocks or not moved.any():
            return
        heirs = rows[moved]
        old = self.table.ids[heirs, :num_blocks]
        new = self.table.ids[parents[moved], :num_blocks]
        self.pool.share(new[old != new])
        self.pool.free(old[old != new][::-1])
        self.table.ids[heirs, :num_blocks] = new

    def num_to_copy(self, ids: np.ndarray, num_full: int) -> int:
        """How many of a sequence's blocks have no copy in host memory yet."""
        return len(ids) - int(np.count_nonzero(self.host.copied(ids[:num_full], self.pool) >= 0))

    def save(self, ids: np.ndarray, num_full: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Takes slots for a sequence's blocks.

        Returns: int32[n] the slots; of those the ones to be written, and the blocks to write them from.
        """
        slots, missing = self.host.take(ids, num_full, self.pool)
        return slots, slots[missing], ids[missing]

    def restore(self, row: int, slots: np.ndarray, num_full: int) -> tuple[np.ndarray, np.ndarray]:
        """Gives an empty row the content of its slots: blocks that have it are shared, others are to be written.

        What can be shared must be held first (`hold`), so that no allocation takes it meanwhile.

        Returns: slots to read, and the row's blocks to write them to.
        """
        blocks = self.host.on_device(slots, self.pool)
        missing = blocks < 0
        blocks[missing] = self._allocate(int(missing.sum()))
        self.pool.share(blocks[~missing])
        self.table.set_row(row, blocks)
        self.host.settle(slots[:num_full], blocks[:num_full], self.pool)
        self.host.release(slots)
        return slots[missing], blocks[missing]

    def hold(self, ids: np.ndarray) -> None:
        """Keeps blocks from being handed out until `let_go`."""
        self.pool.share(ids)

    def let_go(self, ids: np.ndarray) -> None:
        """Ends a `hold`."""
        self.pool.free(ids[::-1])

    def forget(self, ids: np.ndarray) -> int:
        """Takes these blocks, and all that continue them, out of the cache; returns how many there were."""
        gone = self.index.with_descendants(ids)
        self.index.forget(gone)
        self.pool.drop(gone)
        return len(gone)

    def reset_cache(self) -> int:
        """Forgets every cached block; returns how many there were. Blocks in use stay in use."""
        return self.forget(self.index.all_blocks())

    def lose_device(self) -> None:
        """The content of every block is gone. No row may hold any."""
        self.index.forget(self.index.all_blocks())
        self.pool.lose_content()

    def _allocate(self, count: int) -> np.ndarray:
        ids, evicted = self.pool.allocate(count)
        if len(evicted):
            self.index.forget(evicted)
            orphans = self.index.orphans_of(evicted)
            if len(orphans):
                self.index.forget(orphans)
                self.pool.drop(orphans)
        return ids

    def check_integrity(self, saved: Iterable[np.ndarray]) -> None:
        """Asserts the invariants of every part and those between them.

        Args:
            saved: the slots of each sequence that has some.
        """
        num_blocks = self.pool.num_blocks
        self.table.check_integrity(num_blocks)
        self.pool.check_integrity(self.table.holders(num_blocks))
        self.index.check_integrity()
        assert np.array_equal(self.index.all_blocks(), self.pool.is_kept.nonzero()[0]), "cached is not kept"
        slots = np.concatenate([np.empty(0, np.int32), *saved])
        self.host.check_integrity(np.bincount(slots, minlength=self.host.num_slots))
