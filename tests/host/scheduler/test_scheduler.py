"""What the scheduler decides, case by case, with hand-worked plans."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest

from jaxserve.errors import ConfigError, KVBudgetError, QueueFullError
from jaxserve.scheduler.policy import SchedulerLimits
from jaxserve.scheduler.sequences import Sequence

OTHER = 500  # a token that ends nothing


def step(scheduler, token=OTHER):
    """One step in order, each sampled row getting `token`; returns the plan and its events."""
    plan = scheduler.commit(scheduler.plan())
    return plan, scheduler.digest(plan, np.full(len(plan.sampled_rows), token, np.int32))


def as_lists(value):
    """A plan or decision as nested lists; sequences by name."""
    if isinstance(value, np.ndarray):
        return as_lists(value.tolist())
    if hasattr(value, "_asdict"):
        return {name: as_lists(item) for name, item in value._asdict().items()}
    if isinstance(value, (tuple, list)):
        return [as_lists(item) for item in value]
    if isinstance(value, Sequence):
        return value.request.request_id, value.index
    return {f.name: as_lists(getattr(value, f.name)) for f in fields(value)} if is_dataclass(value) else value


def names(sequences):
    return [sequence.request.request_id for sequence in sequences]


def columns(table):
    """A table's columns, for comparison; objects by identity. Without the roster, which is gathered when asked for."""
    values = {name: value for name, value in vars(table).items() if name not in ("_decoding", "_num_steps_left")}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def test_a_request_from_prompt_to_length(make_scheduler, make_request) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", num_prompt=3, max_tokens=3))
    plan, _ = step(scheduler)
    assert as_lists(plan) == {
        "step": 0,
        "decode_rows": [],
        "decode_positions": [],
        "num_steps": 1,
        "prefill_rows": [0],
        "prefill_starts": [0],
        "prefill_lens": [3],
        "prefill_samples": [True],
        "prefill_stored": [False],
        "block_rows": [],
        "block_cols": [],
        "block_ids": [],
        "copy_from": [],
        "copy_to": [],
        "swap_out_blocks": [],
        "swap_out_slots": [],
        "swap_in_slots": [],
        "swap_in_blocks": [],
        "admitted": [{"row": 0, "block_ids": [1], "num_stored": 0}],
        "beam_groups": [],
        "preempted": [],
        "prefill_generations": [0],
    }
    plan, _ = step(scheduler)
    assert (plan.decode_rows.tolist(), plan.decode_positions.tolist()) == ([0], [3])
    assert len(plan.block_ids) == 0
    plan, events = step(scheduler)
    assert plan.decode_positions.tolist() == [4]
    assert (plan.block_rows.tolist(), plan.block_cols.tolist(), plan.block_ids.tolist()) == ([0], [1], [2])
    assert [(e.sequence.request.request_id, e.reason, e.stop_reason) for e in events.finished] == [
        ("a", "length", None)
    ]
    assert not scheduler.has_work
    assert scheduler.num_free_blocks == 16


def test_long_prompts_are_cut_to_what_the_decodes_leave(make_scheduler, make_request) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("short", 4, 40))
    step(scheduler)
    scheduler.add(make_request("long", 35, 10))
    chunks = []
    for _ in range(4):
        plan, _ = step(scheduler)
        assert plan.decode_rows.tolist() in ([0], [0, 1])
        assert plan.num_tokens <= 16
        chunks += zip(plan.prefill_starts.tolist(), plan.prefill_lens.tolist(), plan.prefill_samples, strict=True)
    assert chunks == [(0, 15, False), (15, 15, False), (30, 5, True)]


def test_prefills_go_in_order_of_arrival_within_the_token_budget(make_scheduler, make_request) -> None:
    scheduler = make_scheduler(num_blocks=65)
    for name in "abc":
        scheduler.add(make_request(name, 10, 10))
    plan, _ = step(scheduler)
    assert [a.row for a in plan.admitted] == [0, 1]
    assert plan.prefill_lens.tolist() == [10, 6]
    assert plan.prefill_samples.tolist() == [True, False]
    assert scheduler.sequences.sequences[1].request.request_id == "b"
    plan, _ = step(scheduler)
    assert plan.decode_rows.tolist() == [0]
    assert plan.prefill_rows.tolist() == [1, 2]
    assert plan.prefill_starts.tolist() == [6, 0]
    assert plan.prefill_lens.tolist() == [4, 10]
    assert [a.row for a in plan.admitted] == [2]


def test_the_queue_is_served_first_come_first_served(echo, make_scheduler, make_request) -> None:
    sim = echo.Simulation(make_scheduler(num_blocks=33))
    ordered = [f"r{i}" for i in np.random.default_rng(0).permutation(30)]
    for i, name in enumerate(ordered):
        sim.add(make_request(name, num_prompt=1 + i * 7 % 40, max_tokens=1 + i % 9))
    sim.drain()
    sim.check_outputs()
    assert sim.admitted == ordered
    assert [sim.requests[name].arrival for name in ordered] == list(range(30))


def test_plan_is_pure_and_plans_are_read_only(make_scheduler, make_request) -> None:
    scheduler = make_scheduler(num_blocks=17, num_swap_blocks=20)
    for i in range(6):
        scheduler.add(make_request(f"r{i}", 9, 30, num_sequences=1 + i % 2))
    for _ in range(30):
        tables = (scheduler.sequences, scheduler.memory.table, scheduler.memory.pool, scheduler.memory.host)
        before, counted = [columns(table) for table in tables], replace(scheduler.counters)
        first, second = scheduler.plan(), scheduler.plan()
        assert as_lists(first) == as_lists(second)
        assert [columns(table) for table in tables] == before
        assert scheduler.counters == counted
        plan = scheduler.commit(second)
        roster = {field.name: getattr(first.decodes, field.name) for field in fields(first.decodes)}
        for values in (first._asdict(), plan._asdict(), roster):
            for name, column in values.items():
                assert not (isinstance(column, np.ndarray) and column.flags.writeable), name
        scheduler.digest(plan, np.full(len(plan.sampled_rows), OTHER, np.int32))


def test_all_but_the_two_ends_of_a_decode_iteration_list_no_blocks(make_scheduler, make_request) -> None:
    scheduler = make_scheduler(num_blocks=65, block_size=16)
    for name in "abcd":
        scheduler.add(make_request(name, 4, 40))
    opened = [len(step(scheduler)[0].block_ids) for _ in range(30)]
    # Blocks of 16 tokens at position 0 (admitted rows bring their table), 16 (step 13: 4 + 12 decoded), 32 (step 29).
    assert opened == [0] * 13 + [4] + [0] * 15 + [4]


@pytest.mark.parametrize(
    ("fields_", "token", "reason", "stop_reason"),
    [
        ({"stop_token_ids": (7,)}, 7, "stop", None),
        ({"stop_token_ids": (7, 9)}, 9, "stop", 9),
        ({"stop_token_ids": (9,)}, 7, None, None),
        ({"stop_token_ids": ()}, 7, None, None),
        ({"stop_token_ids": (7,), "min_tokens": 2}, 7, None, None),
        ({"stop_token_ids": (7,), "min_tokens": 1}, 7, "stop", None),
        ({"stop_token_ids": tuple(range(100, 164))}, 163, "stop", 163),
        ({"stop_token_ids": (7,), "max_tokens": 1}, 7, "stop", None),
        ({"stop_token_ids": (7,), "max_tokens": 1}, 8, "length", None),
        ({"stop_token_ids": (7,), "max_tokens": 1, "min_tokens": 1}, 8, "length", None),
    ],
)
def test_how_the_first_token_ends_a_request(
    make_scheduler, make_request, fields_: dict, token: int, reason: str | None, stop_reason: int | None
) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("other", 3, 10, stop_token_ids=(1, 2, 3)))
    scheduler.add(make_request("a", 3, **({"max_tokens": 5} | fields_)))
    _, events = step(scheduler, token)
    expected = [] if reason is None else [("a", reason, stop_reason)]
    assert [(e.sequence.request.request_id, e.reason, e.stop_reason) for e in events.finished] == expected
    assert events.finish_codes.tolist() == [0, {None: 0, "stop": 1, "length": 2}[reason]]
    assert scheduler.num_running == 2 - len(expected)


def test_min_tokens_counts_outputs(make_scheduler, make_request) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3, 10, stop_token_ids=(7,), min_tokens=3))
    ends = [bool(step(scheduler, 7)[1].finished) for _ in range(3)]
    assert ends == [False, False, True]


def test_a_failed_row_ends_alone(make_scheduler, make_request) -> None:
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add(make_request(name, 3, 10, stop_token_ids=(7,)))
    plan = scheduler.commit(scheduler.plan())
    events = scheduler.digest(plan, np.array([7, OTHER], np.int32), np.array([True, False]))
    assert [(e.index, e.sequence.request.request_id, e.reason, e.stop_reason) for e in events.finished] == [
        (0, "a", "error", None)
    ]
    assert scheduler.num_running == 1
    scheduler.check_integrity()


@pytest.mark.parametrize("failed", [[True, False, False], [False, True, False], [True, True, True]])
def test_failures_are_matched_with_the_rows_that_are_left(make_scheduler, make_request, failed: list[bool]) -> None:
    scheduler = make_scheduler()
    for name in "abc":
        scheduler.add(make_request(name, 3, 10))
    plan = scheduler.commit(scheduler.plan())
    scheduler.abort("a")
    events = scheduler.digest(plan, np.array([OTHER] * 3, np.int32), np.array(failed))
    assert events.live.tolist() == [False, True, True]
    assert [e.sequence.request.request_id for e in events.finished] == [
        n for n, f in zip("abc", failed, strict=True) if f and n > "a"
    ]
    scheduler.check_integrity()


def test_one_step_ahead_the_answer_for_an_ended_row_is_dropped(make_scheduler, make_request) -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_request("a", 3, 10, stop_token_ids=(7,)))
    scheduler.add(make_request("b", 3, 10))
    first = scheduler.commit(scheduler.plan())
    second = scheduler.commit(scheduler.plan())
    assert second.decode_rows.tolist() == [0]
    assert [e.sequence.request.request_id for e in scheduler.digest(first, np.array([7], np.int32)).finished] == ["a"]
    third = scheduler.commit(scheduler.plan())
    assert [a.row for a in third.admitted] == [0]  # the row is b's while a's last step still runs
    events = scheduler.digest(second, np.array([OTHER], np.int32))
    assert events.live.tolist() == [False]
    assert events.sequences[0].request.request_id == "a"
    assert events.finished == ()
    events = scheduler.digest(third, np.array([OTHER], np.int32))
    assert events.live.tolist() == [True]
    assert events.sequences[0].request.request_id == "b"
    assert scheduler.sequences.token_ids[0, 3] == OTHER
    scheduler.check_integrity()


def test_a_row_whose_last_token_is_in_flight_is_not_scheduled(make_scheduler, make_request) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3, 2))
    decisions = [scheduler.plan()]
    for _ in range(2):
        scheduler.commit(decisions[-1])
        decisions.append(scheduler.plan())
    assert decisions[1].decode_rows.tolist() == [0]
    assert decisions[2].is_empty


@pytest.mark.parametrize("state", ["waiting", "prefill", "decode", "in flight", "preempted", "ended", "unknown"])
@pytest.mark.parametrize("depth", [0, 1])
def test_abort_in_every_state(echo, make_scheduler, make_request, state: str, depth: int) -> None:
    sim = echo.Simulation(make_scheduler(num_blocks=17, max_num_seqs=3), depth)
    for name in "ab":
        sim.add(make_request(name, 5, 50))
    prompt = {"prefill": 30, "ended": 2}.get(state, 5)
    sim.add(make_request("victim", prompt, 1 if state == "ended" else 30))
    rows = sim.scheduler.sequences
    done = {
        "waiting": lambda: True,
        "prefill": lambda: any(rows.num_computed[rows.prefill_rows()] > 0),
        "decode": lambda: len(rows.decode_rows()) == 3,
        "in flight": lambda: len(rows.decode_rows()) == 3,
        "preempted": lambda: sim.scheduler.num_preemptions > 0,
        "ended": lambda: sim.results["victim", 0].reason is not None,
        "unknown": lambda: True,
    }[state]
    for _ in range(40):
        if done():
            break
        sim.step()
    assert done()
    if state == "in flight":
        sim.depth = 2
        sim.step()
        sim.depth = depth
    if state == "unknown":
        assert sim.scheduler.abort("nobody") is None
    else:
        sim.abort("victim")
        assert sim.scheduler.abort("victim") is None
    sim.drain()
    sim.check_outputs()


@pytest.mark.parametrize("depth", [0, 1])
def test_after_a_lost_device_everybody_goes_on_in_the_same_order(
    echo, make_scheduler, make_request, depth: int
) -> None:
    sim = echo.Simulation(make_scheduler(num_blocks=33), depth)
    ordered = [f"r{i}" for i in range(8)]
    for name in ordered:
        sim.add(make_request(name, 6, 20))
    for _ in range(6):
        sim.step()
    delivered = sim.num_delivered
    assert delivered > 0
    sim.lose_device()
    assert names(sim.scheduler.waiting) == ordered
    assert sum(len(s.known_token_ids) - 6 for s in sim.scheduler.waiting) == delivered
    assert all(s.num_preemptions == 0 for s in sim.scheduler.waiting)
    sim.drain()
    sim.check_outputs()


def test_an_id_can_be_used_again_only_after_its_end(make_scheduler, make_request) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3, 1))
    with pytest.raises(ValueError, match="Request id 'a' is in use"):
        scheduler.add(make_request("a", 3, 1))
    step(scheduler)
    scheduler.add(make_request("a", 3, 1))
    scheduler.abort("a")
    scheduler.add(make_request("a", 3, 1))
    scheduler.check_integrity()


def test_a_request_that_the_pool_can_never_hold_is_refused(make_scheduler, make_request) -> None:
    scheduler = make_scheduler(num_blocks=6)
    with pytest.raises(KVBudgetError) as error:
        scheduler.add(make_request("a", 11, 10))
    message = str(error.value)
    for part in ("needs 6 KV blocks of 4 tokens", "11 prompt", "10 output", "only 5", "lower max_tokens"):
        assert part in message
    assert not scheduler.has_work
    scheduler.add(make_request("a", 11, 9))
    for _ in range(9):
        step(scheduler)
    assert not scheduler.has_work


def test_a_full_queue_refuses(make_scheduler, make_request) -> None:
    scheduler = make_scheduler(num_blocks=65, max_num_queued_reqs=2)
    for i in range(4 + 2):  # four find a free row, two queue
        scheduler.add(make_request(f"r{i}", num_prompt=4))
    with pytest.raises(QueueFullError, match=r"6 sequences wait, the bound is 2.*max_num_queued_reqs"):
        scheduler.add(make_request("one more"))
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (4, 2)
    with pytest.raises(QueueFullError, match="2 sequences wait, the bound is 2"):
        scheduler.add(make_request("one more"))
    scheduler.abort("r0")
    scheduler.add(make_request("one more"))
    scheduler.check_integrity()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_batched_tokens": 7}, "max_num_batched_tokens=7 must be at least max_num_seqs=8"),
        ({"block_size": 12}, "power of two, got 12"),
        ({"num_blocks": 1}, "num_blocks must be at least 2, got 1"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
    ],
)
def test_limits_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    values = {"num_blocks": 9, "block_size": 16, "max_num_seqs": 8, "max_model_len": 64, "max_num_batched_tokens": 8}
    with pytest.raises(ConfigError, match=message):
        SchedulerLimits(**(values | changes))


def test_answers_are_digested_once_and_in_order(make_scheduler, make_request) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3, 10))
    decision = scheduler.plan()
    first = scheduler.commit(decision)
    with pytest.raises(AssertionError, match="stale"):
        scheduler.commit(decision)
    second = scheduler.commit(scheduler.plan())
    with pytest.raises(AssertionError, match="plan 1 digested before plan 0"):
        scheduler.digest(second, np.array([1], np.int32))
    third = make_scheduler()
    with pytest.raises(AssertionError, match="was not committed"):
        third.digest(first, np.array([1], np.int32))


def test_a_plan_made_before_an_abort_cannot_be_committed(make_scheduler, make_request) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3, 10))
    step(scheduler)
    plan = scheduler.plan()
    scheduler.abort("a")
    with pytest.raises(AssertionError, match="taken away since"):
        scheduler.commit(plan)


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda s: s.memory.pool.ref_count.__setitem__(s.memory.table.ids[0, 0], 2),
        lambda s: s.memory.table.ids.__setitem__((1, 0), s.memory.table.ids[0, 0]),
        lambda s: s.memory.table.num_blocks.__setitem__(0, 1),
        lambda s: s.sequences.num_computed.__setitem__(0, 1),
        lambda s: s.sequences.num_tokens.__setitem__(1, 64),
        lambda s: s.sequences.num_known.__setitem__(1, 2),
        lambda s: s.sequences.on_device.__setitem__(3, True),
        lambda s: s.sequences.active.__setitem__(0, False),
        lambda s: s.sequences.place.__setitem__(0, s.sequences.place[1]),
        lambda s: s.sequences.token_ids.__setitem__((0, 0), -5),
        lambda s: s.sequences.stop_ids.__setitem__((0, 0), 3),
        lambda s: s.sequences.sequences[0].__setattr__("row", 1),
        lambda s: s.sequences.num_reserved.__setitem__(0, 99),
        lambda s: s.sequences.max_total_len.__setitem__(0, 40),
        lambda s: s.sequences.min_stop_len.__setitem__(0, 40),
        lambda s: s._requests.pop("r0"),
        lambda s: s.waiting._sequences.reverse(),
        lambda s: s.waiting._sequences[0].request.__setattr__("arrival", 0),
        lambda s: s.waiting._sequences[0].__setattr__("num_preemptions", 9),
        lambda s: s.waiting._sequences[0].__setattr__("swapped", np.array([0])),
        lambda s: s.sequences.sequences[0].__setattr__("swapped", np.array([0])),
        lambda s: s.memory.host.ref_count.__setitem__(1, 1),
        lambda s: s.memory.pool.is_kept.__setitem__(s.memory.table.ids[0, 0], False),
        lambda s: s.memory.pool.is_kept.__setitem__(s.memory.table.ids[0, 1], True),
        lambda s: s.memory.index.forget(s.memory.table.ids[0, :1]),
        lambda s: s.memory.table.set_row(3, s.memory.table.ids[0, :1]),
    ],
)
def test_integrity_sees_a_planted_fault(make_scheduler, make_request, corrupt) -> None:
    scheduler = make_scheduler(num_blocks=9, max_num_seqs=4, num_swap_blocks=8)
    for i in range(5):
        scheduler.add(make_request(f"r{i}", 6, 20))
    step(scheduler)
    step(scheduler)
    assert scheduler.num_running
    assert scheduler.num_waiting > 1
    scheduler.check_integrity()
    corrupt(scheduler)
    with pytest.raises(AssertionError):
        scheduler.check_integrity()
