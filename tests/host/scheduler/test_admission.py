"""Who enters, and with what of its KV: prefix hits, waiting for what is being computed, forks, budgets, returns."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.scheduler.policy import MemoryCosts
from jaxserve.scheduler.sequences import Request

OTHER = 500
TEXT = np.random.default_rng(3).integers(0, 1000, 64, dtype=np.int32)


def request(name: str, num_prompt: int, max_tokens: int = 8, own: int = 0, **fields) -> Request:
    """A prompt that begins as TEXT does, its last `own` tokens excepted."""
    prompt = TEXT[:num_prompt].copy()
    prompt[num_prompt - own :] = np.random.default_rng(list(name.encode())).integers(0, 1000, own)
    return Request(name, prompt, num_prompt + max_tokens, **fields)


def step(scheduler):
    plan = scheduler.commit(scheduler.plan())
    scheduler.digest(plan, np.full(len(plan.sampled_rows), OTHER, np.int32))
    scheduler.check_integrity()
    return plan


def entered(plan) -> list[tuple[int, int]]:
    """(row, stored tokens) of each admission."""
    return [(a.row, a.num_stored) for a in plan.admitted]


def chunks(plan) -> list[tuple[int, int, int, bool]]:
    """(row, start, length, stored)."""
    columns = (plan.prefill_rows, plan.prefill_starts, plan.prefill_lens, plan.prefill_stored)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize(
    ("num_prompt", "own", "stored", "fed"),
    [
        (12, 0, 12, (11, 1, True)),  # all is cached: the last token is fed for its logits
        (12, 1, 8, (8, 4, False)),  # the last block differs
        (14, 2, 12, (12, 2, False)),
        (13, 0, 12, (12, 1, False)),  # one token past the cached blocks is computed
        (11, 0, 8, (8, 3, False)),  # a part of a block is never found
        (3, 0, 0, (0, 3, False)),
    ],
)
def test_a_cached_prefix_is_not_fed(make_scheduler, num_prompt: int, own: int, stored: int, fed: tuple) -> None:
    scheduler = make_scheduler(num_blocks=65)
    scheduler.add(request("first", 14, 1))  # 3 blocks of 4 tokens, and 2 tokens
    step(scheduler)
    scheduler.add(request("second", num_prompt, own=own))
    plan = step(scheduler)
    assert entered(plan) == [(0, stored)]
    assert chunks(plan) == [(0, *fed)]
    expected = min(stored, num_prompt - 1)
    (sequence,) = scheduler.sequences.sequences[[0]]
    assert sequence.num_cached_tokens == expected
    assert (scheduler.counters.prefix_queries, scheduler.counters.prefix_hits) == (14 + num_prompt, expected)


def test_generated_tokens_are_found_by_the_next_turn(make_scheduler) -> None:
    scheduler = make_scheduler(num_blocks=65)
    scheduler.add(request("first", 6, 7))
    for _ in range(7):
        step(scheduler)
    transcript = np.append(TEXT[:6], [OTHER] * 7).astype(np.int32)  # the last one was sampled, never fed
    scheduler.add(Request("second", np.append(transcript, [1, 2]).astype(np.int32), 20))
    assert entered(step(scheduler)) == [(0, 12)]


def test_another_salt_finds_nothing(make_scheduler) -> None:
    scheduler = make_scheduler(num_blocks=65)
    scheduler.add(request("first", 12, 1, cache_salt=b"a"))
    step(scheduler)
    for name, salt, stored in (("b", b"b", 0), ("none", b"", 0), ("a", b"a", 12)):
        scheduler.add(request(name, 12, 1, cache_salt=salt))
        assert entered(step(scheduler)) == [(0, stored)], name


def test_who_needs_every_logit_does_not_read_the_cache_but_fills_it(make_scheduler) -> None:
    scheduler = make_scheduler(num_blocks=65)
    for name, reads, stored in (("first", False, 0), ("second", False, 0), ("third", True, 12)):
        scheduler.add(request(name, 12, 1, reads_cache=reads))
        assert entered(step(scheduler)) == [(0, stored)], name
    assert (scheduler.counters.prefix_queries, scheduler.counters.prefix_hits) == (12, 11)


def test_nothing_is_found_before_the_answer_is_here(make_scheduler) -> None:
    """B-07: a block enters the cache when the step that wrote it has been answered."""
    scheduler = make_scheduler(num_blocks=65)
    scheduler.add(request("first", 12, 8))
    first = scheduler.commit(scheduler.plan())
    assert len(scheduler.memory.index) == 0
    scheduler.digest(first, np.array([OTHER], np.int32))
    assert len(scheduler.memory.index) == 3


@pytest.mark.parametrize("num_prompt", [2, 12])
def test_after_a_reset_nothing_is_found_and_what_runs_enters_nothing(make_scheduler, num_prompt: int) -> None:
    scheduler = make_scheduler(num_blocks=65)
    scheduler.add(request("first", num_prompt, 9))
    step(scheduler)
    assert scheduler.reset_prefix_cache() == num_prompt // 4
    for _ in range(8):
        step(scheduler)
    assert not scheduler.has_work
    assert len(scheduler.memory.index) == 0
    scheduler.add(request("second", 12, 1))
    assert entered(step(scheduler)) == [(0, 0)]


def test_a_request_waits_for_the_prefix_that_another_is_computing(make_scheduler) -> None:
    scheduler = make_scheduler(num_blocks=65)
    scheduler.add(request("first", 40))  # in chunks of 16
    scheduler.add(request("second", 40, own=2))
    scheduler.add(request("third", 8, own=8))  # has nothing to wait for, but does not pass the second one
    fed = []
    for _ in range(4):
        plan = step(scheduler)
        fed += chunks(plan)
    # The second one enters when its 9 full blocks are known, all in the step after the first one's last chunk.
    assert fed[:3] == [(0, 0, 16, False), (0, 16, 16, False), (0, 32, 8, False)]
    assert fed[3:] == [(1, 36, 4, False), (2, 0, 8, False)]
    assert scheduler.counters.prefix_hits == 36


def test_nobody_waits_for_another_salt_or_without_a_cache(make_scheduler) -> None:
    for salt, caches in ((b"b", True), (b"", False)):
        scheduler = make_scheduler(num_blocks=65, max_num_batched_tokens=64, enable_prefix_caching=caches)
        scheduler.add(request("first", 12))
        scheduler.add(request("second", 12, cache_salt=salt))
        assert entered(step(scheduler)) == [(0, 0), (1, 0)]


def test_a_hit_takes_its_blocks_from_the_free_ones(make_scheduler) -> None:
    """A cached prefix is free for others until somebody holds it: who shares it uses up what could be handed out."""
    scheduler = make_scheduler(num_blocks=13, max_num_seqs=2)  # 12 blocks of 4 tokens
    scheduler.add(request("first", 16, 1))  # 4 blocks stay cached
    step(scheduler)
    scheduler.add(request("other", 24, 8, own=24))  # 6 of 12
    plan = step(scheduler)
    assert entered(plan) == [(0, 0)]
    scheduler.add(request("again", 17, 3))  # 4 shared, 1 new, 1 for each running: 7 of 6
    assert entered(step(scheduler)) == []
    scheduler.abort("again")
    scheduler.add(request("short", 12, 3))  # 3 shared and 2; of 12 - 7
    assert entered(step(scheduler)) == [(1, 12)]


def test_two_that_share_the_same_idle_blocks_take_them_once(make_scheduler) -> None:
    scheduler = make_scheduler(num_blocks=14, max_num_seqs=3)  # 13 blocks
    scheduler.add(request("first", 16, 1))
    step(scheduler)
    for name in "abc":
        scheduler.add(request(name, 18, 2, own=2))
    # a: 4 idle and 1 of 13. b: 0, 1, and 2 more of 8. c: 1 and 3 more of 7.
    assert entered(scheduler.commit(scheduler.plan())) == [(0, 16), (1, 16), (2, 16)]
    scheduler.check_integrity()


@pytest.mark.parametrize(("num_blocks", "num_entered"), [(5, 1), (6, 2), (8, 2), (9, 3), (10, 3)])
def test_admission_counts_to_the_block(make_scheduler, num_blocks: int, num_entered: int) -> None:
    """8 tokens are 2 blocks. a: 2 of all. b: 2, and one for a and it, of 2 less. c: 2, and one for each, of 4 less."""
    scheduler = make_scheduler(num_blocks=1 + num_blocks, max_num_seqs=4, max_num_batched_tokens=24)
    for name in "abc":
        scheduler.add(request(name, 8, 8, own=8))
    assert len(scheduler.plan().entries) == num_entered


def test_a_sequence_comes_back_with_what_it_had(make_scheduler) -> None:
    """Swapped out and in: one token is fed again, nothing is computed, and its place in line is the old one."""
    cheap = MemoryCosts(swap_block_s=1e-9)
    scheduler = make_scheduler(num_blocks=9, max_num_seqs=2, num_swap_blocks=8, costs=cheap)
    for name in ("old", "young", "later"):
        scheduler.add(request(name, 8 if name == "young" else 4, 20, own=4))
    seen = None
    for _ in range(60):
        plan = step(scheduler)
        if plan.preempted:
            (gone,) = plan.preempted
            assert gone.swapped
            assert len(plan.swap_out_blocks) == len(plan.swap_out_slots) > 0
            waiting = next(iter(scheduler.waiting))
            assert waiting.request.request_id == gone.request_id
            seen = (waiting, len(waiting.known_token_ids), waiting.num_swapped)
            assert len(waiting.swapped) == -(-waiting.num_swapped // 4)
        elif seen and seen[0].row >= 0:
            sequence, num_known, num_stored = seen
            back = [a for a in plan.admitted if a.row == sequence.row]
            assert [a.num_stored for a in back] == [num_stored]
            assert num_stored >= num_known - 1
            fed = [chunk for chunk in chunks(plan) if chunk[0] == sequence.row]
            assert fed == [(sequence.row, num_known - 1, 1, num_stored == num_known)]
            assert sequence.swapped is None
            break
    else:
        pytest.fail("nobody came back")
    assert scheduler.counters.swap_preemptions > 0
    assert scheduler.counters.recompute_preemptions == 0
