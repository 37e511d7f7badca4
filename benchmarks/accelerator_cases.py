"""Ragged batches over a paged pool, made on the device: fresh values, shuffled blocks, NaN where nothing was written.

Also the bound of what a right kernel's output may be off, and the same batch as the engine's XLA attention takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator_timing import random_values
from jaxserve.engine.pack import empty_step
from jaxserve.ops.paged_attention import paged_attention
from jaxserve.state import StepBatch, StepShape, unpack
from pallas_kernels.ragged_paged_attention.ref import attention_reference

FP8_SCALES = {"k_scale": 0.02, "v_scale": 0.03}


@dataclass(frozen=True, slots=True)
class Heads:
    """What a kernel is compiled for, of a model."""

    num_kv_heads: int
    group: int
    head_dim: int
    dtype: str = "bfloat16"
    kv_dtype: str = ""
    block_size: int = 16

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def stored(self) -> str:
        return self.kv_dtype or self.dtype

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def name(self) -> str:
        kind = f"{self.dtype} over {self.kv_dtype}" if self.kv_dtype else self.dtype
        return f"{kind}, GQA {self.group}, H {self.head_dim}, blocks of {self.block_size}"


@dataclass(frozen=True, slots=True)
class Stream:
    """One sequence's part of a stream: so many queries, the last at position `length` - 1."""

    length: int
    num_queries: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """The arguments of `ragged_paged_attention`, and what they were made of."""

    heads: Heads
    streams: tuple[Stream, ...]
    q: jax.Array
    cache: jax.Array
    block_tables: jax.Array
    seq_lens: jax.Array
    cu_q_lens: jax.Array
    num_seqs: jax.Array
    num_decode: jax.Array

    @property
    def arguments(self) -> tuple[jax.Array, ...]:
        return (self.q, self.cache, self.block_tables, *self.counts)

    @property
    def counts(self) -> tuple[jax.Array, ...]:
        return self.seq_lens, self.cu_q_lens, self.num_seqs, self.num_decode

    @property
    def scales(self) -> dict[str, float]:
        return FP8_SCALES if self.heads.kv_dtype else {}

    @property
    def num_queries(self) -> int:
        return sum(stream.num_queries for stream in self.streams)


def counts_of(streams: Sequence[Stream], num_rows: int) -> tuple[np.ndarray, ...]:
    """seq_lens, cu_q_lens, num_seqs, num_decode; decoding sequences stand first. Unused rows have junk lengths."""
    lengths, begins = np.full(num_rows, 7, np.int32), np.zeros(num_rows + 1, np.int32)
    lengths[: len(streams)] = [stream.length for stream in streams]
    begins[1 : len(streams) + 1] = np.cumsum([stream.num_queries for stream in streams])
    begins[len(streams) + 1 :] = begins[len(streams)]
    num_decode = next((i for i, stream in enumerate(streams) if stream.num_queries > 1), len(streams))
    return lengths, begins, np.int32([len(streams)]), np.int32([num_decode])


def make_case(
    heads: Heads, streams: Sequence[Stream], *, num_tokens: int, num_rows: int, table_width: int, seed: int
) -> Case:
    """The streams over shuffled blocks.

    Every slot without a token is NaN, the null block's too, and so are queries past the last; past a sequence's end its
    table names blocks of others and blocks outside the pool.
    """
    rng = np.random.default_rng(seed)
    size = heads.block_size
    needed = [-(-stream.length // size) for stream in streams]
    num_blocks = sum(needed) + 8
    blocks = rng.permutation(np.arange(1, num_blocks))[: sum(needed)].astype(np.int32)
    tables = rng.integers(0, 2 * num_blocks, (num_rows, table_width), dtype=np.int32)
    written = np.zeros((num_blocks, size), bool)
    at = 0
    for row, (stream, count) in enumerate(zip(streams, needed, strict=True)):
        own = blocks[at : at + count]
        tables[row, :count] = own
        written[own] = (np.arange(count * size) < stream.length).reshape(count, size)
        at += count
    shape = (num_blocks, size, heads.num_kv_heads, 2 * heads.head_dim)
    cache = poison(random_values(seed + 1, shape, "float32"), jnp.asarray(written))
    if heads.kv_dtype:
        cache = cache / jnp.repeat(jnp.float32([*FP8_SCALES.values()]), heads.head_dim)
    q = random_values(seed + 2, (num_tokens, heads.num_heads, heads.head_dim), "float32")
    q = poison(q, jnp.arange(num_tokens) < sum(stream.num_queries for stream in streams))
    arrays = [jnp.asarray(array) for array in (tables, *counts_of(streams, num_rows))]
    return Case(heads, tuple(streams), q.astype(heads.dtype), cache.astype(heads.stored), *arrays)


def random_streams(rng: np.random.Generator, *, num_tokens: int, num_rows: int, longest: int) -> list[Stream]:
    """Decoding sequences, then chunks, with lengths at random and at edges; a row and some tokens stay unused."""
    num_seqs = num_rows - 1
    num_decode = num_seqs // 2
    edges = [1, 16, 17, longest, longest - 1]
    lengths = [int(rng.choice(edges)) if rng.random() < 0.4 else int(rng.integers(1, longest)) for _ in range(num_seqs)]
    streams = [Stream(length) for length in lengths[:num_decode]]
    spare = num_tokens - num_decode - 3
    for left, length in zip(range(num_seqs - num_decode, 0, -1), lengths[num_decode:], strict=True):
        most = min(length, max(1, 2 * spare // left - 1), spare - left + 1)
        count = int(rng.integers(1, most + 1))
        streams.append(Stream(length, count))
        spare -= count
    return [*(s for s in streams if s.num_queries == 1), *(s for s in streams if s.num_queries > 1)]


@jax.jit
def poison(values: jax.Array, kept: jax.Array) -> jax.Array:
    """NaN where `kept`, of the first axes, does not hold."""
    return jnp.where(kept.reshape(*kept.shape, *(1,) * (values.ndim - kept.ndim)), values, jnp.nan)


@partial(jax.jit, static_argnames=("scale", "window", "softcap"))
def _exact(arguments: tuple[jax.Array, ...], **options: Any) -> tuple[jax.Array, jax.Array]:
    """The exact output in float32, and the same of absolute values instead of values."""
    q, cache, *others = arguments
    q, cache = q.astype(jnp.float32), cache.astype(jnp.float32)
    is_value = jnp.arange(cache.shape[-1]) >= cache.shape[-1] // 2
    sizes = jnp.where(is_value, jnp.abs(cache), cache)
    return attention_reference(q, cache, *others, **options), attention_reference(q, sizes, *others, **options)


def error_over_bound(case: Case, out: jax.Array, **options: Any) -> float:
    """The worst error of an output over what rounding allows; inf where one is NaN, or padding is not 0.

    With u the unit roundoff of the type that products are taken in (bfloat16 2^-8, float32 2^-24), rounding the weights
    before the second product, and the result, may move an output by u (Σ weight |value| + |output|). The rest is
    float32's: a score is a sum of H products, off by up to (H + 2) 2^-24 Σ |q k| scale, where the sum is at most 3 √H
    for values up to √3; exp makes that a relative error of a weight; sums over S keys, and what rescales them, add
    2 S 2^-24. Twice that, since the order of sums is the kernel's own.
    """
    heads = case.heads
    exact, sizes = (np.asarray(array) for array in _exact(case.arguments, scale=heads.scale, **case.scales, **options))
    unit = 2.0**-8 if heads.dtype == "bfloat16" else 2.0**-24
    longest = max(stream.length for stream in case.streams)
    of_sums = ((heads.head_dim + 2) * 3 * heads.head_dim**0.5 + 2 * longest + 16) * 2.0**-24
    bound = (unit + 2 * of_sums) * sizes + unit * np.abs(exact)
    error = np.abs(np.asarray(out, np.float32) - exact)
    ratio = np.where(error == 0, 0.0, error / np.maximum(bound, 1e-30))
    return float(np.where(np.isnan(ratio), np.inf, ratio).max())


def step_shape_of(case: Case, kv_tile: int = 128) -> StepShape:
    """The engine's sizes for such a batch."""
    num_rows, width = case.block_tables.shape
    kv_tile = max(kv_tile, case.heads.block_size)
    width += -width % (kv_tile // case.heads.block_size)
    num_tokens = case.q.shape[0]
    return StepShape(num_tokens, num_rows, width, case.heads.block_size, q_tile=min(128, num_tokens), kv_tile=kv_tile)


def step_batch_of(streams: Sequence[Stream], shape: StepShape) -> StepBatch:
    """The engine's account of a batch: row i is the i-th stream's."""
    packed, fields = empty_step(shape)
    num_decode = int(counts_of(streams, shape.max_rows)[-1][0])
    offset, tiles = 0, []
    for row, stream in enumerate(streams):
        end = offset + stream.num_queries
        fields["rows"][offset:end] = row
        fields["positions"][offset:end] = np.arange(stream.length - stream.num_queries, stream.length)
        if row >= num_decode:
            tiles += [(at, min(shape.q_tile, end - at)) for at in range(offset, end, shape.q_tile)]
        offset = end
    for index, (start, count) in enumerate(tiles):
        fields["tile_start"][index], fields["tile_len"][index] = start, count
    fields["header"][:] = num_decode, len(tiles), 0, 1
    return unpack(jnp.asarray(packed), shape)


def xla_attention(
    q: jax.Array, cache: jax.Array, tables: jax.Array, batch: StepBatch, *, heads: Heads, shape: StepShape
) -> jax.Array:
    """The engine's XLA attention [T, N, H] of the same batch; what it gives for padding is finite and nobody's."""
    num_tokens = q.shape[0]
    grouped = (q.astype(jnp.float32) * jnp.float32(heads.scale)).reshape(
        num_tokens, heads.num_kv_heads, heads.group, heads.head_dim
    )
    missing = shape.max_blocks - tables.shape[1]
    tables = jnp.pad(tables, ((0, 0), (0, missing))).clip(0, cache.shape[0] - 1)
    out = paged_attention(grouped, cache, tables, batch, shape, dtype=heads.stored, window=None)
    return out.reshape(num_tokens, heads.num_heads, heads.head_dim)


def unpoisoned_null_block(case: Case) -> Case:
    """The case with zeros in block 0, as in the engine's pool: its XLA attention reads padding of tables."""
    return replace(case, cache=case.cache.at[0].set(jnp.zeros((), case.cache.dtype)))
