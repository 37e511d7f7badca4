"""The packed array of a step says what the plan says, also where the packer keeps parts from step to step."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.engine.pack import StepPacker
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.policy import SchedulerLimits
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequences import Request
from jaxserve.state import LOGPROBS, PENALTIES, PROMPT_LOGPROBS, StepShape

NUM_ROWS, BLOCK_SIZE, MAX_LEN, BUDGET, EOS = 6, 4, 48, 24, 9
BITS = (0, LOGPROBS, PENALTIES, PROMPT_LOGPROBS)


def expected_fields(plan: StepPlan, scheduler: Scheduler, features: np.ndarray) -> dict[str, list[int]]:
    """What the array must say, token by token."""
    table = scheduler.sequences
    tokens, positions, rows = [-1] * len(plan.decode_rows), plan.decode_positions.tolist(), plan.decode_rows.tolist()
    sample_index = list(range(len(rows)))
    for row, start, length, samples in zip(
        plan.prefill_rows, plan.prefill_starts, plan.prefill_lens, plan.prefill_samples, strict=True
    ):
        tokens += table.token_ids[row, start : start + length].tolist()
        positions += range(start, start + length)
        rows += [int(row)] * int(length)
        sample_index += [len(rows) - 1] * bool(samples)
    sampled = [rows[index] for index in sample_index]
    wanted = 0
    for row in sampled:
        wanted |= int(features[row]) & ~PROMPT_LOGPROBS
    for row in plan.prefill_rows:
        wanted |= int(features[row]) & PROMPT_LOGPROBS
    return {
        "header": [len(plan.decode_rows), wanted, plan.num_steps],
        "tokens": tokens,
        "positions": positions,
        "rows": rows,
        "sample_index": sample_index,
        "sample_rows": sampled,
        "update_rows": plan.block_rows.tolist(),
        "update_cols": plan.block_cols.tolist(),
        "update_ids": plan.block_ids.tolist(),
    }


def check(packed: np.ndarray, shape: StepShape, expected: dict[str, list[int]]) -> None:
    padding = shape.padding
    for name, (start, length) in shape.fields().items():
        found = packed[start : start + length]
        if name == "header":
            assert [found[0], found[2], found[3]] == expected[name]
        elif name in expected:
            count = len(expected[name])
            assert found[:count].tolist() == expected[name], name
            assert np.array_equal(found[count:], padding[start + count : start + length]), f"{name}: what comes after"


@pytest.mark.parametrize("seed", range(4))
def test_steps_say_what_their_plans_say(seed: int) -> None:
    """Requests come, end and are aborted; loops of several steps, two shapes in turn."""
    rng = np.random.default_rng(seed)
    limits = SchedulerLimits(
        num_blocks=60,
        block_size=BLOCK_SIZE,
        max_num_seqs=NUM_ROWS,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=BUDGET,
        max_num_queued_reqs=100,
        eos_token_ids=(EOS,),
    )
    scheduler, features = Scheduler(limits), np.zeros(NUM_ROWS, np.int32)
    packer = StepPacker(features)
    shapes = [StepShape(t, NUM_ROWS, limits.max_blocks_per_row, BLOCK_SIZE, 8, 8, max_steps=4) for t in (8, BUDGET)]
    num_kept = num_added = 0
    previous: np.ndarray | None = None
    for index in range(150):
        if rng.random() < 0.15:
            prompt = rng.integers(10, 99, int(rng.integers(1, 20))).astype(np.int32)
            scheduler.add(Request(f"r{num_added}", prompt, len(prompt) + int(rng.integers(8, 25)), (EOS,)))
            num_added += 1
        if rng.random() < 0.03:
            scheduler.abort(f"r{int(rng.integers(num_added + 1))}")
        plan = scheduler.commit(scheduler.plan(int(rng.integers(1, 5))))
        for admitted in plan.admitted:
            features[admitted.row] = rng.choice(BITS)
        shape = shapes[0] if plan.num_tokens <= 8 and index % 7 else shapes[1]
        packed = packer.pack(plan, shape, scheduler.sequences.token_ids, scheduler.sequences.num_prompt)
        check(packed, shape, expected_fields(plan, scheduler, features))
        assert packed.flags.writeable
        assert previous is None or not np.shares_memory(packed, previous), "the device may still read the last one"
        num_kept += previous is not None and not len(plan.prefill_rows)
        previous = packed
        tokens = np.where(rng.random((plan.num_steps, len(plan.sampled_rows))) < 0.02, EOS, 7).astype(np.int32)
        scheduler.digest_loop(plan, tokens)
        scheduler.check_integrity()
    assert num_kept > 50
    assert num_added > 10
