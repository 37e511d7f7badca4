"""What does the host's half of a step cost, and how much work does memory pressure waste?

    python -m benchmarks.scheduler [--quick] [--json FILE]

Decode iterations run one step ahead, as in the engine: plan, commit, digest of the step before. Rows stand at
random places in their blocks, so that one in sixteen opens a block in each step. No device: tokens are made up.
Times are processor time of the thread, so that other programs on the machine do not count.

The pressure rows are 600 requests with lognormal lengths (median 128 prompt and 128 output tokens) on 64 rows and
a pool of 40 % of what those rows want.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import Counter, deque

import numpy as np

from benchmarks.report import Report
from jaxserve.cache.blocks import BlockPool, blocks_for
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.policy import SchedulerLimits
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequences import Request

EOS, OTHER = 5, 7
BLOCK_SIZE = 16
MAX_MODEL_LEN = 8192


def running_scheduler(num_rows: int, max_total_len: int = MAX_MODEL_LEN) -> tuple[Scheduler, StepPlan]:
    """A scheduler whose rows all decode, and the last committed plan, whose answer is due."""
    limits = SchedulerLimits(
        num_blocks=1 + num_rows * blocks_for(MAX_MODEL_LEN, BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_num_seqs=num_rows,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=8192,
        max_num_queued_reqs=2 * num_rows,
        eos_token_ids=(EOS,),
    )
    scheduler = Scheduler(limits)
    lens = np.random.default_rng(0).integers(100, 200, num_rows)
    for index, num_prompt in enumerate(lens.tolist()):
        scheduler.add(Request(f"r{index}", np.zeros(num_prompt, np.int32), max_total_len, (EOS,)))
    plan = step(scheduler, None)
    while scheduler.num_waiting or len(scheduler.sequences.prefill_rows()):
        plan = step(scheduler, plan)
    return scheduler, step(scheduler, plan)


def step(scheduler: Scheduler, previous: StepPlan | None) -> StepPlan:
    """One iteration, one step ahead."""
    plan = scheduler.plan()
    scheduler.commit(plan)
    if previous is not None:
        scheduler.digest(previous, np.full(len(previous.sampled_rows), OTHER, np.int32))
    return plan


def decode_iterations(report: Report, num_rows: int, num_steps: int) -> None:
    """Rows for plan, commit, digest and their sum, in microseconds."""
    scheduler, previous = running_scheduler(num_rows)
    tokens = np.full(num_rows, OTHER, np.int32)
    laps_ns = np.zeros((num_steps, 4), np.int64)
    for index in range(num_steps):
        t0 = time.thread_time_ns()
        plan = scheduler.plan()
        t1 = time.thread_time_ns()
        scheduler.commit(plan)
        t2 = time.thread_time_ns()
        scheduler.digest(previous, tokens)
        t3 = time.thread_time_ns()
        previous = plan
        laps_ns[index] = t1 - t0, t2 - t1, t3 - t2, t3 - t0
    scheduler.check_integrity()
    for column, name in enumerate(("plan", "commit", "digest")):
        report.add(f"decode, {num_rows} rows: {name}, p50", np.median(laps_ns[:, column]) / 1e3, "us")
    report.add(f"decode, {num_rows} rows: in all, p50", np.median(laps_ns[:, 3]) / 1e3, "us", "< 50")
    report.add(f"decode, {num_rows} rows: in all, p99", np.percentile(laps_ns[:, 3], 99) / 1e3, "us", "< 100")


def turnover(report: Report, num_rows: int, num_requests: int) -> None:
    """What one request more costs: added, admitted, prefilled in one chunk, ended, freed."""
    scheduler, previous = running_scheduler(num_rows)
    prompt = np.zeros(150, np.int32)
    laps_ns = []
    for index in range(num_requests):
        previous = step(scheduler, previous)
        victim = next(iter(scheduler.sequences.requests)).request_id
        start = time.thread_time_ns()
        scheduler.abort(victim)
        scheduler.add(Request(f"n{index}", prompt, MAX_MODEL_LEN, (EOS,)))
        previous = step(scheduler, previous)
        middle = time.thread_time_ns()
        previous = step(scheduler, previous)
        laps_ns.append(2 * middle - start - time.thread_time_ns())  # less an iteration without them
    report.add(f"one request out, one in, {num_rows} rows", float(np.median(laps_ns)) / 1e3, "us")


def blocks(report: Report, num_rounds: int) -> None:
    """Allocation and free of a block, one by one and in bulk."""
    pool = BlockPool(65536)
    for count in (1, 64, 512):
        held = deque(pool.allocate(count) for _ in range(32))
        start = time.thread_time_ns()
        for _ in range(num_rounds):
            pool.free(held.popleft())
            held.append(pool.allocate(count))
        each_us = (time.thread_time_ns() - start) / 1e3 / num_rounds / count
        report.add(f"block freed and allocated, {count} at a time", each_us, "us", "< 1" if count > 1 else None)
        for ids in held:
            pool.free(ids)


def pressure(report: Report, num_requests: int) -> None:
    """Tokens computed twice, and preemptions, when the pool is too small for the rows."""
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
    )
    scheduler = Scheduler(limits)
    for index, (num_prompt, num_output) in enumerate(zip(prompts.tolist(), outputs.tolist(), strict=True)):
        scheduler.add(Request(f"r{index}", np.zeros(num_prompt, np.int32), num_prompt + num_output))
    preemptions, num_fed, num_steps, previous = Counter(), 0, 0, None
    while scheduler.num_running or scheduler.num_waiting:
        previous = step(scheduler, previous)
        preemptions.update(previous.preempted)
        num_fed += previous.num_tokens
        num_steps += 1
    num_needed = int((prompts + outputs - 1).sum())
    report.add("pool at 40 %: tokens computed twice", 100 * (num_fed / num_needed - 1), "% of all")
    report.add("pool at 40 %: requests preempted", 100 * len(preemptions) / num_requests, "%")
    report.add("pool at 40 %: preemptions a request, most", max(preemptions.values(), default=0), "", "<= 5")
    report.add("pool at 40 %: steps", num_steps, "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the host's half of a step.")
    parser.add_argument("--quick", action="store_true", help="a few seconds, rougher figures")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    report = Report("scheduler")
    num_steps = 500 if args.quick else 4000
    for num_rows in (64, 256, 1024):
        decode_iterations(report, num_rows, num_steps)
        gc.collect()  # the tables of one size must not be torn down during the next
    turnover(report, 256, num_steps // 10)
    blocks(report, num_steps)
    pressure(report, 300 if args.quick else 600)
    report.finish(args.json)


if __name__ == "__main__":
    main()
