"""The pytrees that live on the device between steps, and the layout of what crosses to and from it.

`KVCache` and `DecodeState` are donated to every step and rebound; `StepBatch` is the one packed int32
array of a step, unpacked on the device; `StepOutput` comes back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt, UInt8

from jaxserve.config import AttentionBackend, ModelConfig
from jaxserve.types import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_BEAM_WIDTH,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
)

HISTORY = MAX_BAD_WORD_TOKENS - 1  # output tokens that a bad word can reach back over
LOGPROB_COLUMNS = 2 + 2 * MAX_LOGPROBS  # logprob, rank, top ids, top logprobs
HEADER_LEN = 4  # num_decode, num_tiles, features, num_steps
BEAM_COLUMNS = 2 + 2 * MAX_BEAM_WIDTH  # parent row, score, stop tokens, scores with them

# Bits of a row's, and by OR of a step's, features: what the sampler must do beyond an argmax.
SAMPLED, TRUNCATED, PENALTIES, BIAS, MIN_TOKENS, ALLOWED, BAD_WORDS, LOGPROBS, PROMPT_LOGPROBS, BEAM = (
    1 << i for i in range(10)
)


@dataclass(frozen=True)
class StepShape:
    """The static sizes of one compiled step: a bucket of tokens on one engine's tables.

    Attributes:
        num_tokens: T, tokens in the stream; the bucket.
        max_rows: R, rows of the running batch.
        max_blocks: M, entries of a row's block table, a multiple of `kv_tile` / `block_size`.
        block_size: C, tokens a block.
        q_tile, kv_tile: tokens a tile of the attention over prefill chunks, and of keys.
        max_steps: K, decode steps that one call can run; 1 where a smaller bucket holds a token of each row.
        attention: "xla", or whose kernels compute it.
        interpret_kernels: run them in their interpreter, which a CPU can: for tests.
        sample_tile: rows that the sampler takes at once, up to the last that asks; None takes all.
    """

    num_tokens: int
    max_rows: int
    max_blocks: int
    block_size: int
    q_tile: int
    kv_tile: int
    max_steps: int = 1
    attention: AttentionBackend = "xla"
    interpret_kernels: bool = False
    sample_tile: int | None = None

    @property
    def num_samples(self) -> int:
        """S: rows that can take part in a step; each brings at least one token."""
        return min(self.num_tokens, self.max_rows)

    @property
    def num_updates(self) -> int:
        """U: block table entries that can change with a step: a new block every C tokens and one a row, and as
        many again that were replaced since the step before, where the prefix cache knew their content.
        """
        return 2 * (self.num_tokens // self.block_size + self.num_samples)

    @property
    def num_tiles(self) -> int:
        """Q: query tiles that can occur: every chunk may end in a partial one."""
        return self.num_tokens // self.q_tile + self.num_samples

    def fields(self) -> dict[str, tuple[int, int]]:
        """(offset, length) of each field in the packed array, in order."""
        return self._fields

    @cached_property
    def _fields(self) -> dict[str, tuple[int, int]]:
        lengths = {
            "header": HEADER_LEN,
            "tokens": self.num_tokens,
            "positions": self.num_tokens,
            "rows": self.num_tokens,
            "targets": self.num_tokens,
            "stored": self.num_tokens,
            "sample_index": self.num_samples,
            "sample_rows": self.num_samples,
            "update_rows": self.num_updates,
            "update_cols": self.num_updates,
            "update_ids": self.num_updates,
            "tile_start": self.num_tiles,
            "tile_len": self.num_tiles,
        }
        offsets = np.cumsum([0, *lengths.values()])
        return {name: (int(offset), length) for (name, length), offset in zip(lengths.items(), offsets, strict=False)}

    @property
    def packed_len(self) -> int:
        offset, length = self.fields()["tile_len"]
        return offset + length

    @cached_property
    def padding(self) -> np.ndarray:
        """int32[packed_len]: the packed array of a step of padding alone, not to be written to."""
        packed = np.zeros(self.packed_len, np.int32)
        for name in ("rows", "sample_rows", "update_rows"):
            offset, length = self.fields()[name]
            packed[offset : offset + length] = self.max_rows
        offset, length = self.fields()["sample_index"]
        packed[offset : offset + length] = np.arange(length)  # what decode rows have, which come first
        packed.setflags(write=False)
        return packed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepBatch:
    """One step's inputs. T tokens: first the decode tokens, one a row, then the prefill chunks.

    Padding has row R (one past the last): gathers clamp it, scatters drop it.

    Attributes:
        num_decode, num_tiles, features: scalars; features is an OR of bits.
        num_steps: more than 1 for decode rows alone: how many tokens each feeds, one after the other.
        tokens: -1 stands for the row's last sampled token.
        targets: for prompt logprobs: the token that follows, or -1.
        stored: 1 where the token's key and value lie in its block already, which others may share.
        sample_index, sample_rows: [S] where in the stream a row's logits are taken, and whose they are.
        update_rows, update_cols, update_ids: [U] block table entries to set first.
        tile_start, tile_len: [Q] where in the stream a query tile begins, and its tokens.
    """

    num_decode: Int[Array, ""]
    num_tiles: Int[Array, ""]
    features: Int[Array, ""]
    num_steps: Int[Array, ""]
    tokens: Int[Array, " tokens"]
    positions: Int[Array, " tokens"]
    rows: Int[Array, " tokens"]
    targets: Int[Array, " tokens"]
    stored: Int[Array, " tokens"]
    sample_index: Int[Array, " samples"]
    sample_rows: Int[Array, " samples"]
    update_rows: Int[Array, " updates"]
    update_cols: Int[Array, " updates"]
    update_ids: Int[Array, " updates"]
    tile_start: Int[Array, " tiles"]
    tile_len: Int[Array, " tiles"]


def unpack(packed: Int[Array, " packed"], shape: StepShape) -> StepBatch:
    """The fields of a packed step, as slices on the device."""
    parts = {name: packed[offset : offset + length] for name, (offset, length) in shape.fields().items()}
    num_decode, num_tiles, features, num_steps = parts.pop("header")
    return StepBatch(num_decode=num_decode, num_tiles=num_tiles, features=features, num_steps=num_steps, **parts)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingState:
    """How each row's tokens are chosen: [R, ...]. Written when a row is given to a sequence.

    The wide fields (bias, stops, allowed, bad words) hold leftovers in rows whose features do not ask
    for them; the sampler looks at a row's own features before it reads one.
    """

    features: Int[Array, " rows"]
    temperature: Float[Array, " rows"]
    top_k: Int[Array, " rows"]  # the vocabulary's size where off
    top_p: Float[Array, " rows"]
    min_p: Float[Array, " rows"]
    repetition_penalty: Float[Array, " rows"]
    frequency_penalty: Float[Array, " rows"]
    presence_penalty: Float[Array, " rows"]
    key: UInt[Array, "rows 2"]
    num_prompt: Int[Array, " rows"]
    min_position: Int[Array, " rows"]  # stop tokens may not be sampled for positions before this
    max_len: Int[Array, " rows"]  # tokens, the prompt included, with which the sequence ends
    stop_ids: Int[Array, "rows stops"]  # padded with the vocabulary's size
    bias_ids: Int[Array, "rows biases"]  # padded with the vocabulary's size
    bias_values: Float[Array, "rows biases"]
    allowed: UInt[Array, "rows words"]  # bit v % 32 of word v / 32
    bad_words: Int[Array, "rows bad_words bad_tokens"]  # right-aligned, padded with -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeamState:
    """The beams of every search, by row. Rows without the feature BEAM hold leftovers.

    Attributes:
        peers: [R, 16] the rows of its search in order of the beams, -1 pads.
        index: which of them it is.
        scores: sum of the logprobs of its beam's output.
        parents: the row whose beam it continues since the step that sampled last.
    """

    peers: Int[Array, "rows width"]
    index: Int[Array, " rows"]
    scores: Float[Array, " rows"]
    parents: Int[Array, " rows"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What step n + 1 needs before the host has seen step n, by row. Donated to every step.

    Attributes:
        last_token: the token sampled last; decode rows feed it.
        ended: the row's sequence has ended, which the host may not know yet: it feeds nothing any more. Of beams the
            search says when they end.
        block_tables: [R, M] the host's tables, kept equal by each step's updates.
        history: [R, 15] the latest output tokens, newest last, -1 where there is none.
        prompt_seen, output_counts: [R, V] which tokens were fed as prompt, how often as output. Reset
            only for rows with penalties.
    """

    last_token: Int[Array, " rows"]
    ended: Bool[Array, " rows"]
    block_tables: Int[Array, "rows blocks"]
    history: Int[Array, "rows history"]
    prompt_seen: UInt8[Array, "rows vocab"]
    output_counts: Int[Array, "rows vocab"]
    sampling: SamplingState
    beams: BeamState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What a step gives back.

    Attributes:
        sampled: int32 [K, S, 2]: of each decode step the token, and 1 where its logits were not finite. After a row's
            end, and past the step's num_steps, nobody's.
        logprobs: int32 [K, S, 42]: see `ops.logprobs`; zeros unless a row asked.
        prompt_logprobs: int32 [T, 42]: the same for each fed token's successor.
        beams: int32 [S, 34]: see `ops.beams.select_beams`; zeros unless a row is a beam.
    """

    sampled: Int[Array, "steps samples 2"]
    logprobs: Int[Array, "steps samples columns"]
    prompt_logprobs: Int[Array, "tokens columns"]
    beams: Int[Array, "samples beam_columns"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Paged keys and values: one array a layer, [P, C, K, 2H], a head's key followed by its value.

    K and V of a head lie together, so that one read brings both and the kv_heads axis can be sharded.
    Block 0 is the null block: tables are padded with it and nobody reads it unmasked. On CPU a 16-bit
    cache is stored as uint16 and bitcast at the edges: XLA:CPU converts the whole operand of a bfloat16
    scatter to float32 and back every step (332 against 81 ms, SmolLM2-135M's shape, 64 rows).

    Where layers are stacked there is one array of all, [L * P, C, K, 2H]: block b of layer l is block l * P + b of it.
    A leading axis of layers would have to be sliced, and a slice is a copy.

    Attributes:
        layers_per_array: 1, or all where layers are stacked.
    """

    layers: tuple[Array, ...]
    dtype: str = field(metadata={"static": True})
    layers_per_array: int = field(metadata={"static": True}, default=1)

    @property
    def num_blocks(self) -> int:
        """P: blocks of a layer, the null block included."""
        return self.layers[0].shape[0] // self.layers_per_array

    @property
    def block_shape(self) -> tuple[int, ...]:
        """[L, C, K, 2H] of a block in all layers."""
        return (len(self.layers) * self.layers_per_array, *self.layers[0].shape[1:])

    def places(self, ids: Int[Array, " blocks"]) -> Int[Array, "..."]:
        """Where blocks lie in each array: [n], or [n, L] where layers are stacked; ids past P go past its end."""
        if self.layers_per_array == 1:
            return ids
        first = jnp.arange(self.layers_per_array, dtype=ids.dtype) * self.num_blocks
        return jnp.where(ids[:, None] < self.num_blocks, ids[:, None] + first, len(self.layers[0]))


def init_kv_cache(
    config: ModelConfig,
    num_blocks: int,
    block_size: int,
    dtype: str,
    *,
    as_bits: bool,
    num_devices: int = 1,
    stacked: bool = False,
) -> KVCache:
    """A zeroed cache of `num_blocks` blocks, the null block included.

    Args:
        num_devices: that hold it together; the heads of all.
        stacked: all layers in one array.
    """
    num_arrays, in_each = (1, config.num_layers) if stacked else (config.num_layers, 1)
    shape = (in_each * num_blocks, block_size, config.num_kv_heads_over(num_devices), 2 * config.head_dim)
    storage = jnp.uint16 if as_bits and jnp.dtype(dtype).itemsize == 2 else jnp.dtype(dtype)
    return KVCache(
        layers=tuple(jnp.zeros(shape, storage) for _ in range(num_arrays)), dtype=dtype, layers_per_array=in_each
    )


def init_decode_state(max_rows: int, max_blocks: int, vocab_size: int) -> DecodeState:
    """A state in which no row belongs to anybody."""
    rows, words = max_rows, -(-vocab_size // 32)
    ones = jnp.ones((rows,), jnp.float32)
    sampling = SamplingState(
        features=jnp.zeros((rows,), jnp.int32),
        temperature=ones * 0,
        top_k=jnp.full((rows,), vocab_size, jnp.int32),
        top_p=ones,
        min_p=ones * 0,
        repetition_penalty=ones + 0,
        frequency_penalty=ones * 0,
        presence_penalty=ones * 0,
        key=jnp.zeros((rows, 2), jnp.uint32),
        num_prompt=jnp.zeros((rows,), jnp.int32),
        min_position=jnp.zeros((rows,), jnp.int32),
        max_len=jnp.zeros((rows,), jnp.int32),
        stop_ids=jnp.full((rows, MAX_STOP_TOKEN_IDS), vocab_size, jnp.int32),
        bias_ids=jnp.full((rows, MAX_LOGIT_BIAS), vocab_size, jnp.int32),
        bias_values=jnp.zeros((rows, MAX_LOGIT_BIAS), jnp.float32),
        allowed=jnp.zeros((rows, words), jnp.uint32),
        bad_words=jnp.full((rows, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, jnp.int32),
    )
    return DecodeState(
        last_token=jnp.zeros((rows,), jnp.int32),
        ended=jnp.zeros((rows,), bool),
        block_tables=jnp.zeros((rows, max_blocks), jnp.int32),
        history=jnp.full((rows, HISTORY), -1, jnp.int32),
        prompt_seen=jnp.zeros((rows, vocab_size), jnp.uint8),
        output_counts=jnp.zeros((rows, vocab_size), jnp.int32),
        sampling=sampling,
        beams=BeamState(
            peers=jnp.full((rows, MAX_BEAM_WIDTH), -1, jnp.int32),
            index=jnp.zeros((rows,), jnp.int32),
            scores=jnp.zeros((rows,), jnp.float32),
            parents=jnp.zeros((rows,), jnp.int32),
        ),
    )


def tree_device_bytes(tree: object) -> int:
    """Bytes that the arrays of a pytree (or of ShapeDtypeStructs) take."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
