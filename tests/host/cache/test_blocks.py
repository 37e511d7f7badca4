"""The block pool against two queues, and the block table against lists."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cache.block_table import BlockTable
from jaxserve.cache.blocks import NULL_BLOCK, BlockPool, blocks_for


def ids(*blocks: int) -> np.ndarray:
    return np.array(blocks, np.int32)


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
            got, evicted = pool.allocate(count)
            assert got.tolist() == expected
            assert evicted.tolist() == []
            held += expected
        elif not allocates:
            returned, held = held[:count], held[count:]
            pool.free(np.array(returned, np.int32))
            free += returned
        assert pool.num_free == len(free)
        pool.check_integrity(np.bincount(np.array(held, int), minlength=num_blocks))


@given(num_blocks=st.integers(2, 10), data=st.data())
def test_pool_with_kept_content_is_two_queues(num_blocks: int, data: st.DataObject) -> None:
    """Empty blocks go first, then kept ones, the longest unused first; sharing takes a kept one out of line."""
    pool, empty, kept_free = BlockPool(num_blocks), deque(range(1, num_blocks)), deque()
    count, kept, generation = [0] * num_blocks, set(), np.zeros(num_blocks, int)
    for _ in range(data.draw(st.integers(1, 40))):
        held = [block for block in range(1, num_blocks) if count[block]]
        free = len(empty) + len(kept_free)
        move = data.draw(st.sampled_from(["allocate", "share", "free", "keep", "drop"]))
        if move == "allocate":
            number = data.draw(st.integers(0, free))
            expected = [empty.popleft() for _ in range(min(number, len(empty)))]
            evicted = [kept_free.popleft() for _ in range(number - len(expected))]
            got, gone = pool.allocate(number)
            assert (got.tolist(), gone.tolist()) == (expected + evicted, evicted)
            kept -= set(evicted)
            for block in expected + evicted:
                count[block] = 1
            assert (pool.generation[got] > generation.max()).all(), "as if it had been handed out before"
            generation[got] = pool.generation[got]
        elif move == "share" and held + list(kept_free):
            some = data.draw(st.lists(st.sampled_from(held + list(kept_free)), max_size=5))
            pool.share(ids(*some))
            for block in some:
                count[block] += 1
                if block in kept_free:
                    kept_free.remove(block)
        elif move == "free" and held:
            some = data.draw(st.lists(st.sampled_from(held), max_size=5))
            some = [block for i, block in enumerate(some) if some[: i + 1].count(block) <= count[block]]
            pool.free(ids(*some))
            for i, block in enumerate(some):
                count[block] -= 1
                if not count[block] and block not in some[i + 1 :]:
                    (kept_free if block in kept else empty).append(block)
        elif move == "keep" and held:
            some = data.draw(st.sets(st.sampled_from(held)))
            pool.keep(ids(*some))
            kept |= some
        elif move == "drop" and kept:
            some = sorted(data.draw(st.sets(st.sampled_from(sorted(kept)))))
            pool.drop(ids(*some))
            kept -= set(some)
            empty += [block for block in some if not count[block]]
            kept_free = deque(block for block in kept_free if block not in some)
        assert (pool.num_free, pool.num_kept_free) == (len(empty) + len(kept_free), len(kept_free))
        assert pool.ref_count.tolist() == [1, *count[1:]]
        assert pool.generation.tolist() == generation.tolist()
        pool.check_integrity(np.array(count))


def test_leaves_go_before_what_they_continue() -> None:
    pool = BlockPool(7)
    chain, _ = pool.allocate(3)
    other, _ = pool.allocate(3)
    pool.keep(chain)
    pool.keep(other)
    pool.free(chain[::-1])  # from its end, as a sequence's blocks are freed
    pool.free(other[::-1])
    assert pool.allocate(4)[1].tolist() == [*chain[::-1].tolist(), other[2]]


def test_of_several_occurrences_the_last_says_when_a_block_is_free() -> None:
    """Two siblings end at once: the block they share is freed after both ends, not between them."""
    pool = BlockPool(4)
    shared, first, second = pool.allocate(3)[0].tolist()
    pool.share(ids(shared))
    pool.keep(ids(shared, first, second))
    pool.free(ids(first, shared, second, shared))
    assert pool.allocate(3)[1].tolist() == [first, second, shared]


def test_content_is_there_until_the_block_is_handed_out_anew() -> None:
    pool = BlockPool(4)
    held, _ = pool.allocate(2)
    before = pool.generation[held].copy()
    assert pool.has_content(held, before).tolist() == [True, True]
    pool.keep(held[:1])
    pool.free(held)
    assert pool.has_content(held, before).tolist() == [True, False], "nobody keeps the second one"
    pool.allocate(3)
    assert pool.has_content(held, before).tolist() == [False, False]
    pool.lose_content()
    assert pool.has_content(held, pool.generation[held] - 1).tolist() == [False, False]


def test_a_lost_device_leaves_no_content() -> None:
    pool = BlockPool(5)
    held, _ = pool.allocate(3)
    pool.keep(held)
    pool.free(held)
    generation = pool.generation.copy()
    pool.lose_content()
    assert (pool.generation > generation).all()
    assert (pool.num_free, pool.num_kept_free) == (4, 0)
    pool.check_integrity(np.zeros(5, int))


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(5)
    assert pool.num_free == pool.num_usable == 4
    assert NULL_BLOCK not in pool.allocate(4)[0]
    with pytest.raises(AssertionError, match="1 blocks asked, 0 free"):
        pool.allocate(1)
    with pytest.raises(AssertionError, match="null block"):
        pool.free(np.array([NULL_BLOCK]))


@pytest.mark.parametrize("twice", [[1, 2, 1], [3], [1, 3]])
def test_double_free_is_caught(twice: list[int]) -> None:
    pool = BlockPool(5)
    pool.allocate(2)
    with pytest.raises(AssertionError, match="double free"):
        pool.free(np.array(twice, np.int32))


def test_what_nobody_holds_or_keeps_cannot_be_shared() -> None:
    pool = BlockPool(5)
    held, _ = pool.allocate(1)
    with pytest.raises(AssertionError):
        BlockPool(5).share(ids(4))
    with pytest.raises(AssertionError, match="not all held"):
        pool.keep(ids(4))
    with pytest.raises(AssertionError, match="not all kept"):
        pool.drop(held)


def test_pool_integrity_sees_a_leak_and_a_lost_count() -> None:
    pool = BlockPool(5)
    held, _ = pool.allocate(2)
    with pytest.raises(AssertionError, match=r"blocks \[1 2\]: counted \[1 1\], held \[0 0\]"):
        pool.check_integrity(np.zeros(5, int))
    pool.ref_count[held] = 0
    with pytest.raises(AssertionError, match="empty free blocks"):
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


def test_table_tells_each_replaced_entry_once_and_none_of_rows_that_are_gone() -> None:
    table = BlockTable(3, 4)
    table.set_row(0, np.array([5, 6]))
    table.set_row(1, np.array([7, 8]))
    table.replace(0, [1], [9])
    table.replace(1, [0], [4])
    table.replace(0, [1], [3])
    table.clear(np.array([1]))
    rows, cols = table.take_replaced()
    assert (rows.tolist(), cols.tolist()) == ([0], [1])
    assert table.row(0).tolist() == [5, 3]
    assert len(table.take_replaced()[0]) == 0
    with pytest.raises(AssertionError, match="not in use"):
        table.replace(0, [2], [1])
    with pytest.raises(AssertionError, match="has blocks"):
        table.set_row(0, np.array([1]))
