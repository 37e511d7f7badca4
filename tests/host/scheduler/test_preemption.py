"""What happens when the blocks run out: who gives way, how often, and that everybody is served all the same."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.scheduler import admission, policy
from jaxserve.scheduler.plan import StepPlan


def crowd(echo, make_scheduler, make_request, *, num=12, extra_blocks=0, depth=1, **limits):
    """A simulation with `num` long requests, on a pool of the longest one's blocks and some more."""
    values = {"block_size": 1, "max_num_seqs": 8, "max_model_len": 48, "max_num_batched_tokens": 16} | limits
    longest = -(-values["max_model_len"] // values["block_size"])
    sim = echo.Simulation(make_scheduler(1 + longest + extra_blocks, **values), depth)
    for i in range(num):
        sim.add(make_request(f"r{i}", num_prompt=2 + i % 3, max_tokens=35 + i % 9))
    return sim


def bound_preemptions(monkeypatch, bound: int) -> None:
    """As if the policy had been written with this bound."""
    for module in (policy, admission):
        monkeypatch.setattr(module, "MAX_PREEMPTIONS", bound)


def test_the_youngest_gives_way_and_keeps_its_place(make_scheduler, make_request, monkeypatch) -> None:
    monkeypatch.setattr(policy, "VICTIM_WINDOW", 1)  # age alone decides
    scheduler = make_scheduler(num_blocks=9, max_num_seqs=2)  # 8 blocks of 4 tokens
    for name, num_prompt in (("old", 4), ("young", 8), ("later", 4)):
        scheduler.add(make_request(name, num_prompt, 24))
    plans = []
    for _ in range(40):
        if scheduler.num_preemptions:
            break
        plans.append(scheduler.commit(scheduler.plan()))
        scheduler.digest(plans[-1], np.full(len(plans[-1].sampled_rows), 500, np.int32))
    # Step n decodes old at position 3 + n and young at 7 + n, so both open a block in steps 1, 5 and 9; in step 5
    # old then has 3 blocks and young 4; in step 9 they want 4 + 5, of 8.
    plan = plans[-1]
    assert plan.step == 9
    assert [(p.request_id, p.index, p.swapped) for p in plan.preempted] == [("young", 0, False)]
    assert plan.decode_rows.tolist() == [0]
    assert plan.admitted == ()
    assert [s.request.request_id for s in scheduler.waiting] == ["young", "later"]
    young = next(iter(scheduler.waiting))
    assert young.known_token_ids[:8].tolist() == young.request.prompt_token_ids.tolist()
    assert set(young.known_token_ids[8:].tolist()) == {500}
    scheduler.check_integrity()


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("extra_blocks", [0, 3, 30])
def test_preempted_requests_give_the_same_output(
    echo, make_scheduler, make_request, depth: int, extra_blocks: int
) -> None:
    sim = crowd(echo, make_scheduler, make_request, extra_blocks=extra_blocks, depth=depth)
    sim.drain()
    sim.check_outputs()
    assert sim.scheduler.num_preemptions == sum(sim.preemptions.values()) > 10


def test_preemptions_a_request_are_bounded_and_the_bound_is_met(echo, make_scheduler, make_request) -> None:
    sim = crowd(echo, make_scheduler, make_request, num=24)
    protected_seen = False
    while sim.has_requests:
        rows = sim.scheduler.sequences
        protected_seen |= bool(rows.is_protected.any())
        protected = {sequence.request.request_id for sequence in rows.sequences[rows.is_protected]}
        assert not protected & {gone.request_id for gone in sim.step().preempted}
    sim.drain()
    sim.check_outputs()
    assert protected_seen
    assert max(sim.preemptions.values()) == policy.MAX_PREEMPTIONS <= 5


@pytest.mark.parametrize("bound", [0, 1])
def test_the_bound_holds_whatever_it_is(echo, make_scheduler, make_request, monkeypatch, bound: int) -> None:
    bound_preemptions(monkeypatch, bound)
    for extra_blocks in (0, 5, 40):
        sim = crowd(echo, make_scheduler, make_request, extra_blocks=extra_blocks, block_size=2)
        sim.drain()
        sim.check_outputs()
        assert max(sim.preemptions.values(), default=0) <= bound


def test_protected_sequences_enter_only_where_they_can_stay(make_scheduler, make_request, monkeypatch) -> None:
    bound_preemptions(monkeypatch, 0)  # everybody is protected
    scheduler = make_scheduler(num_blocks=17, max_num_seqs=4)  # 16 blocks of 4 tokens
    for name in "abc":
        scheduler.add(make_request(name, 4, 24))  # 7 blocks at their longest
    plan = scheduler.commit(scheduler.plan())
    assert len(plan.admitted) == 2
    scheduler.digest(plan, np.full(2, 500, np.int32))
    scheduler.abort("b")
    assert len(scheduler.plan().entries) == 1


@pytest.mark.parametrize("swap", [0, 200])
def test_by_age_alone_the_oldest_never_gives_way(echo, make_scheduler, make_request, monkeypatch, swap: int) -> None:
    bound_preemptions(monkeypatch, 10**6)  # nobody is protected
    monkeypatch.setattr(policy, "VICTIM_WINDOW", 1)
    cheap = policy.MemoryCosts(swap_block_s=1e-7)
    sim = crowd(echo, make_scheduler, make_request, num=16, num_swap_blocks=swap, costs=cheap)
    while sim.has_requests:
        gone, ages, plan = preempted_and_running(sim)
        assert not gone or min(gone.values()) > max(ages.values(), default=-1)
        assert not (plan.preempted and plan.admitted), "preempted and admitted in one step"
    sim.drain()
    sim.check_outputs()
    assert ("r0", 0) not in sim.preemptions
    assert (sim.scheduler.counters.swap_preemptions > 0) == (swap > 0)


@pytest.mark.parametrize("swap", [0, 200])
def test_who_gives_way_is_overtaken_by_three_at_most(echo, make_scheduler, make_request, swap: int) -> None:
    sim, num_overtaken = crowd(echo, make_scheduler, make_request, num=16, num_swap_blocks=swap), 0
    while sim.has_requests:
        gone, ages, _ = preempted_and_running(sim)
        for age in gone.values():
            num_younger = sum(other > age for other in ages.values())
            assert num_younger < policy.VICTIM_WINDOW
            num_overtaken += num_younger > 0
    sim.drain()
    sim.check_outputs()
    assert num_overtaken > 0, "cost never decided"


def preempted_and_running(sim) -> tuple[dict[str, int], dict[str, int], StepPlan]:
    """A step; the places in line of those that gave way in it, and of the others that may."""
    rows = sim.scheduler.sequences
    in_line = rows.active & ~rows.is_protected & ~rows.is_ending()
    ages = {sequence.request.request_id: sequence.place for sequence in rows.sequences[in_line]}
    plan = sim.step()
    return {p.request_id: ages.pop(p.request_id) for p in plan.preempted if p.request_id in ages}, ages, plan


def test_no_more_give_way_than_must(echo, make_scheduler, make_request) -> None:
    """Blocks of a token: each decode row opens one, so the last victim was needed if those before it freed too few."""
    sim, num_checked = crowd(echo, make_scheduler, make_request, extra_blocks=10), 0
    while sim.has_requests:
        scheduler = sim.scheduler
        rows, table = scheduler.sequences, scheduler.memory.table
        free, num_decodes = scheduler.num_free_blocks, len(rows.decode_rows())
        counts = {s.request.request_id: int(table.num_blocks[s.row]) for s in rows.sequences[rows.active]}
        decoding = {s.request.request_id for s in rows.sequences[rows.decode_rows()]}
        plan = sim.step()
        if plan.preempted:
            *others, last = [gone.request_id for gone in plan.preempted]
            needed = num_decodes - sum(name in decoding for name in others)
            assert needed > free + sum(counts[name] for name in others), f"{last} gave way for nothing"
            num_checked += 1
    sim.drain()
    assert num_checked > 3


def test_progress_under_pressure(echo, make_scheduler, make_request) -> None:
    """B-03: tokens keep coming however tight the pool."""
    sim = crowd(echo, make_scheduler, make_request, num=24)
    delivered = []
    while sim.has_requests:
        sim.step()
        delivered.append(sim.num_delivered)
    window = 24  # the longest prefill (48 tokens in chunks of 16), and a step ahead, with room to spare
    assert all(b > a for a, b in zip(delivered, delivered[window:], strict=False))


def test_admission_leaves_room_for_the_running(make_scheduler, make_request) -> None:
    scheduler = make_scheduler(num_blocks=13, max_num_seqs=4)  # 12 blocks of 4 tokens
    for name in "abcd":
        scheduler.add(make_request(name, 8, 8))
    plan = scheduler.commit(scheduler.plan())
    # a: 2 of 12. b: 2 and its own and a's next of 10. That is 16 tokens, the step's budget.
    assert len(plan.admitted) == 2
    scheduler.digest(plan, np.full(2, 500, np.int32))
    # Both open a block: 6 free. c: 2 and 3 more.
    plan = scheduler.commit(scheduler.plan())
    assert len(plan.admitted) == 1
    # 4 free. d: 2 and 4 more.
    scheduler.digest(plan, np.full(3, 500, np.int32))
    assert len(scheduler.plan().entries) == 0


def test_what_running_prefills_still_need_is_not_given_away(make_scheduler, make_request) -> None:
    scheduler = make_scheduler(num_blocks=17, max_num_seqs=4, max_num_batched_tokens=20)
    scheduler.add(make_request("long", 50, 4))  # 13 of 16 blocks, in chunks
    scheduler.add(make_request("short", 4, 4))
    plan = scheduler.commit(scheduler.plan())
    scheduler.digest(plan, np.empty(0, np.int32))
    assert scheduler.num_free_blocks == 11
    plan = scheduler.commit(scheduler.plan())
    assert plan.prefill_rows.tolist() == [0]
    scheduler.digest(plan, np.empty(0, np.int32))
    # 10 tokens are left of the long one, so that the budget would take the short one.
    plan = scheduler.commit(scheduler.plan())
    assert plan.prefill_lens.tolist() == [10, 4]
    assert [a.row for a in plan.admitted] == [1]
    tight = make_scheduler(num_blocks=16, max_num_seqs=4, max_num_batched_tokens=60)
    tight.add(make_request("long", 50, 4))
    tight.add(make_request("short", 4, 4))
    assert [entry.row for entry in tight.plan().entries] == [0]  # 15 - 13 are not 1 + 2


def test_a_request_that_fills_the_pool_runs_alone(echo, make_scheduler, make_request) -> None:
    sim = echo.Simulation(make_scheduler(num_blocks=17, max_num_seqs=2))
    sim.add(make_request("small", 4, 8))
    sim.add(make_request("whole", 63, 1))
    sim.add(make_request("last", 4, 8))
    sim.drain()
    sim.check_outputs()
    assert sim.admitted == ["small", "whole", "last"]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_prefill_whose_blocks_the_decodes_took_waits_with_what_it_has(
    echo, make_scheduler, make_request, depth: int
) -> None:
    # 19 usable blocks of 4 tokens. Three rows decode; the long one wants 10 blocks and is fed three tokens a step, in
    # which time the three open more blocks than admission left them.
    sim = echo.Simulation(make_scheduler(num_blocks=20, max_num_batched_tokens=6), depth)
    for name in "abc":
        sim.add(make_request(name, 1, 22))
    for _ in range(3):
        sim.step()
    sim.add(make_request("long", 40, 4))
    table, num_cut, num_waited = sim.scheduler.sequences, 0, 0
    while sim.has_requests:
        prefilling = [(row, table.sequences[row].request.request_id) for row in table.prefill_rows()]
        plan = sim.step()
        gone = {p.request_id for p in plan.preempted}
        for row, name in prefilling:
            chunk = plan.prefill_lens[plan.prefill_rows == row]
            num_waited += not len(chunk) and name not in gone
            num_cut += len(chunk) and chunk[0] < min(6 - len(plan.decode_rows), 40 - table.num_computed[row])
    sim.drain()
    sim.check_outputs()
    assert num_waited > 0
    assert depth or num_cut > 0


@pytest.mark.parametrize("arrives", [True, False])
def test_a_copy_that_was_lost_with_the_device_is_computed_again(make_scheduler, make_request, arrives: bool) -> None:
    cheap = policy.MemoryCosts(swap_block_s=1e-9)
    scheduler = make_scheduler(num_blocks=9, max_num_seqs=2, num_swap_blocks=8, costs=cheap)
    for name in ("old", "young"):
        scheduler.add(make_request(name, 6, 24))
    while not scheduler.counters.swap_preemptions:
        plan = scheduler.commit(scheduler.plan())
        scheduler.digest(plan, np.full(len(plan.sampled_rows), 500, np.int32))
    (gone,) = list(scheduler.waiting)
    num_used = scheduler.memory.host.num_used
    assert num_used == len(gone.swapped) > 0
    scheduler.requeue_running(plan.swap_out_slots[:0] if arrives else plan.swap_out_slots[-1:])
    scheduler.check_integrity()
    assert (gone.swapped is not None) == arrives
    assert scheduler.memory.host.num_used == (num_used if arrives else 0)
    stored = {}
    while scheduler.has_work:
        plan = scheduler.commit(scheduler.plan())
        stored |= {scheduler.sequences.sequences[a.row]: a.num_stored for a in plan.admitted}
        scheduler.digest(plan, np.full(len(plan.sampled_rows), 500, np.int32))
        if gone in stored:
            break
    assert (stored[gone] > 0) == arrives
