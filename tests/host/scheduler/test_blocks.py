"""The block pool against a deque, and the block table against lists."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cache.block_table import BlockTable
from jaxserve.cache.blocks import NULL_BLOCK, BlockPool, blocks_for


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_blocks_for_rounds_up(num_tokens: int, expected: int) -> None:
    assert blocks_for(num_tokens, 16) == expected
    assert blocks_for(np.array([num_tokens]), 16).tolist() == [expected]


@given(num_blocks=st.integers(2, 12), ops=st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=40))
def test_pool_is_a_queue_of_free_blocks(num_blocks: int, ops: list[tuple[bool, int]]) -> None:
    pool, free, held = BlockPool(num_blocks), deque(range(1, num_blocks)), []
    for allocates, count in ops:
        if allocates and count <= len(free):
            expected = [free.popleft() for _ in range(count)]
            assert pool.peek(count).tolist() == expected
            assert pool.allocate(count).tolist() == expected
            held += expected
        elif not allocates:
            returned, held = held[:count], held[count:]
            pool.free(np.array(returned, np.int32))
            free += returned
        assert pool.num_free == len(free)
        assert pool.peek(len(free)).tolist() == list(free)
        pool.check_integrity(np.bincount(np.array(held, int), minlength=num_blocks))


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(5)
    assert pool.num_free == pool.num_usable == 4
    assert NULL_BLOCK not in pool.allocate(4)
    with pytest.raises(AssertionError, match="1 blocks asked, 0 free"):
        pool.allocate(1)
    with pytest.raises(AssertionError, match="null block"):
        pool.free(np.array([NULL_BLOCK]))


@pytest.mark.parametrize("ids", [[1, 2, 1], [3], [1, 3]])
def test_double_free_is_caught(ids: list[int]) -> None:
    pool = BlockPool(5)
    pool.allocate(2)
    with pytest.raises(AssertionError, match="double free"):
        pool.free(np.array(ids, np.int32))


def test_pool_integrity_sees_a_leak_and_a_lost_count() -> None:
    pool = BlockPool(5)
    ids = pool.allocate(2)
    with pytest.raises(AssertionError, match=r"blocks \[1 2\]: counted \[1 1\], held \[0 0\]"):
        pool.check_integrity(np.zeros(5, int))
    pool.ref_count[ids] = 0
    with pytest.raises(AssertionError, match="free list"):
        pool.check_integrity(np.zeros(5, int))


def test_table_appends_reads_and_clears_rows() -> None:
    table = BlockTable(3, 4)
    table.append(np.array([2, 0, 0]), np.array([0, 0, 1]), np.array([5, 6, 7]))
    table.append(np.array([0]), np.array([2]), np.array([9]))
    assert table.num_blocks.tolist() == [3, 0, 1]
    assert table.blocks_of(np.array([2, 0])).tolist() == [5, 6, 7, 9]
    assert table.holders(10).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 0, 1]
    table.check_integrity(10)
    with pytest.raises(AssertionError, match="outside"):
        table.check_integrity(9)
    table.clear(np.array([0]))
    assert table.blocks_of(np.array([0, 1, 2])).tolist() == [5]
    assert not table.ids[0].any()
    table.ids[1, 3] = 4
    with pytest.raises(AssertionError, match="not the null block"):
        table.check_integrity(10)
