"""Who gives way, and by which means: `Victims` on tables that are set by hand."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.cache.kv_memory import KVMemory
from jaxserve.scheduler import policy
from jaxserve.scheduler.policy import MemoryCosts, Victims
from jaxserve.scheduler.sequences import SequenceTable

BLOCK_SIZE = 4
DEAR_SWAP = MemoryCosts(swap_block_s=1.0, prefill_token_s=1.0)
CHEAP_SWAP = MemoryCosts(swap_block_s=0.001, prefill_token_s=1.0)


def tables(lengths: list[int], num_slots: int = 0, total: int = 64) -> tuple[SequenceTable, KVMemory]:
    """Decoding rows, the oldest first, each with this many computed tokens in blocks of its own."""
    sequences = SequenceTable(len(lengths), 64)
    memory = KVMemory(200, BLOCK_SIZE, len(lengths), 16, num_slots, True)
    for row, length in enumerate(lengths):
        sequences.active[row] = sequences.on_device[row] = True
        sequences.num_computed[row], sequences.num_known[row] = length, length + 1
        sequences.num_tokens[row], sequences.max_total_len[row] = length + 1, total
        sequences.place[row] = row << 7
        count = -(-length // BLOCK_SIZE)
        memory.extend(np.full(count, row), np.arange(count))
    return sequences, memory


def chosen(sequences, memory, costs, shortage, needy=()) -> list[tuple[int, bool, bool]]:
    victims, num_freed = Victims(sequences, memory, costs, np.array(needy, int)).choose(shortage)
    rows = [victim.row for victim in victims]
    before = memory.pool.num_free
    memory.release(np.array(rows, int))
    assert memory.pool.num_free - before == num_freed, "it frees what it said"
    return [(victim.row, victim.swaps, victim.host_full) for victim in victims]


def test_equal_rows_give_way_youngest_first_and_no_more_than_must() -> None:
    assert chosen(*tables([8] * 8), DEAR_SWAP, 1) == [(7, False, False)]
    assert chosen(*tables([8] * 8), DEAR_SWAP, 2) == [(7, False, False)]
    assert chosen(*tables([8] * 8), DEAR_SWAP, 3) == [(7, False, False), (6, False, False)]


def test_a_needy_row_that_goes_needs_no_block() -> None:
    assert [v[0] for v in chosen(*tables([8] * 3), DEAR_SWAP, 3, needy=[0, 1, 2])] == [2]
    assert [v[0] for v in chosen(*tables([8] * 3), DEAR_SWAP, 4, needy=[0, 1, 2])] == [2, 1]


def test_of_the_window_the_cheapest_a_block_gives_way() -> None:
    # Tokens to compute again for each block that is given back: 4, 4, 1/1, 4, 4. Row 2 is in the window, row 1 not.
    sequences, memory = tables([40, 1, 1, 40, 40, 40])
    assert [v[0] for v in chosen(sequences, memory, DEAR_SWAP, 1)] == [2]
    sequences, memory = tables([40, 1, 40, 40, 40, 40])
    assert [v[0] for v in chosen(sequences, memory, DEAR_SWAP, 1)] == [5]
    assert policy.VICTIM_WINDOW == 4


def test_protected_rows_stay_and_rows_about_to_end_come_last() -> None:
    sequences, memory = tables([8] * 4)
    sequences.protect(3, 5)
    assert [v[0] for v in chosen(sequences, memory, DEAR_SWAP, 1)] == [2]
    sequences, memory = tables([8] * 4)
    sequences.max_total_len[3] = sequences.num_tokens[3]
    assert [v[0] for v in chosen(sequences, memory, DEAR_SWAP, 1)] == [2]
    sequences, memory = tables([8] * 4)
    sequences.max_total_len[[2, 3]] = 9
    assert [v[0] for v in chosen(sequences, memory, DEAR_SWAP, 6)] == [1, 0, 3]
    sequences, memory = tables([8] * 2)
    sequences.protect(0, 5)
    with pytest.raises(AssertionError, match="nobody left to give way"):
        chosen(sequences, memory, DEAR_SWAP, 3)


@pytest.mark.parametrize(
    ("fixed", "block", "token", "swaps"),
    [(0.0, 3.9, 1.0, True), (0.0, 4.1, 1.0, False), (3.0, 2.4, 1.0, True), (3.0, 2.6, 1.0, False)],
)
def test_the_means_is_the_cheaper_one(fixed: float, block: float, token: float, swaps: bool) -> None:
    """8 tokens in 2 blocks: 8 to compute again, or fixed + 2 block to move."""
    costs = MemoryCosts(fixed, block, token)
    assert chosen(*tables([8], num_slots=9), costs, 1) == [(0, swaps, False)]


def test_without_host_memory_nobody_is_swapped_and_none_counts_as_full() -> None:
    assert chosen(*tables([8], num_slots=0), CHEAP_SWAP, 1) == [(0, False, False)]


def test_when_host_memory_is_full_the_rest_is_computed_again() -> None:
    sequences, memory = tables([8] * 4, num_slots=5)
    assert chosen(sequences, memory, CHEAP_SWAP, 6) == [(3, True, False), (2, True, False), (1, False, True)]


def test_what_the_cache_keeps_for_others_is_not_lost() -> None:
    """Row 1 shares its first two blocks with row 0: giving way costs it 4 tokens of 12, and frees one block."""
    sequences, memory = tables([12, 12])
    memory.publish(0, np.arange(12, dtype=np.int32), 0, 2, b"")
    memory.release(np.array([1]))
    memory.share(1, memory.table.row(0)[:2])
    memory.extend(np.array([1]), np.array([2]))
    costs = MemoryCosts(0.0, 4.5, 1.0)  # moving its one own block costs more than computing it, all three cost less
    memory.host = type(memory.host)(9, 200)
    victims, num_freed = Victims(sequences, memory, costs, np.array([], int)).choose(1)
    assert [(v.row, v.swaps) for v in victims] == [(1, False)]
    assert num_freed == 1


def test_two_that_share_free_the_block_when_both_go() -> None:
    sequences, memory = tables([4, 8])
    memory.release(np.array([1]))
    memory.share(1, memory.table.row(0)[:1])
    memory.extend(np.array([1]), np.array([1]))
    assert len(chosen(sequences, memory, DEAR_SWAP, 2)) == 2
