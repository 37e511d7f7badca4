"""What does the host's half of a step cost, and how much work does memory pressure waste?

    python -m benchmarks.scheduler [--quick] [--json FILE]

Decode iterations run one step ahead, as in the engine: plan, commit, pack, digest of the step before. Rows stand at
random places in their blocks, so that one in sixteen opens a block in each step. No device: tokens are made up.
Times are processor time of the thread, so that other programs in the same system do not count. What shares the
processor from outside does: hence a fixed piece of numpy work in each iteration, which takes as long as the machine
lets it, and the figures of the quietest stretch of iterations beside those of all.

Then a prompt of 8,192 tokens arrives in each iteration, all of it in the prefix cache, while 64 rows decode: what the
iteration takes more than one without it, from `add` to the end of the request.

The pressure rows are 600 requests with lognormal lengths (median 128 prompt and 128 output tokens) on 64 rows and
a pool of 40 % of what those rows want. No two prompts begin alike.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import Counter

import numpy as np

from benchmarks.report import Report
from jaxserve.cache.blocks import blocks_for
from jaxserve.engine.pack import StepPacker
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.policy import SchedulerLimits
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequences import Request
from jaxserve.state import StepShape

EOS, OTHER = 5, 7
BLOCK_SIZE = 16
MAX_MODEL_LEN = 8192
LONG_PROMPT = 8192
STRETCH = 500  # iterations
FIXED = np.arange(64)


def running_scheduler(
    num_rows: int, num_spare_rows: int = 0, num_spare_blocks: int = 0, max_model_len: int = MAX_MODEL_LEN
) -> tuple[Scheduler, StepPlan]:
    """A scheduler with `num_rows` rows that all decode, and the last committed plan, whose answer is due."""
    limits = SchedulerLimits(
        num_blocks=1 + num_rows * blocks_for(max_model_len, BLOCK_SIZE) + num_spare_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=num_rows + num_spare_rows,
        max_model_len=max_model_len,
        max_num_batched_tokens=8192,
        max_num_queued_reqs=2 * num_rows,
        eos_token_ids=(EOS,),
    )
    scheduler = Scheduler(limits)
    for index, num_prompt in enumerate(np.random.default_rng(0).integers(100, 200, num_rows).tolist()):
        scheduler.add(Request(f"r{index}", prompt_of(index, num_prompt), max_model_len, (EOS,)))
    plan = step(scheduler, None)
    while scheduler.num_waiting or len(scheduler.sequences.prefill_rows()):
        plan = step(scheduler, plan)
    return scheduler, step(scheduler, plan)


def prompt_of(index: int, length: int) -> np.ndarray:
    """int32[length]: the prompt of one request; no two begin alike."""
    prompt = np.zeros(length, np.int32)
    prompt[0] = index
    return prompt


def step(scheduler: Scheduler, previous: StepPlan | None) -> StepPlan:
    """One iteration, one step ahead."""
    plan = scheduler.commit(scheduler.plan())
    if previous is not None:
        scheduler.digest(previous, np.full(len(previous.sampled_rows), OTHER, np.int32))
    return plan


def shape_for(scheduler: Scheduler, num_tokens: int) -> StepShape:
    """The engine's layout of a step of that many tokens."""
    limits = scheduler.limits
    return StepShape(num_tokens, limits.max_num_seqs, limits.max_blocks_per_row, BLOCK_SIZE, q_tile=64, kv_tile=64)


def decode_iterations(report: Report, num_rows: int, num_steps: int) -> None:
    """Rows for plan, commit, pack, digest and their sum, in microseconds."""
    scheduler, previous = running_scheduler(num_rows)
    tokens, failed = np.full(num_rows, OTHER, np.int32), np.zeros(num_rows, bool)
    shape, packer = shape_for(scheduler, num_rows), StepPacker(np.zeros(num_rows, np.int32))
    sequences = scheduler.sequences
    laps_ns = np.zeros((num_steps, 6), np.int64)
    for index in range(num_steps):
        t0 = time.thread_time_ns()
        decision = scheduler.plan()
        t1 = time.thread_time_ns()
        plan = scheduler.commit(decision)
        t2 = time.thread_time_ns()
        packer.pack(plan, shape, sequences.token_ids, sequences.num_prompt)
        t3 = time.thread_time_ns()
        scheduler.digest(previous, tokens, failed)
        t4 = time.thread_time_ns()
        previous = plan
        fixed_work()
        laps_ns[index] = t1 - t0, t2 - t1, t3 - t2, t4 - t3, t4 - t0, time.thread_time_ns() - t4
    scheduler.check_integrity()
    for column, name in enumerate(("plan", "commit", "pack", "digest")):
        report.add(f"decode, {num_rows} rows: {name}, p50", np.median(laps_ns[:, column]) / 1e3, "us")
    stretches = laps_ns.reshape(-1, STRETCH, 6)
    quiet = stretches[np.percentile(stretches[:, :, 5], 99, axis=1).argmin()]  # chosen by the fixed work alone
    for column, name in ((4, "in all"), (5, "fixed work beside it")):
        target = "< 100" if column == 4 else None
        report.add(f"decode, {num_rows} rows: {name}, p50", np.median(laps_ns[:, column]) / 1e3, "us")
        report.add(f"decode, {num_rows} rows: {name}, p99", np.percentile(laps_ns[:, column], 99) / 1e3, "us", target)
        each = np.percentile(quiet[:, column], 99) / 1e3
        report.add(f"decode, {num_rows} rows: {name}, p99 of the quietest {STRETCH} iterations", each, "us", target)


def fixed_work() -> None:
    """About 50 us where nothing else runs: eighty operations of numpy on little, as the scheduler's are."""
    for _ in range(80):
        FIXED + 1


def turnover(report: Report, num_rows: int, num_requests: int) -> None:
    """What one request more costs: added, admitted, prefilled in one chunk, ended, freed."""
    scheduler, previous = running_scheduler(num_rows)
    laps_ns = []
    for index in range(num_requests):
        previous = step(scheduler, previous)
        victim = next(s for s in scheduler.sequences.sequences if s is not None).request.request_id
        start = time.thread_time_ns()
        scheduler.abort(victim)
        scheduler.add(Request(f"n{index}", prompt_of(num_rows + index, 150), MAX_MODEL_LEN, (EOS,)))
        previous = step(scheduler, previous)
        middle = time.thread_time_ns()
        previous = step(scheduler, previous)
        laps_ns.append(2 * middle - start - time.thread_time_ns())  # less an iteration without them
    report.add(f"one request out, one in, {num_rows} rows", float(np.median(laps_ns)) / 1e3, "us")


def cached_arrivals(report: Report, num_rows: int, num_requests: int) -> None:
    """What a prompt of 512 blocks costs that the cache has: added, looked up, shared, fed, ended, let go."""
    num_blocks = LONG_PROMPT // BLOCK_SIZE
    scheduler, previous = running_scheduler(num_rows, 4, 4 * num_blocks, LONG_PROMPT + BLOCK_SIZE)
    prompt = np.random.default_rng(1).integers(100, 30000, LONG_PROMPT).astype(np.int32)
    scheduler.add(Request("first", prompt, LONG_PROMPT + 1))
    while scheduler.num_running > num_rows or scheduler.num_waiting:
        previous = step(scheduler, previous)
    hits, laps_ns = scheduler.counters.prefix_hits, np.zeros((num_requests, 2), np.int64)
    for index in range(num_requests):
        for _ in range(3):  # the last one has ended; what an iteration takes without any
            t0 = time.thread_time_ns()
            previous = step(scheduler, previous)
            plain_ns = time.thread_time_ns() - t0
        start = time.thread_time_ns()
        scheduler.add(Request(f"long{index}", prompt, LONG_PROMPT + 1))
        previous = step(scheduler, previous)
        previous = step(scheduler, previous)
        laps_ns[index] = time.thread_time_ns() - start, 2 * plain_ns
        assert scheduler.num_running == num_rows
    assert scheduler.counters.prefix_hits - hits == num_requests * (LONG_PROMPT - 1)
    each_us = (laps_ns[:, 0] - laps_ns[:, 1]) / 1e3
    report.add(f"cached prompt of 512 blocks, {num_rows} rows, p50", np.median(each_us), "us", "< 1000")
    report.add(f"cached prompt of 512 blocks, {num_rows} rows, p99", np.percentile(each_us, 99), "us", None)


def pressure(report: Report, num_requests: int, swap_share: float, caches: bool, name: str) -> None:
    """Tokens computed twice, and preemptions, when the pool is too small for the rows.

    Args:
        swap_share: host memory, in pools.
    """
    num_rows, rng = 64, np.random.default_rng(0)
    prompts, outputs = np.clip(rng.lognormal(np.log(128), 0.8, (2, num_requests)), 4, 1024).astype(int)
    wanted = num_rows * blocks_for(prompts + outputs, BLOCK_SIZE).mean()
    limits = SchedulerLimits(
        num_blocks=1 + int(0.4 * wanted),
        block_size=BLOCK_SIZE,
        max_num_seqs=num_rows,
        max_model_len=2048,
        max_num_batched_tokens=512,
        max_num_queued_reqs=num_requests,
        num_swap_blocks=int(swap_share * 0.4 * wanted),
        enable_prefix_caching=caches,
    )
    scheduler = Scheduler(limits)
    for index, (num_prompt, num_output) in enumerate(zip(prompts.tolist(), outputs.tolist(), strict=True)):
        scheduler.add(Request(f"r{index}", prompt_of(index, num_prompt), num_prompt + num_output))
    preemptions: Counter[str] = Counter()
    num_fed, num_steps, previous = 0, 0, None
    while scheduler.num_running or scheduler.num_waiting:
        previous = step(scheduler, previous)
        preemptions.update(gone.request_id for gone in previous.preempted)
        num_fed += previous.num_tokens
        num_steps += 1
    num_needed, counters = int((prompts + outputs - 1).sum()), scheduler.counters
    target = "<= 1" if swap_share else None
    report.add(f"pool at 40 %, {name}: tokens computed twice", 100 * (num_fed / num_needed - 1), "% of all", target)
    report.add(f"pool at 40 %, {name}: preemptions by swap", counters.swap_preemptions, "")
    report.add(f"pool at 40 %, {name}: preemptions by recompute", counters.recompute_preemptions, "")
    report.add(f"pool at 40 %, {name}: of a request, most", max(preemptions.values(), default=0), "", "<= 5")
    report.add(f"pool at 40 %, {name}: steps", num_steps, "")


def unshared_run(num_requests: int, caches: bool) -> tuple[float, int]:
    """Processor microseconds of the scheduler, and tokens, of a batch in which no two prompts begin alike."""
    limits = SchedulerLimits(
        num_blocks=4096,
        block_size=BLOCK_SIZE,
        max_num_seqs=64,
        max_model_len=1024,
        max_num_batched_tokens=256,
        max_num_queued_reqs=num_requests,
        enable_prefix_caching=caches,
    )
    scheduler, previous = Scheduler(limits), None
    start = time.thread_time_ns()
    for index in range(num_requests):
        scheduler.add(Request(f"r{index}", prompt_of(index, 160), 160 + 64))
    while scheduler.num_running or scheduler.num_waiting:
        previous = step(scheduler, previous)
    return (time.thread_time_ns() - start) / 1e3, num_requests * (160 + 64)


def unshared(report: Report, num_requests: int) -> None:
    """What the prefix cache costs where it can never help, in turns with and without it."""
    each_us = {
        caches: [us / tokens for us, tokens in (unshared_run(num_requests, caches) for _ in range(7))]
        for caches in (True, False)
    }
    on, off = float(np.median(each_us[True])), float(np.median(each_us[False]))
    report.add("no prompt like another, cache on: a token", on, "us")
    report.add("no prompt like another, cache off: a token", off, "us")


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the host's half of a step.")
    parser.add_argument("--quick", action="store_true", help="a few seconds, rougher figures")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    report = Report("scheduler")
    num_steps = 4 * STRETCH if args.quick else 14 * STRETCH
    for num_rows in (64, 256, 1024):
        decode_iterations(report, num_rows, num_steps)
        gc.collect()  # the tables of one size must not be torn down during the next
    num_requests = 300 if args.quick else 600
    turnover(report, 256, num_requests)
    cached_arrivals(report, 64, num_requests)
    unshared(report, num_requests)
    pressure(report, num_requests, 1.0, True, "swap")
    pressure(report, num_requests, 0.0, True, "no swap")
    pressure(report, num_requests, 0.0, False, "no swap, no cache")
    report.finish(args.json)


if __name__ == "__main__":
    main()
