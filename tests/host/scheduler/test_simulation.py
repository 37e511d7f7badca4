"""The whole scheduler on an EchoDevice: random histories, the invariants after each operation, exact outputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from jaxserve.scheduler.policy import MemoryCosts, SchedulerLimits
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequences import Request

EOS = 7


def random_limits(rng: np.random.Generator) -> SchedulerLimits:
    """Small limits, with pools from one longest request's worth up; with and without cache and host memory."""
    block_size = int(rng.choice([1, 2, 4, 8]))
    num_rows, max_len = int(rng.integers(1, 9)), int(rng.integers(8, 65))
    longest = -(-max_len // block_size)
    more = int(rng.integers(0, longest * num_rows)) if rng.random() < 0.7 else 0
    return SchedulerLimits(
        num_blocks=1 + longest + more,
        block_size=block_size,
        max_num_seqs=num_rows,
        max_model_len=max_len,
        max_num_batched_tokens=num_rows + int(rng.integers(0, 40)),
        eos_token_ids=(EOS,),
        num_swap_blocks=int(rng.choice([0, longest, 10 * longest])),
        enable_prefix_caching=bool(rng.random() < 0.8),
        costs=MemoryCosts(swap_block_s=float(rng.choice([1e-6, 2e-5, 1e-3]))),
    )


def random_request(rng: np.random.Generator, name: str, max_len: int) -> Request:
    """Prompts begin alike in most cases: they are cut from four texts."""
    num_prompt = int(rng.integers(1, max_len))
    total = int(rng.integers(num_prompt + 1, max_len + 1))
    stops = rng.integers(0, 1000, int(rng.choice([0, 0, 1, 30]))).tolist()
    prompt = np.random.default_rng(int(rng.integers(0, 4))).integers(0, 1000, num_prompt, dtype=np.int32)
    if rng.random() < 0.5:
        changed = int(rng.integers(0, num_prompt))
        prompt[changed:] = rng.integers(0, 1000, num_prompt - changed)
    return Request(
        name,
        prompt,
        total,
        (EOS, *stops),
        min_tokens=int(rng.integers(0, total - num_prompt + 1)),
        num_sequences=int(rng.choice([1, 1, 1, 2, 5])),
        cache_salt=bytes(rng.choice([b"", b"", b"a", b"b"])),
        reads_cache=bool(rng.random() < 0.9),
    )


@pytest.mark.parametrize("seed", range(50))
def test_random_history(echo, seed: int) -> None:
    rng = np.random.default_rng(seed)
    limits = random_limits(rng)
    sim = echo.Simulation(Scheduler(limits), depth=int(rng.integers(0, 3)))
    add_share = rng.choice([0.1, 0.25, 0.5])
    for index in range(250):
        dice = rng.random()
        if dice < add_share:
            sim.add(random_request(rng, f"r{index}", limits.max_model_len))
        elif dice < add_share + 0.03 and sim.requests:
            sim.abort(str(rng.choice(list(sim.requests))))
        elif dice < add_share + 0.05 and sim.requests:
            sim.abort_sequence(str(rng.choice(list(sim.requests))), int(rng.integers(0, 5)))
        elif dice < add_share + 0.08:
            sim.depth = int(rng.integers(0, 3))
        elif dice < add_share + 0.1 and sim.undigested:
            sim.digest(failed=rng.random(len(sim.undigested[0].tokens)) < 0.3)
        elif dice < add_share + 0.11:
            sim.lose_device()
        elif dice < add_share + 0.12:
            sim.reset_cache()
        else:
            sim.step()
    sim.drain()
    sim.check_outputs()
    assert max(sim.preemptions.values(), default=0) <= 5


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of operations; hypothesis looks for one that breaks an invariant or an output."""

    echo_module = None
    num_compared = 0  # over all histories of a run

    def __init__(self):
        super().__init__()
        self.sim = None
        self.num_added = 0

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        num_rows=st.integers(1, 4),
        max_len=st.integers(4, 24),
        more_blocks=st.integers(0, 12),
        more_tokens=st.integers(0, 20),
        depth=st.integers(0, 2),
        slots=st.sampled_from([0, 3, 40]),
        caches=st.booleans(),
    )
    def start(self, block_size, num_rows, max_len, more_blocks, more_tokens, depth, slots, caches):
        limits = SchedulerLimits(
            num_blocks=1 + -(-max_len // block_size) + more_blocks,
            block_size=block_size,
            max_num_seqs=num_rows,
            max_model_len=max_len,
            max_num_batched_tokens=num_rows + more_tokens,
            eos_token_ids=(EOS,),
            num_swap_blocks=slots,
            enable_prefix_caching=caches,
            costs=MemoryCosts(swap_block_s=1e-7),
        )
        self.sim = self.echo_module.Simulation(Scheduler(limits), depth)

    @rule(data=st.data(), seed=st.integers(0, 3), n=st.sampled_from([1, 1, 2, 3]), salt=st.sampled_from([b"", b"a"]))
    def add(self, data, seed, n, salt):
        max_len = self.sim.scheduler.limits.max_model_len
        num_prompt = data.draw(st.integers(1, max_len - 1))
        total = data.draw(st.integers(num_prompt + 1, max_len))
        rng = np.random.default_rng(seed)
        stops = (EOS, *rng.integers(0, 1000, data.draw(st.sampled_from([0, 50]))).tolist())
        prompt = rng.integers(0, 1000, num_prompt, dtype=np.int32)
        min_tokens = data.draw(st.integers(0, total - num_prompt))
        fields = {"num_sequences": n, "cache_salt": salt, "reads_cache": data.draw(st.booleans())}
        self.sim.add(Request(f"r{self.num_added}", prompt, total, stops, min_tokens, **fields))
        self.num_added += 1

    @precondition(lambda self: self.num_added > 0)
    @rule(data=st.data())
    def add_again(self, data):
        request = self.sim.requests[f"r{data.draw(st.integers(0, self.num_added - 1))}"]
        twin = Request(request.request_id, request.prompt_token_ids, request.max_total_len)
        if request.sequences:
            with pytest.raises(ValueError, match="is in use"):
                self.sim.scheduler.add(twin)
            self.sim.scheduler.check_integrity()

    @precondition(lambda self: self.num_added > 0)
    @rule(data=st.data(), index=st.integers(0, 3))
    def abort_sequence(self, data, index):
        self.sim.abort_sequence(f"r{data.draw(st.integers(0, self.num_added - 1))}", index)

    @rule()
    def reset_cache(self):
        self.sim.reset_cache()

    @rule(tears=st.booleans(), chosen=st.sets(st.integers(0, 3)))
    def faulty_step(self, tears, chosen):
        self.sim.step(tears=tears, choose_nan=lambda rows: [row for row in rows.tolist() if row in chosen])

    @rule()
    def step_that_raises(self):
        self.sim.step(raises=True)

    @rule(is_slow=st.booleans(), count=st.integers(0, 3))
    def copies(self, is_slow, count):
        self.sim.is_slow = is_slow
        self.sim.store.arrive(count)

    @precondition(lambda self: self.sim is not None and self.sim.undigested)
    @rule()
    def late_and_stale_plans(self):
        """A plan is committed once, and its answer taken in its turn; nothing changes when it is not."""
        scheduler, newest = self.sim.scheduler, self.sim.undigested[-1]
        decision = scheduler.plan()._replace(step=newest.plan.step)
        with pytest.raises(AssertionError, match="stale"):
            scheduler.commit(decision)
        scheduler.check_integrity()

    @rule()
    def step(self):
        self.sim.step()

    @rule(count=st.integers(2, 12))
    def steps(self, count):
        for _ in range(count):
            self.sim.step()

    @rule(depth=st.integers(0, 2))
    def set_depth(self, depth):
        self.sim.depth = depth

    @precondition(lambda self: self.sim is not None and self.sim.undigested)
    @rule(data=st.data(), fails=st.booleans())
    def digest(self, data, fails):
        count = len(self.sim.undigested[0].tokens)
        failed = np.array([fails and data.draw(st.booleans()) for _ in range(count)], bool)
        self.sim.digest(failed if fails else None)

    @rule()
    def lose_device(self):
        self.sim.lose_device()

    @precondition(lambda self: self.num_added > 0)
    @rule(data=st.data())
    def abort(self, data):
        self.sim.abort(f"r{data.draw(st.integers(0, self.num_added - 1))}")

    def teardown(self):
        if self.sim is not None:
            self.sim.drain()
            self.sim.check_outputs()
            SchedulerMachine.num_compared += len(self.sim.results)


def test_any_order_of_operations(echo) -> None:
    SchedulerMachine.echo_module, SchedulerMachine.num_compared = echo, 0
    budget = settings(max_examples=60, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(SchedulerMachine, settings=budget)
    assert SchedulerMachine.num_compared > 60, "outputs compared with their reference, in all histories"


def test_thousands_of_steps_without_a_leak(echo) -> None:
    limits = SchedulerLimits(
        num_blocks=60,
        block_size=4,
        max_num_seqs=8,
        max_model_len=64,
        max_num_batched_tokens=24,
        eos_token_ids=(EOS,),
    )
    rng, sim = np.random.default_rng(5), None
    sim = echo.Simulation(Scheduler(limits), depth=1, deep_every=0)
    num_steps = 0
    while num_steps < 5000:
        while sim.scheduler.num_waiting < 4:
            sim.add(random_request(rng, f"r{len(sim.requests)}", limits.max_model_len))
        if rng.random() < 0.02:
            sim.abort(str(rng.choice(list(sim.requests))))
        sim.step()
        num_steps += 1
    sim.drain()
    sim.check_outputs()
    sim.scheduler.check_integrity()
    assert len(sim.requests) > 500
    assert sim.scheduler.num_preemptions > 50


def test_the_device_notices_wrong_blocks(echo) -> None:
    """The oracle's own test: one wrong token anywhere in a context changes the next one."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 1000, 40)
    plain = echo.next_token(tokens)
    changed = 0
    for position in range(40):
        wrong = tokens.copy()
        wrong[position] = echo.POISON
        changed += echo.next_token(wrong) != plain
    assert changed >= 39
    assert echo.next_token(tokens[::-1].copy()) != plain
