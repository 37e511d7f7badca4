"""A token's logits, keys and values have the same bits however its sequence is scheduled.

Through any bucket of two and more tokens, as a decode row or inside a chunk, cut anywhere, beside any
neighbours, in any blocks, with everything that must not be read set to NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import ModelConfig
from jaxserve.engine.resolve import KV_TILE
from jaxserve.layers.linear import linear
from jaxserve.layers.norm import rms_norm
from jaxserve.layers.stable_sum import stable_sum
from jaxserve.models.decoder import forward
from jaxserve.models.decoder import logits as compute_logits
from jaxserve.models.params import decoder_specs
from jaxserve.ops.paged_attention import paged_attention, write_kv
from jaxserve.parallel.specs import is_spec
from jaxserve.state import StepShape, init_kv_cache, unpack

ROWS, BLOCK, BLOCKS_PER_ROW, NUM_BLOCKS = 8, 8, 8, 65
LENGTHS = {0: 37, 3: 21, 6: 50}  # row -> tokens; two and a half key tiles, less than one, more than one
Run = tuple[int, int, int]  # row, start, length
Step = tuple[int, list[Run], list[Run]]  # bucket, decodes, chunks


def _config(dtype: str, heads: int, kv_heads: int, head_dim: int, hidden: int, intermediate: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=300,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=64,
        layer_windows=(None, 24),
        qk_norm=True,
        dtype=dtype,  # type: ignore[arg-type]
    )


class Engine:
    """One model's step programs by bucket, and what a schedule leaves behind."""

    def __init__(self, config: ModelConfig) -> None:
        rng = np.random.default_rng(1)
        self.config = config
        self.params = jax.tree.map(
            lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.3 + (len(s.shape) == 1)).astype(s.dtype),
            decoder_specs(config),
            is_leaf=is_spec,
        )
        self.tokens = {row: rng.integers(0, config.vocab_size, n) for row, n in LENGTHS.items()}
        self._programs: dict[int, tuple[StepShape, Callable]] = {}

    def program(self, bucket: int) -> tuple[StepShape, Callable]:
        if bucket not in self._programs:
            shape = StepShape(bucket, ROWS, BLOCKS_PER_ROW, BLOCK, q_tile=min(16, bucket), kv_tile=16)
            self._programs[bucket] = (shape, jax.jit(partial(_feed, config=self.config, shape=shape)))
        return self._programs[bucket]

    def run(self, schedule: list[Step], seed: int) -> dict[int, np.ndarray]:
        """Feeds one step after the other; the words of each row's logits, keys and values."""
        rng = np.random.default_rng(seed)
        tables = rng.permutation(np.arange(1, NUM_BLOCKS)).reshape(ROWS, BLOCKS_PER_ROW)
        kv = init_kv_cache(self.config, NUM_BLOCKS, BLOCK, self.config.dtype, as_bits=True)
        layers = tuple(_poisoned(layer) for layer in kv.layers)
        logits = {row: np.zeros((length, self.config.vocab_size), np.float32) for row, length in LENGTHS.items()}
        for bucket, decodes, chunks in schedule:
            shape, function = self.program(bucket)
            packed = _pack(shape, decodes, chunks, self.tokens)
            layers, out = function(self.params, layers, jnp.asarray(tables, jnp.int32), packed)
            offset = 0
            for row, start, length in decodes + chunks:
                if row in LENGTHS:
                    logits[row][start : start + length] = np.asarray(out)[offset : offset + length]
                offset += length
        words = {}
        for row, length in LENGTHS.items():
            place = np.arange(length)
            cells = np.stack([np.asarray(layer)[tables[row][place // BLOCK], place % BLOCK] for layer in layers])
            bits = cells.view(np.uint16 if cells.dtype.itemsize == 2 else np.uint32)
            words[row] = np.concatenate([bits.ravel(), logits[row].view(np.uint32).ravel()])
        return words


def _feed(
    params: Any,
    layers: tuple[jax.Array, ...],
    tables: jax.Array,
    packed: jax.Array,
    *,
    config: ModelConfig,
    shape: StepShape,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """A step without sampling: the caches and every token's logits."""
    batch = unpack(packed, shape)
    rows = jnp.minimum(batch.rows, ROWS - 1)
    slots = tables[rows, batch.positions // BLOCK] * BLOCK + batch.positions % BLOCK
    slots = jnp.where(batch.rows < ROWS, slots, NUM_BLOCKS * BLOCK)

    def attend(
        window: int | None, cache: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        cache = write_kv(cache, k, v, slots, config.dtype)
        return paged_attention(q, cache, tables, batch, shape, dtype=config.dtype, window=window), cache

    hidden, layers = forward(params, layers, batch.tokens, batch.positions, attend, config)
    return layers, compute_logits(params, hidden)


def _poisoned(layer: jax.Array) -> jax.Array:
    """NaN in every block but the null block."""
    nan = jnp.uint16(0x7FFF) if layer.dtype == jnp.uint16 else jnp.asarray(jnp.nan, layer.dtype)
    return layer.at[1:].set(nan)


def _pack(shape: StepShape, decodes: list[Run], chunks: list[Run], tokens: dict[int, np.ndarray]) -> np.ndarray:
    """A step's packed array, laid out by hand (the engine's own packing has its own tests)."""
    packed = np.zeros(shape.packed_len, np.int32)
    f = {name: packed[at : at + n] for name, (at, n) in shape.fields().items()}
    f["rows"].fill(shape.max_rows)
    offset, tiles = 0, []
    for number, (row, start, length) in enumerate(decodes + chunks):
        span = slice(offset, offset + length)
        f["tokens"][span] = tokens[row][start : start + length] if row in tokens else (start * 7 + row) % 300
        f["rows"][span], f["positions"][span] = row, np.arange(start, start + length)
        if number >= len(decodes):
            tiles += [(offset + i, min(shape.q_tile, length - i)) for i in range(0, length, shape.q_tile)]
        offset += length
    for i, (start, length) in enumerate(tiles):
        f["tile_start"][i], f["tile_len"][i] = start, length
    f["header"][:] = len(decodes), len(tiles), 0, 1
    return packed


def _random_schedule(rng: np.random.Generator, buckets: list[int]) -> list[Step]:
    """Every sequence to its end in random steps, beside neighbours that mean nothing."""
    at = dict.fromkeys(LENGTHS, 0)
    steps = []
    while any(at[row] < LENGTHS[row] for row in LENGTHS):
        bucket = int(rng.choice(buckets))
        left, decodes, chunks = bucket, [], []
        for row in rng.permutation([*LENGTHS, 1, 4]).tolist():
            length = int(rng.integers(1, min(left, 20) + 1)) if left else 0
            if row not in at:  # a neighbour: its positions start anew
                if length and rng.random() < 0.5:
                    chunks.append((row, 0, length))
                    left -= length
                continue
            length = min(length, LENGTHS[row] - at[row])
            if not length or rng.random() < 0.2:
                continue
            decode = rng.random() < 0.5
            length = 1 if decode else length
            (decodes if decode else chunks).append((row, at[row], length))
            at[row] += length
            left -= length
        if decodes or chunks:
            steps.append((bucket, decodes, chunks))
    return steps


MODELS = {
    "groups of three": (6, 2, 16, 72, 136),
    "one query a head": (3, 3, 80, 72, 136),
    "narrow heads": (4, 2, 32, 72, 136),
    "sizes of whole 64s": (4, 2, 64, 128, 192),  # whose float32 products have the weights on the left
}


@cache
def few_rows_agree(dtype: str) -> bool:
    """Whether XLA:CPU sums 16-bit products of two rows as it does those of eight and more.

    On a Xeon with AMX it does not (jax 0.10.2: of two to six rows, by the number of inputs). The engine looks at start
    which programs agree, and leaves out those that do not (`engine.exactness`).
    """
    rng = np.random.default_rng(5)
    product = jax.jit(linear)
    for num_in, num_out in ((72, 136), (576, 1536), (128, 192)):
        x = jnp.asarray(rng.normal(size=(64, num_in))).astype(dtype)
        weight = jnp.asarray(rng.normal(size=(num_out, num_in))).astype(dtype)
        if (np.asarray(product(x[:2], weight)) != np.asarray(product(x, weight))[:2]).any():
            return False
    return True


@pytest.mark.usefixtures("long_contexts")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_schedules_move_no_bit(name: str, dtype: str) -> None:
    engine = Engine(_config(dtype, *MODELS[name]))
    assert few_rows_agree("float32")
    buckets = [2, 8, 64] if few_rows_agree(dtype) else [8, 64]
    alone = [(64, [], [(row, 0, length)]) for row, length in LENGTHS.items()]
    want = engine.run(alone, seed=0)
    rng = np.random.default_rng(2)
    one_by_one = [(buckets[0], [(row, i, 1)], []) for row, length in LENGTHS.items() for i in range(length)]
    schedules = [one_by_one] + [_random_schedule(rng, buckets) for _ in range(6)]
    for seed, schedule in enumerate(schedules):
        found = engine.run(schedule, seed + 1)
        for row in LENGTHS:
            assert (found[row] != want[row]).sum() == 0, (name, dtype, seed, row)


@pytest.mark.parametrize("num_in", [40, 72, 576, 1536])
@pytest.mark.parametrize("num_out", [72, 64, 192, 576, 3072])  # the first is no multiple of 64
def test_a_token_s_product_is_the_same_in_either_form(num_out: int, num_in: int) -> None:
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(256, num_in)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(num_out, num_in)), jnp.float32)
    product = jax.jit(lambda x, weight: linear(x, weight))
    two = np.concatenate([np.asarray(product(x[at : at + 2], weight)) for at in range(0, 256, 2)])
    for rows in (8, 64, 128, 256):
        np.testing.assert_array_equal(np.asarray(product(x[:rows], weight)), two[:rows])
    on_the_left = [rows for rows in (8, 64, 256) if "barrier" in product.lower(x[:rows], weight).as_text()]
    assert on_the_left == ([] if num_out % 64 else [64, 256])


@pytest.mark.parametrize("width", [16, 64, 80, 576, 1024])
def test_a_row_s_sum_is_the_same_beside_any_number_of_rows(width: int) -> None:
    x = jnp.asarray(np.random.default_rng(3).normal(size=(300, width)), jnp.float32)
    weight = jnp.ones(width)
    total, norm = jax.jit(stable_sum), jax.jit(partial(rms_norm, weight=weight, eps=1e-6))
    for rows in (1, 2, 7, 8, 48, 64):
        np.testing.assert_array_equal(np.asarray(total(x[:rows])), np.asarray(total(x))[:rows])
        np.testing.assert_array_equal(np.asarray(norm(x[:rows])), np.asarray(norm(x))[:rows])
    np.testing.assert_allclose(np.asarray(total(x)), np.asarray(x, np.float64).sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("long_contexts")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kv_heads", "groups", "head_dim"), [(3, 3, 64), (1, 8, 80), (2, 1, 128)])
@pytest.mark.parametrize("kv_tile", [KV_TILE, 2 * KV_TILE], ids=["short", "long"])
def test_a_decode_row_attends_as_a_chunk_does(
    kv_tile: int, kv_heads: int, groups: int, head_dim: int, dtype: str
) -> None:
    """At the served tile sizes, across a tile's edge, behind tiles that are seen whole; in two query tiles, too."""
    rng = np.random.default_rng(4)
    num_blocks, start = 4 * kv_tile // 16, 3 * kv_tile - 28
    shape = StepShape(128, ROWS, num_blocks, 16, q_tile=128, kv_tile=kv_tile)
    cache = jnp.asarray(rng.normal(size=(ROWS * num_blocks + 1, 16, kv_heads, 2 * head_dim)), dtype)
    order = rng.permutation(np.arange(1, ROWS * num_blocks + 1))
    tables = jnp.asarray(order.reshape(ROWS, num_blocks), jnp.int32)
    q = jnp.asarray(rng.normal(size=(128, kv_heads, groups, head_dim)), jnp.float32)
    attend = jax.jit(partial(paged_attention, dtype=dtype, window=None), static_argnames="shape")

    def run(shape: StepShape, q: jax.Array, decodes: list[Run], chunks: list[Run]) -> np.ndarray:
        batch = unpack(jnp.asarray(_pack(shape, decodes, chunks, {})), shape)
        return np.asarray(attend(q, cache, tables, batch, shape))

    chunk = run(shape, q, [], [(2, start, 128)])
    in_two = StepShape(128, ROWS, num_blocks, 16, q_tile=64, kv_tile=kv_tile)
    np.testing.assert_array_equal(run(in_two, q, [], [(2, start, 128)]), chunk)
    for bucket in (2, 64):
        small = StepShape(bucket, ROWS, num_blocks, 16, q_tile=bucket, kv_tile=kv_tile)
        for offset in (0, 27, 28, 91, 92, 127):
            one = run(small, jnp.roll(q, -offset, 0)[:bucket], [(2, start + offset, 1)], [])
            np.testing.assert_array_equal(one[0], chunk[offset])
