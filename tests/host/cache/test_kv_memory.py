"""`KVMemory`, move by move: publish, copy on write, inherit, save and restore, forget."""

from __future__ import annotations

import numpy as np

from jaxserve.cache.kv_memory import KVMemory

TOKENS = np.arange(100, 116, dtype=np.int32)
NO_SLOTS: tuple[np.ndarray, ...] = ()


def make(num_blocks: int = 12, num_slots: int = 6, caches: bool = True) -> KVMemory:
    """Four rows of blocks of two tokens."""
    return KVMemory(num_blocks, 2, 4, 8, num_slots, caches)


def fill(memory: KVMemory, row: int, count: int) -> list[int]:
    """Gives the row its next `count` blocks."""
    begin = int(memory.table.num_blocks[row])
    return memory.extend(np.full(count, row), np.arange(begin, begin + count)).tolist()


def blocks_of(memory: KVMemory, row: int) -> list[int]:
    return memory.table.row(row).tolist()


def test_a_published_prefix_is_found_and_shared() -> None:
    memory = make()
    mine = fill(memory, 0, 3)
    assert memory.match(TOKENS, b"").tolist() == []
    assert memory.publish(0, TOKENS, 0, 2, b"") == 2
    assert memory.match(TOKENS, b"").tolist() == mine[:2]
    assert memory.match(TOKENS, b"other").tolist() == []
    assert memory.publish(0, TOKENS, 2, 2, b"") == 2
    memory.share(1, memory.match(TOKENS, b""))
    assert memory.pool.ref_count[mine].tolist() == [2, 2, 1]
    memory.check_integrity(NO_SLOTS)
    memory.release(np.array([0]))
    assert memory.num_idle(np.array(mine)) == 1
    memory.release(np.array([1]))
    assert memory.match(TOKENS, b"").tolist() == mine[:2], "kept after their last holder"
    assert memory.pool.num_free == 11
    memory.check_integrity(NO_SLOTS)


def test_publishing_what_the_cache_has_adopts_its_blocks() -> None:
    memory = make()
    first, second = fill(memory, 0, 3), fill(memory, 1, 4)
    memory.publish(0, TOKENS, 0, 2, b"")
    assert memory.publish(1, TOKENS, 0, 3, b"") == 3
    assert blocks_of(memory, 1) == [*first[:2], second[2], second[3]]
    rows, cols = memory.table.take_replaced()
    assert (rows.tolist(), cols.tolist()) == ([1, 1], [0, 1]), "the device is told"
    assert memory.pool.ref_count[first[:2]].tolist() == [2, 2]
    assert memory.pool.ref_count[second].tolist() == [0, 0, 1, 1]
    assert memory.match(TOKENS, b"").tolist() == [*first[:2], second[2]]
    memory.check_integrity(NO_SLOTS)


def test_a_row_whose_prefix_was_forgotten_enters_nothing() -> None:
    memory = make()
    mine = fill(memory, 0, 3)
    memory.publish(0, TOKENS, 0, 1, b"")
    assert memory.forget(np.array(mine[:1])) == 1
    assert memory.publish(0, TOKENS, 1, 3, b"") == 1
    assert len(memory.index) == 0
    memory.check_integrity(NO_SLOTS)


def test_without_a_cache_nothing_is_published() -> None:
    memory = make(caches=False)
    fill(memory, 0, 3)
    assert memory.publish(0, TOKENS, 0, 3, b"") == 0
    assert memory.match(TOKENS, b"").tolist() == []
    memory.check_integrity(NO_SLOTS)


def test_evicted_blocks_are_forgotten_leaves_first() -> None:
    memory = make(num_blocks=6)
    mine = fill(memory, 0, 4)
    memory.publish(0, TOKENS, 0, 4, b"")
    memory.release(np.array([0]))
    assert fill(memory, 1, 3) == [5, mine[3], mine[2]]
    assert memory.match(TOKENS, b"").tolist() == mine[:2]
    memory.check_integrity(NO_SLOTS)


def test_copy_on_write_copies_for_all_but_the_last_holder() -> None:
    memory = make()
    mine = fill(memory, 0, 2)
    memory.share(1, np.array(mine))
    copied = memory.copy_on_write(0, 1)
    assert copied is not None
    assert copied[0] == mine[1]
    assert blocks_of(memory, 0) == [mine[0], copied[1]]
    assert copied[1] not in mine
    rows, cols = memory.table.take_replaced()
    assert (rows.tolist(), cols.tolist()) == ([0], [1])
    assert memory.copy_on_write(1, 1) is None, "nobody else holds it now"
    assert blocks_of(memory, 1) == mine
    memory.check_integrity(NO_SLOTS)


def test_a_cached_block_is_copied_even_for_its_only_holder() -> None:
    memory = make()
    mine = fill(memory, 0, 1)
    memory.publish(0, TOKENS, 0, 1, b"")
    copied = memory.copy_on_write(0, 0)
    assert copied is not None
    assert copied[0] == mine[0]
    assert memory.match(TOKENS, b"").tolist() == mine
    assert memory.pool.ref_count[mine[0]] == 0
    memory.check_integrity(NO_SLOTS)


def test_heirs_take_their_parents_full_blocks_and_keep_their_tails() -> None:
    memory = make()
    trunk = fill(memory, 0, 1)
    memory.share(1, np.array(trunk))
    memory.share(2, np.array(trunk))
    tails = [fill(memory, row, 2) for row in range(3)]
    rows, parents = np.array([0, 1, 2]), np.array([1, 1, 0])  # 0 and 2 change, 2's beam is nobody's any more
    memory.inherit(rows, parents, 2)
    assert blocks_of(memory, 0) == [*trunk, tails[1][0], tails[0][1]]
    assert blocks_of(memory, 1) == [*trunk, *tails[1]]
    assert blocks_of(memory, 2) == [*trunk, tails[0][0], tails[2][1]], "all at once: 0's blocks before it changed"
    assert memory.pool.ref_count[[*trunk, tails[0][0], tails[1][0], tails[2][0]]].tolist() == [3, 1, 2, 0]
    assert not memory.table.has_replaced, "the device moved its tables itself"
    memory.check_integrity(NO_SLOTS)
    memory.inherit(rows, rows, 2)
    memory.inherit(rows, parents, 0)
    assert blocks_of(memory, 2) == [*trunk, tails[0][0], tails[2][1]]


def test_a_restored_row_shares_what_is_alive_and_fetches_the_rest() -> None:
    memory = make()
    mine = fill(memory, 0, 3)  # the last one is partial
    memory.publish(0, TOKENS, 0, 1, b"")
    slots, to_write, from_blocks = memory.save(np.array(mine), 2)
    assert (to_write.tolist(), from_blocks.tolist()) == (slots.tolist(), mine)
    memory.release(np.array([0]))  # the first block stays cached, the others are empty
    memory.check_integrity([slots])
    memory.hold(np.array(mine[:1]))
    read, written = memory.restore(1, slots, 2)
    memory.let_go(np.array(mine[:1]))
    assert read.tolist() == slots[1:].tolist()
    assert blocks_of(memory, 1) == [mine[0], *written.tolist()]
    assert memory.host.num_free == 6
    assert memory.pool.ref_count[blocks_of(memory, 1)].tolist() == [1, 1, 1]
    memory.check_integrity(NO_SLOTS)


def test_what_was_shared_is_copied_once_each_way() -> None:
    memory = make()
    trunk = fill(memory, 0, 2)
    memory.share(1, np.array(trunk))
    tails = [fill(memory, row, 1) for row in (0, 1)]
    assert memory.num_to_copy(np.array([*trunk, *tails[0]]), 2) == 3
    first, to_write, _ = memory.save(np.array([*trunk, *tails[0]]), 2)
    assert len(to_write) == 3
    assert memory.num_to_copy(np.array([*trunk, *tails[1]]), 2) == 1
    second, to_write, from_blocks = memory.save(np.array([*trunk, *tails[1]]), 2)
    assert (len(to_write), from_blocks.tolist()) == (1, tails[1])
    memory.release(np.array([0, 1]))
    fill(memory, 3, 8)  # of 11: the old blocks are others' now, but for the last three
    memory.check_integrity([first, second])
    read, _ = memory.restore(0, first, 2)
    assert len(read) == 3
    memory.release(np.array([3]))
    read, written = memory.restore(1, second, 2)
    assert read.tolist() == [second[2]], "the first one brought the trunk back"
    assert blocks_of(memory, 1) == [*blocks_of(memory, 0)[:2], *written.tolist()]
    assert memory.host.num_free == 6
    memory.check_integrity(NO_SLOTS)


def test_a_fault_takes_a_prefix_and_all_that_continues_it_out() -> None:
    memory = make()
    mine = fill(memory, 0, 3)
    memory.publish(0, TOKENS, 0, 3, b"")
    memory.share(1, np.array(mine[:1]))
    branch = fill(memory, 1, 1)
    memory.publish(1, np.array([100, 101, 7, 7], np.int32), 1, 2, b"")
    other = fill(memory, 2, 1)
    memory.publish(2, TOKENS[4:], 0, 1, b"")
    assert memory.forget(np.array(mine[:1])) == 4
    assert not memory.pool.is_kept[[*mine, *branch]].any()
    assert memory.match(TOKENS[4:], b"").tolist() == other
    assert memory.reset_cache() == 1
    assert memory.match(TOKENS[4:], b"").tolist() == []
    memory.check_integrity(NO_SLOTS)


def test_after_a_lost_device_nothing_is_found() -> None:
    memory = make()
    mine = fill(memory, 0, 3)
    memory.publish(0, TOKENS, 0, 2, b"")
    slots, _, _ = memory.save(np.array(mine), 2)
    memory.release(np.array([0]))
    memory.lose_device()
    assert memory.match(TOKENS, b"").tolist() == []
    assert memory.host.on_device(slots, memory.pool).tolist() == [-1, -1, -1]
    assert memory.num_to_copy(np.array(mine), 2) == 3
    assert memory.pool.num_free == 11
    memory.check_integrity([slots])
