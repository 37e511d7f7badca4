"""Moving the blocks that a plan names, with programs of a few sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from jaxserve.engine.compiled import CompiledSteps
from jaxserve.engine.swap_store import SwapStore
from jaxserve.scheduler.plan import StepPlan
from jaxserve.state import KVCache


def batches(count: int, sizes: Iterable[int]) -> Iterator[tuple[slice, int]]:
    """Cuts `count` things into (which of them, program size): few programs, and less than half of each is padding.

    Only the last one may be padded by more, if it is smaller than half of the smallest size.
    """
    ascending, start = sorted(sizes), 0
    while start < count:
        rest = count - start
        fitting = [size for size in ascending if rest <= size < 2 * rest]
        smaller = [size for size in ascending if size <= rest]
        size = fitting[0] if fitting else smaller[-1] if smaller else ascending[0]
        yield slice(start, min(start + size, count)), size
        start += size


def swap_out(plan: StepPlan, kv: KVCache, compiled: CompiledSteps, store: SwapStore) -> None:
    """Begins to bring the plan's blocks to host memory, as they are before the step."""
    blocks, slots = plan.swap_out_blocks, plan.swap_out_slots
    for part, size in batches(len(blocks), compiled.gather):
        ids = np.zeros(size, np.int32)
        ids[: part.stop - part.start] = blocks[part]
        store.put(compiled.gather[size](kv, ids), slots[part])


def copy_on_write(plan: StepPlan, kv: KVCache, compiled: CompiledSteps) -> KVCache:
    """Copies the plan's shared blocks, all in one operation: the source of one may be the target of another.

    Donates: kv.
    """
    num = len(plan.copy_from)
    if not num:
        return kv
    size = min(size for size in compiled.copy if size >= num)
    packed = np.zeros((2, size), np.int32)
    packed[:, :num] = plan.copy_from, plan.copy_to
    return compiled.copy[size](kv, packed.reshape(-1))


def swap_in(plan: StepPlan, kv: KVCache, compiled: CompiledSteps, store: SwapStore) -> KVCache:
    """Brings the plan's slots of host memory back into blocks.

    Donates: kv.
    """
    blocks, slots = plan.swap_in_blocks, plan.swap_in_slots
    for part, size in batches(len(blocks), compiled.scatter):
        ids = np.full(size, kv.num_blocks, np.int32)
        ids[: part.stop - part.start] = blocks[part]
        kv = compiled.scatter[size](kv, store.read(slots[part], size), ids)
    return kv
