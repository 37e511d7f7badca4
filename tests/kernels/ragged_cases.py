"""Random ragged batches over a poisoned, shuffled pool, for the tests of the attention kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Sizes:
    """Shapes of a case: cases of one `Sizes` run through one compiled program."""

    num_tokens: int = 40
    num_rows: int = 5
    table_width: int = 6
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    block_size: int = 16
    num_blocks: int = 40
    dtype: str = "float32"
    kv_dtype: str | None = None

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def longest(self) -> int:
        """Tokens that a row of the block table has room for."""
        return self.table_width * self.block_size


@dataclass(frozen=True)
class Case:
    """One call's arrays, and what lies in them by sequence."""

    sizes: Sizes
    q: jax.Array
    cache: jax.Array
    block_tables: jax.Array
    seq_lens: jax.Array
    cu_q_lens: jax.Array
    num_seqs: jax.Array
    num_decode: jax.Array
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[jax.Array, ...]:
        return (
            self.q,
            self.cache,
            self.block_tables,
            self.seq_lens,
            self.cu_q_lens,
            self.num_seqs,
            self.num_decode,
        )


@dataclass(frozen=True)
class Sequence:
    """What a case places in the pool: keys and values of all positions, queries of the last ones."""

    queries: np.ndarray  # f32[queries, N, H]
    kv: np.ndarray  # f32[positions, K, 2H]

    @property
    def length(self) -> int:
        return len(self.kv)


def random_sequence(rng: np.random.Generator, sizes: Sizes, num_queries: int, length: int) -> Sequence:
    queries = rng.standard_normal((num_queries, sizes.num_heads, sizes.head_dim), dtype=np.float32)
    kv = rng.standard_normal((length, sizes.num_kv_heads, 2 * sizes.head_dim), dtype=np.float32)
    return Sequence(queries, kv)


def place(rng: np.random.Generator, sizes: Sizes, sequences: list[Sequence], *, num_decode: int | None = None) -> Case:
    """Sequences over shuffled blocks of a pool whose every other place is NaN, the null block's too.

    Past their length, tables name blocks of others and blocks outside the pool: neither may be seen.
    """
    kv_dtype = sizes.kv_dtype or sizes.dtype
    scales = {"k_scale": 0.03, "v_scale": 0.02} if kv_dtype.startswith("float8") else {}
    divisor = np.repeat([scales.get("k_scale", 1.0), scales.get("v_scale", 1.0)], sizes.head_dim).astype(np.float32)
    pool = np.full((sizes.num_blocks, sizes.block_size, sizes.num_kv_heads, 2 * sizes.head_dim), np.nan, np.float32)
    free = list(rng.permutation(np.arange(1, sizes.num_blocks)))
    tables = rng.integers(0, 2 * sizes.num_blocks, (sizes.num_rows, sizes.table_width), dtype=np.int32)
    q = np.full((sizes.num_tokens, sizes.num_heads, sizes.head_dim), np.nan, np.float32)
    lengths = np.full(sizes.num_rows, 7, np.int32)
    begins = np.zeros(sizes.num_rows + 1, np.int32)
    for row, sequence in enumerate(sequences):
        for first in range(0, sequence.length, sizes.block_size):
            block = tables[row, first // sizes.block_size] = free.pop()
            content = sequence.kv[first : first + sizes.block_size] / divisor
            pool[block, : len(content)] = content
        lengths[row] = sequence.length
        begins[row + 1] = begins[row] + len(sequence.queries)
        q[begins[row] : begins[row + 1]] = sequence.queries
    begins[len(sequences) + 1 :] = begins[len(sequences)]
    if num_decode is None:
        chunks = [row for row, sequence in enumerate(sequences) if len(sequence.queries) != 1]
        num_decode = min(chunks, default=len(sequences))
    return Case(
        sizes,
        jnp.asarray(q).astype(sizes.dtype),
        jnp.asarray(pool).astype(kv_dtype),
        jnp.asarray(tables),
        jnp.asarray(lengths),
        jnp.asarray(begins),
        jnp.asarray([len(sequences)], jnp.int32),
        jnp.asarray([num_decode], jnp.int32),
        scales,
    )


def random_case(rng: np.random.Generator, sizes: Sizes, edges: tuple[int, ...] = ()) -> Case:
    """Decoding sequences first, then chunks; lengths at random or at an edge: 1, a block's, a tile's, the longest."""
    edges = (1, sizes.block_size, sizes.block_size + 1, sizes.longest, *edges)
    num_seqs = int(rng.integers(1, sizes.num_rows + 1))
    num_decode = int(rng.integers(0, num_seqs + 1))
    budget = sizes.num_tokens - num_decode
    blocks = sizes.num_blocks - 1
    sequences = []
    for row in range(num_seqs):
        most = min(sizes.longest, (blocks - (num_seqs - row - 1)) * sizes.block_size)
        wanted = int(rng.choice(edges)) if rng.random() < 0.5 else int(rng.integers(1, sizes.longest + 1))
        length = min(wanted, most)
        num_queries = 1
        if row >= num_decode:
            spare = budget - (num_seqs - row - 1)
            num_queries = int(rng.integers(1, min(length, spare) + 1))
            budget -= num_queries
        blocks -= -(-length // sizes.block_size)
        sequences.append(random_sequence(rng, sizes, num_queries, length))
    return place(rng, sizes, sequences, num_decode=num_decode)


def rounding_bound(case: Case, weighted: jax.Array, exact: jax.Array) -> np.ndarray:
    """How far a kernel's output may lie from the exact one, per element, by what it rounds.

    With u the unit roundoff of the type products are taken in (bfloat16: 2^-8; float32: 2^-24), a kernel rounds
    each softmax weight to it before the second product, a relative u, and the result, a relative u; both are bounded
    by u times `weighted` = sum of weight x |value|. Its float32 part: scores are sums of H products, each off by
    (H + 2) 2^-24 of sum |q k| scale, which is below 3 sqrt(H) here; exp turns an absolute error of scores into a
    relative one of weights; sums over S keys, and the rescaling of up to S tiles, add 2 S 2^-24.
    """
    sizes = case.sizes
    unit = 2.0**-8 if sizes.dtype == "bfloat16" else 2.0**-24
    spread = 3 * sizes.head_dim**0.5
    of_sums = ((sizes.head_dim + 2) * spread + 2 * sizes.longest + 16) * 2.0**-24
    weighted, exact = np.asarray(weighted, np.float64), np.abs(np.asarray(exact, np.float64))
    return (unit + 2 * of_sums) * weighted + unit * exact
