"""Which step programs agree bit for bit: seen by running the same tokens through each of them at start.

XLA chooses a kernel, and with it an order of sums, by the shape of an operation. Within one compiled program a token's
bits depend on its own sequence alone (tests/engine/test_exact.py); whether two programs agree has to be looked at, on
the machine and the compiler at hand. Where they sum in different orders, some of the thousands of words that are
compared here differ; where none differs, the orders are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxserve.engine.compiled import CompiledSteps
from jaxserve.engine.pack import empty_step, pack_fields, put_chunk
from jaxserve.state import HISTORY, LOGPROBS, DecodeState, KVCache, StepShape
from jaxserve.steps import row_fields
from jaxserve.types import MAX_STOP_TOKEN_IDS

NUM_PROMPT = 20  # more than a block, and no multiple of a bucket
NUM_DECODED = 3

_Memory = tuple[KVCache, DecodeState]


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What a program made of a prompt and its own continuation of it.

    Attributes:
        kv: the blocks, in all layers.
        answers: int32[44] by position: the token sampled after it, whether it failed, its logprobs. Of the prompt,
            as many positions of each chunk as the program can sample for.
    """

    kv: np.ndarray
    answers: dict[int, np.ndarray]

    def equals(self, other: Trace) -> bool:
        common = self.answers.keys() & other.answers.keys()
        same = all(self.answers[at].tobytes() == other.answers[at].tobytes() for at in common)
        return same and self.kv.tobytes() == other.kv.tobytes()


def differing_buckets(
    compiled: CompiledSteps, params: Any, kv: KVCache, state: DecodeState, max_model_len: int
) -> tuple[tuple[int, ...], KVCache, DecodeState]:
    """The buckets whose bits differ from the largest one's, and the memory.

    Donates: kv, state.
    """
    num_blocks, block_size = kv.num_blocks, kv.block_shape[1]
    num_tokens = min(NUM_PROMPT + NUM_DECODED, max_model_len - 1, (num_blocks - 1) * block_size)
    needed = -(-num_tokens // block_size)
    memory, traces = (kv, state), {}
    for place, (shape, step) in enumerate(reversed(compiled.steps)):
        # Blocks of its own, as far as there are any: what another program wrote must not pass for this one's.
        blocks = (place * needed + np.arange(needed)) % (num_blocks - 1) + 1
        memory = _admit(compiled, *memory, shape, blocks)
        traces[shape.num_tokens], memory = _trace(shape, step, params, memory, blocks, num_tokens)
    wanted = traces[compiled.steps[-1][0].num_tokens]
    return tuple(size for size, trace in traces.items() if not trace.equals(wanted)), *memory


def _admit(compiled: CompiledSteps, kv: KVCache, state: DecodeState, shape: StepShape, blocks: np.ndarray) -> _Memory:
    """Gives the last row to a greedy sequence without an end."""
    vocab_size, table = state.prompt_seen.shape[1], np.zeros(shape.max_blocks, np.int32)
    table[: len(blocks)] = blocks
    values = dict.fromkeys(row_fields(shape.max_blocks), 0) | {
        "row": shape.max_rows - 1,
        "features": LOGPROBS,
        "top_k": vocab_size,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "key": np.zeros(2, np.int32),
        "max_len": np.iinfo(np.int32).max,
        "history": np.full(HISTORY, -1, np.int32),
        "stop_ids": np.full(MAX_STOP_TOKEN_IDS, vocab_size, np.int32),
        "block_table": table,
    }
    return kv, compiled.admit(state, pack_fields(row_fields(shape.max_blocks), values))


def _trace(
    shape: StepShape, step: Callable, params: Any, memory: _Memory, blocks: np.ndarray, num_tokens: int
) -> tuple[Trace, _Memory]:
    """Runs a prompt of chunks as long as the bucket takes, then decode steps, in a loop where there is one."""
    kv, state = memory
    num_prompt = max(num_tokens - NUM_DECODED, 1)
    prompt = np.random.default_rng(0).integers(0, state.prompt_seen.shape[1], num_prompt).astype(np.int32)
    answers: dict[int, np.ndarray] = {}
    at = 0
    while at < num_tokens:
        packed, fields = empty_step(shape)
        is_decode = at >= num_prompt
        length = 1 if is_decode else min(shape.num_tokens, num_prompt - at)
        num_steps = min(shape.max_steps, num_tokens - at) if is_decode else 1
        fields["tokens"][:length] = -1 if is_decode else prompt[at : at + length]
        num_tiles = put_chunk(fields, shape, at, length)
        num_samples = min(length, shape.num_samples)
        fields["sample_rows"][:num_samples] = np.arange(
            shape.max_rows - num_samples, shape.max_rows
        )  # the last its own
        fields["sample_index"][:num_samples] = np.arange(length - num_samples, length)
        fields["header"][:] = int(is_decode), 0 if is_decode else num_tiles, LOGPROBS, num_steps
        kv, state, output = step(params, kv, state, packed)
        columns = np.concatenate([output.sampled, output.logprobs], axis=-1)
        if is_decode:
            answers |= {at + index: columns[index, 0] for index in range(num_steps)}
        else:
            answers |= {at + length - num_samples + index: columns[0, index] for index in range(num_samples)}
        at += length * num_steps
    stored = np.stack([np.asarray(layer[kv.places(jnp.asarray(blocks, jnp.int32))]) for layer in kv.layers])
    return Trace(stored, answers), (kv, state)
