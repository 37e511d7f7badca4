"""Entering what rows have computed into the prefix cache: prompts as their chunks are answered, the rest at the end."""

from __future__ import annotations

import numpy as np

from jaxserve.cache.kv_memory import KVMemory
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.sequences import NO_BOUND, SequenceTable


def answer_chunks(plan: StepPlan, sequences: SequenceTable, memory: KVMemory, healthy: np.ndarray) -> None:
    """Enters the prompt blocks that the plan's chunks filled into the prefix cache.

    Args:
        healthy: live rows that sampled, and whose answer is finite.
    """
    ends = (plan.prefill_starts + plan.prefill_lens).tolist()
    generations = plan.prefill_generations.tolist()
    chunks = zip(plan.prefill_rows.tolist(), ends, plan.prefill_samples.tolist(), generations, strict=True)
    well = set(healthy.tolist())
    for row, end, samples, generation in chunks:
        if sequences.generation[row] != generation or (samples and row not in well):
            continue
        request = sequences.at(row).request
        is_last = samples or (request.beam is not None and end == len(request.prompt_token_ids))
        sequences.num_answered[row] = NO_BOUND if is_last else end
        publish(sequences, memory, row, end)


def publish(sequences: SequenceTable, memory: KVMemory, row: int, num_written: int | None = None) -> None:
    """Enters the row's full blocks into the cache, as far as they have been written and answered for.

    Args:
        num_written: its first tokens of which that is known; by default those of which the tables say so.
    """
    sequence = sequences.at(row)
    if not sequence.caches:
        return
    if num_written is None:
        if sequences.is_beam[row]:
            return  # of beams the host's tokens are not those of the blocks; their prompt is entered already
        num_written = sequences.num_committed(row)
    num_full = num_written // memory.block_size
    known, name = int(sequences.num_published[row]), sequence.request.namespace
    # Of a search that has begun, the device hands the first beam's blocks on to the others: to replace one here
    # would give away a block that some beams' tables on the device still name.
    has_begun = bool(sequences.is_beam[row] and sequences.on_device[row])
    sequences.num_published[row] = memory.publish(
        row, sequences.token_ids[row], known, num_full, name, keeps_own=has_begun
    )
