"""The slots of host memory: one a block's content, shared by whoever needs it, and where it still is on the device."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.cache.blocks import BlockPool
from jaxserve.cache.swap import HostPool


def make(num_slots: int = 6, num_blocks: int = 10) -> tuple[BlockPool, HostPool, np.ndarray]:
    """Pool, slots, and four held blocks."""
    pool = BlockPool(num_blocks)
    blocks, _ = pool.allocate(4)
    return pool, HostPool(num_slots, num_blocks), blocks


def test_full_blocks_are_copied_once_and_partial_ones_for_each() -> None:
    pool, host, blocks = make()
    first, to_write = host.take(blocks[:3], 2, pool)
    assert to_write.tolist() == [True, True, True]
    second, to_write = host.take(np.append(blocks[:2], blocks[3]), 2, pool)
    assert to_write.tolist() == [False, False, True]
    assert second[:2].tolist() == first[:2].tolist()
    assert len({*first.tolist(), *second.tolist()}) == host.num_used == 4
    partial, to_write = host.take(blocks[2:3], 0, pool)
    assert to_write.tolist() == [True]
    assert partial[0] != first[2]
    growing, to_write = host.take(blocks[:1], 0, pool)
    assert to_write.tolist() == [True], "full for the first one, still written to by this one"
    assert growing[0] != first[0]
    host.check_integrity(np.bincount(np.concatenate([first, second, partial, growing]), minlength=6))


def test_slots_are_free_after_the_last_release() -> None:
    pool, host, blocks = make()
    first, _ = host.take(blocks[:2], 2, pool)
    second, _ = host.take(blocks[:2], 2, pool)
    host.release(first)
    assert host.num_free == 4
    assert host.copied(blocks[:2], pool).tolist() == second.tolist()
    host.release(second)
    assert (host.num_free, host.num_used) == (6, 0)
    assert host.copied(blocks[:2], pool).tolist() == [-1, -1], "a free slot has nobody's content"
    host.check_integrity(np.zeros(6, int))
    with pytest.raises(AssertionError, match="double release"):
        host.release(second)


def test_a_copy_is_of_one_generation() -> None:
    pool, host, blocks = make(num_blocks=5)  # all blocks are held
    slots, _ = host.take(blocks[:2], 2, pool)
    pool.free(blocks[:2][::-1])
    again, _ = pool.allocate(2)
    assert sorted(again) == sorted(blocks[:2])
    assert host.copied(blocks[:2], pool).tolist() == [-1, -1]
    assert host.on_device(slots, pool).tolist() == [-1, -1]


def test_on_device_stops_at_the_first_block_that_is_gone() -> None:
    pool, host, blocks = make()
    slots, _ = host.take(blocks, 4, pool)
    pool.keep(blocks[[0, 2, 3]])
    pool.free(blocks[::-1])  # the second one is empty now
    assert host.on_device(slots, pool).tolist() == [blocks[0], -1, -1, -1]


def test_partial_blocks_have_no_home() -> None:
    pool, host, blocks = make()
    slots, _ = host.take(blocks[:2], 1, pool)
    assert host.on_device(slots, pool).tolist() == [blocks[0], -1]


def test_a_reused_slot_forgets_where_it_was() -> None:
    pool, host, blocks = make(num_slots=1)
    slots, _ = host.take(blocks[:1], 1, pool)
    host.release(slots)
    again, to_write = host.take(blocks[1:2], 0, pool)
    assert (again.tolist(), to_write.tolist()) == (slots.tolist(), [True])
    assert host.on_device(again, pool).tolist() == [-1]
    assert host.copied(blocks[:2], pool).tolist() == [-1, -1]
    host.check_integrity(np.ones(1, int))


def test_content_that_moved_is_found_at_its_new_place() -> None:
    pool, host, blocks = make()
    slots, _ = host.take(blocks[:1], 1, pool)
    host.take(blocks[:1], 1, pool)  # another sequence relies on the slot too
    host.settle(slots, blocks[3:], pool)
    assert host.on_device(slots, pool).tolist() == [blocks[3]]
    assert host.copied(blocks[[0, 3]], pool).tolist() == [-1, slots[0]]
    host.check_integrity(np.bincount(slots, minlength=6) * 2)


def test_no_more_slots_than_there_are() -> None:
    pool, host, blocks = make(num_slots=3)
    with pytest.raises(AssertionError, match="4 slots asked, 3 free"):
        host.take(blocks, 4, pool)
    empty = HostPool(0, 10)
    assert empty.copied(blocks, pool).tolist() == [-1] * 4
    empty.check_integrity(np.zeros(0, int))
