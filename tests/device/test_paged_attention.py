"""XLA paged attention against a dense float64 oracle, with everything that must not be read set to NaN."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.ops.paged_attention import paged_attention, write_kv
from jaxserve.state import StepShape, unpack

K, G, H, C = 2, 3, 16, 4
ROWS, BLOCKS_PER_ROW, NUM_BLOCKS = 6, 16, 70


@dataclass
class Chunk:
    """Tokens [start, start + length) of a row; a decode is a chunk of one."""

    row: int
    start: int
    length: int
    decode: bool = False


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, position: int, window: int | None) -> np.ndarray:
    """One token's attention [K, G, H] over k, v [S, K, H], in float64."""
    first = 0 if window is None else max(0, position - window + 1)
    k, v = k[first : position + 1].astype(np.float64), v[first : position + 1].astype(np.float64)
    scores = np.einsum("kgh,skh->kgs", q.astype(np.float64), k)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("kgs,skh->kgh", p / p.sum(-1, keepdims=True), v)


class Paged:
    """A cache in shuffled blocks, poisoned wherever no token was written."""

    def __init__(self, rng: np.random.Generator, lengths: dict[int, int], dtype: str = "float32") -> None:
        self.k = {r: rng.normal(size=(n, K, H)).astype(dtype) for r, n in lengths.items()}
        self.v = {r: rng.normal(size=(n, K, H)).astype(dtype) for r, n in lengths.items()}
        cache = np.full((NUM_BLOCKS, C, K, 2 * H), np.nan, dtype)
        cache[0] = 0  # the null block
        self.tables = np.zeros((ROWS, BLOCKS_PER_ROW), np.int32)
        free = list(rng.permutation(np.arange(1, NUM_BLOCKS)))
        for row, length in lengths.items():
            for position in range(length):
                if position % C == 0:
                    self.tables[row, position // C] = free.pop()
                block = self.tables[row, position // C]
                cache[block, position % C] = np.concatenate([self.k[row][position], self.v[row][position]], -1)
        self.cache = cache


def pack(chunks: list[Chunk], shape: StepShape) -> np.ndarray:
    """A step's packed array, laid out by hand (the engine's own packing has its own tests)."""
    packed = np.zeros(shape.packed_len, np.int32)
    f = {name: packed[at : at + n] for name, (at, n) in shape.fields().items()}
    f["rows"].fill(shape.max_rows)
    offset, tiles = 0, []
    for chunk in chunks:
        span = slice(offset, offset + chunk.length)
        f["rows"][span], f["positions"][span] = chunk.row, np.arange(chunk.start, chunk.start + chunk.length)
        if not chunk.decode:
            tiles += [(offset + i, min(shape.q_tile, chunk.length - i)) for i in range(0, chunk.length, shape.q_tile)]
        offset += chunk.length
    for i, (start, length) in enumerate(tiles):
        f["tile_start"][i], f["tile_len"][i] = start, length
    f["header"][:] = sum(c.decode for c in chunks), len(tiles), 0, 1
    return packed


STEPS = {
    "decode": [Chunk(0, 0, 1, True), Chunk(2, 17, 1, True), Chunk(5, 63, 1, True)],
    "one chunk": [Chunk(1, 0, 24)],
    "chunk in the middle": [Chunk(3, 30, 21)],
    "mixed": [Chunk(0, 9, 1, True), Chunk(4, 40, 1, True), Chunk(1, 0, 5), Chunk(2, 11, 13), Chunk(3, 7, 1)],
    "nothing": [],
}


@pytest.mark.parametrize("forms", ["long_contexts", "short_contexts"])
@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize("name", STEPS)
def test_equals_dense_attention(name: str, window: int | None, forms: str, request: pytest.FixtureRequest) -> None:
    if forms == "long_contexts":
        request.getfixturevalue(forms)
    rng = np.random.default_rng(7)
    chunks = STEPS[name]
    paged = Paged(rng, {c.row: c.start + c.length for c in chunks})
    shape = StepShape(24, ROWS, BLOCKS_PER_ROW, C, q_tile=8, kv_tile=16)
    q = rng.normal(size=(shape.num_tokens, K, G, H)).astype(np.float32)
    batch = unpack(jnp.asarray(pack(chunks, shape)), shape)
    attend = jax.jit(paged_attention, static_argnames=("shape", "dtype", "window"))
    out = attend(q, paged.cache, paged.tables, batch, shape=shape, dtype="float32", window=window)
    offset = 0
    for chunk in chunks:
        for i in range(chunk.length):
            want = dense(q[offset + i], paged.k[chunk.row], paged.v[chunk.row], chunk.start + i, window)
            np.testing.assert_allclose(np.asarray(out[offset + i]), want, rtol=2e-5, atol=2e-6)
        offset += chunk.length
    assert np.isfinite(np.asarray(out)).all(), "padding must stay finite: it flows on through the layers"


def test_a_bfloat16_cache_kept_as_bits_reads_the_same() -> None:
    rng = np.random.default_rng(8)
    chunks = STEPS["mixed"]
    paged = Paged(rng, {c.row: c.start + c.length for c in chunks}, dtype=jnp.bfloat16)
    shape = StepShape(24, ROWS, BLOCKS_PER_ROW, C, q_tile=8, kv_tile=16)
    q = rng.normal(size=(24, K, G, H)).astype(np.float32)
    batch = unpack(jnp.asarray(pack(chunks, shape)), shape)
    kwargs = {"shape": shape, "dtype": "bfloat16", "window": None}
    plain = paged_attention(jnp.asarray(q), jnp.asarray(paged.cache), jnp.asarray(paged.tables), batch, **kwargs)
    bits = paged_attention(
        jnp.asarray(q), jnp.asarray(paged.cache.view(np.uint16)), jnp.asarray(paged.tables), batch, **kwargs
    )
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(bits))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_keys_and_values_land_in_their_slots_and_padding_nowhere(dtype: str) -> None:
    rng = np.random.default_rng(9)
    k, v = (jnp.asarray(rng.normal(size=(5, K, H)), jnp.float32) for _ in range(2))
    storage = np.uint16 if dtype == "bfloat16" else dtype
    cache = np.asarray(rng.integers(0, 99, (3, C, K, 2 * H))).astype(storage)
    slots = jnp.asarray([5, 11, 3 * C, 4, 3 * C + 7])
    out = np.asarray(write_kv(jnp.asarray(cache), k, v, slots, dtype)).reshape(3 * C, K, 2 * H)
    want = cache.reshape(3 * C, K, 2 * H).copy()
    tokens = np.concatenate([np.asarray(k), np.asarray(v)], -1).astype(dtype)
    for token, slot in ((0, 5), (1, 11), (3, 4)):
        want[slot] = tokens[token].view(np.uint16) if storage == np.uint16 else tokens[token]
    np.testing.assert_array_equal(out, want)


@pytest.mark.usefixtures("long_contexts")
def test_cutting_a_sequence_differently_moves_no_bit() -> None:
    """Key tiles are anchored at position 0: a token's bits do not depend on its chunk or its neighbours."""
    rng = np.random.default_rng(10)
    paged = Paged(rng, {0: 40, 1: 64, 3: 9})
    shape = StepShape(24, ROWS, BLOCKS_PER_ROW, C, q_tile=8, kv_tile=16)
    queries = rng.normal(size=(40, K, G, H)).astype(np.float32)

    def run(chunks: list[Chunk]) -> dict[int, np.ndarray]:
        q = rng.normal(size=(24, K, G, H)).astype(np.float32)
        offset, where = 0, {}
        for chunk in chunks:
            for i in range(chunk.length):
                if chunk.row == 0:
                    q[offset + i] = queries[chunk.start + i]
                    where[chunk.start + i] = offset + i
            offset += chunk.length
        batch = unpack(jnp.asarray(pack(chunks, shape)), shape)
        out = paged_attention(
            jnp.asarray(q),
            jnp.asarray(paged.cache),
            jnp.asarray(paged.tables),
            batch,
            shape=shape,
            dtype="float32",
            window=None,
        )
        return {position: np.asarray(out[at]) for position, at in where.items()}

    whole = run([Chunk(0, 0, 24)]) | run([Chunk(0, 24, 16)])
    cut = (
        run([Chunk(1, 63, 1, True), Chunk(3, 0, 9), Chunk(0, 0, 13)]) | run([Chunk(0, 13, 20)]) | run([Chunk(0, 33, 7)])
    )
    for position in range(40):
        np.testing.assert_array_equal(whole[position], cut[position])
