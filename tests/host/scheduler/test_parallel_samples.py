"""n > 1: the prompt is computed once, siblings take over its blocks and copy what they write to."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.scheduler import planner


def fed_for(sim, name: str, n: int) -> list[int]:
    return [sim.results[name, index].num_fed for index in range(n)]


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("num_prompt", [1, 4, 5, 8, 11, 30])
@pytest.mark.parametrize("n", [2, 4])
def test_the_prompt_is_fed_exactly_once(
    echo, make_scheduler, make_request, depth: int, num_prompt: int, n: int
) -> None:
    sim = echo.Simulation(make_scheduler(num_blocks=65), depth)
    sim.add(make_request("a", num_prompt, 9, num_sequences=n))
    sim.drain()
    sim.check_outputs()
    assert fed_for(sim, "a", n) == [num_prompt] + [1] * (n - 1)
    # Of n that share the prompt's last, partial block all but one copy it.
    assert sim.scheduler.counters.copied_blocks == (n - 1 if num_prompt % 4 else 0)
    assert len({tuple(sim.results["a", index].token_ids) for index in range(n)}) == n


def test_siblings_that_find_no_row_fork_later(echo, make_scheduler, make_request) -> None:
    """Five continuations on two rows: each later one forks from whoever still runs, or finds the prompt cached."""
    sim = echo.Simulation(make_scheduler(num_blocks=65, max_num_seqs=2))
    sim.add(make_request("a", 10, 7, num_sequences=5))
    sim.drain()
    sim.check_outputs()
    fed = fed_for(sim, "a", 5)
    assert fed[:2] == [10, 1]
    assert all(num in (1, 2) for num in fed[2:]), "2: of a prompt of 10 the cache has two blocks of 4"


def test_siblings_of_a_prompt_that_is_cached_feed_a_token_each(echo, make_scheduler, make_request) -> None:
    sim = echo.Simulation(make_scheduler(num_blocks=65))
    sim.add(make_request("a", 8, 3))
    sim.drain()
    again = make_request("b", 8, 3, num_sequences=3)
    again.prompt_token_ids[:] = sim.requests["a"].prompt_token_ids
    sim.add(again)
    sim.drain()
    sim.check_outputs()
    assert fed_for(sim, "b", 3) == [1, 1, 1]
    assert sim.scheduler.counters.prefix_hits == 7


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5])
def test_one_sibling_leaves_and_the_others_stay(echo, make_scheduler, make_request, index: int, num_steps: int) -> None:
    sim = echo.Simulation(make_scheduler(num_blocks=65, max_num_seqs=2))
    sim.add(make_request("a", 6, 9, num_sequences=3))
    for _ in range(num_steps):
        sim.step()
    sim.abort_sequence("a", index)
    sim.abort_sequence("a", index)
    sim.abort_sequence("a", 7)
    sim.abort_sequence("nobody", 0)
    sim.drain()
    sim.check_outputs()
    assert [sim.results["a", i].reason == "abort" for i in range(3)] == [i == index for i in range(3)]


def test_an_error_ends_all_and_leaves_nothing_in_the_cache(make_scheduler, make_request) -> None:
    scheduler = make_scheduler(num_blocks=65)
    scheduler.add(make_request("a", 6, 9, num_sequences=3))
    for _ in range(2):
        plan = scheduler.commit(scheduler.plan())
        scheduler.digest(plan, np.full(len(plan.sampled_rows), 500, np.int32))
    plan = scheduler.commit(scheduler.plan())
    assert len(plan.sampled_rows) == 3
    events = scheduler.digest(plan, np.full(3, 500, np.int32), np.array([False, True, True]))
    assert [(e.sequence.index, e.reason, e.is_last) for e in events.finished] == [(1, "error", True)]
    assert not scheduler.has_work
    assert len(scheduler.memory.index) == 0
    scheduler.check_integrity()


@pytest.mark.parametrize("num_prompt", [2, 4, 6])
@pytest.mark.parametrize("num_steps", range(1, 8))
def test_what_a_failed_row_wrote_is_not_cached(make_scheduler, make_request, num_prompt: int, num_steps: int) -> None:
    """Regression: a row with no cached block yet entered those of its failed steps when it ended."""
    scheduler = make_scheduler(num_blocks=65)
    scheduler.add(make_request("a", num_prompt, 20))
    for _ in range(num_steps):
        plan = scheduler.commit(scheduler.plan())
        scheduler.digest(plan, np.array([500], np.int32))
    plan = scheduler.commit(scheduler.plan())
    scheduler.digest(plan, np.array([500], np.int32), np.array([True]))
    assert not scheduler.has_work
    assert len(scheduler.memory.index) == 0


def test_the_cost_of_n_is_shared_memory(echo, make_scheduler, make_request) -> None:
    """Four continuations of 40 tokens hold the prompt's 10 blocks once, and 2 each of their own."""
    sim = echo.Simulation(make_scheduler(num_blocks=65, max_num_batched_tokens=64), depth=0)
    sim.add(make_request("a", 40, 8, num_sequences=4))
    for _ in range(7):  # the first one has fed 6 tokens of its own, the others 5
        sim.step()
    assert sim.scheduler.num_running == 4
    assert 64 - sim.scheduler.num_free_blocks == 10 + 4 * 2
    sim.drain()
    sim.check_outputs()


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("num_prompt", [1, 2, 3, 4])
def test_as_many_copies_are_counted_as_are_made(echo, make_scheduler, make_request, n: int, num_prompt: int) -> None:
    """The plan sets aside the blocks that the copies of its step will take: no more, no fewer."""
    sim, num_copies = echo.Simulation(make_scheduler(num_blocks=65, max_num_seqs=3), depth=0), 0
    sim.add(make_request("a", num_prompt, 9, num_sequences=n))
    while sim.has_requests:
        decodes, _, _ = planner._plan_decodes(sim.scheduler._view)
        plan = sim.step()
        assert decodes.num_copies == len(plan.copy_to)
        num_copies += len(plan.copy_to)
    assert (num_copies > 0) == (num_prompt % 4 > 0)
