"""The references against numpy loops over sequences, tokens and blocks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_copy.api import block_copy
from pallas_kernels.block_transfer.api import block_gather, block_scatter
from pallas_kernels.kv_write.api import kv_write
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from tests.kernels.ragged_cases import Sequence, Sizes, place, random_sequence

SIZES = Sizes(num_tokens=12, num_rows=4, table_width=3, num_blocks=12)
OUTSIDE = [-3, -1, 8, 1000]  # block ids that no pool of eight has


def by_hand(sequence: Sequence, sizes: Sizes, *, scale: float, window=None, softcap=None, sinks=None) -> np.ndarray:
    """[queries, N, H] in float64, one score at a time."""
    out = np.zeros(sequence.queries.shape, np.float64)
    first = sequence.length - len(sequence.queries)
    for i, query in enumerate(sequence.queries.astype(np.float64)):
        begin = 0 if window is None else max(0, first + i - window + 1)
        seen = sequence.kv[begin : first + i + 1].astype(np.float64)
        for head in range(sizes.num_heads):
            keys, values = np.split(seen[:, head // sizes.group], 2, axis=-1)
            scores = keys @ query[head] * scale
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            weights = np.exp(scores)
            total = weights.sum() + (0.0 if sinks is None else np.exp(float(sinks[head])))
            out[i, head] = weights @ values / total
    return out


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 5}, {"softcap": 2.0}, {"sinks": np.asarray([0.5, -1.0, 3.0, 0.0], np.float32)}],
    ids=["plain", "window", "softcap", "sinks"],
)
def test_attention(options: dict):
    rng = np.random.default_rng(0)
    sequences = [random_sequence(rng, SIZES, n, length) for n, length in [(1, 1), (1, 17), (6, 40)]]
    case = place(rng, SIZES, sequences)
    given = options | ({"sinks": jnp.asarray(options["sinks"])} if "sinks" in options else {})
    out = ragged_paged_attention(*case.arguments, scale=0.125, backend="reference", **given)
    expected = np.concatenate([by_hand(sequence, SIZES, scale=0.125, **options) for sequence in sequences])
    np.testing.assert_allclose(out[: len(expected)], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out[len(expected) :], 0.0)


def test_attention_multiplies_an_fp8_pool_by_its_scales():
    sizes = Sizes(num_tokens=12, num_rows=4, table_width=3, num_blocks=12, kv_dtype="float8_e4m3fn")
    rng = np.random.default_rng(1)
    sequence = random_sequence(rng, sizes, 3, 20)
    case = place(rng, sizes, [sequence])
    out = ragged_paged_attention(*case.arguments, scale=0.125, backend="reference", **case.scales)
    divisor = np.repeat([case.scales["k_scale"], case.scales["v_scale"]], sizes.head_dim).astype(np.float32)
    stored = np.asarray(jnp.asarray(sequence.kv / divisor).astype(jnp.float8_e4m3fn).astype(jnp.float32)) * divisor
    expected = by_hand(Sequence(sequence.queries, stored), sizes, scale=0.125)
    np.testing.assert_allclose(out[:3], expected, rtol=1e-5, atol=1e-5)


def pool_of(rng: np.random.Generator, dtype: str = "float32") -> jnp.ndarray:
    return jnp.asarray(rng.standard_normal((8, 16, 2, 128), dtype=np.float32)).astype(dtype)


def test_kv_write_places_rows_and_drops_what_lies_outside():
    rng = np.random.default_rng(2)
    cache = pool_of(rng)
    k, v = (jnp.asarray(rng.standard_normal((6, 2, 64), dtype=np.float32)) for _ in range(2))
    slots = [16, 127, -1, 128, 5000, 33]
    out = kv_write(cache, k, v, jnp.asarray(slots, jnp.int32), backend="reference")
    expected = np.asarray(cache).copy()
    for token, slot in enumerate(slots):
        if 0 <= slot < 128:
            expected[slot // 16, slot % 16] = np.concatenate([k[token], v[token]], axis=-1)
    np.testing.assert_array_equal(out, expected)


def test_kv_write_divides_by_the_scales_and_stops_at_the_largest_fp8():
    cache = pool_of(np.random.default_rng(3), "float8_e4m3fn")
    k = jnp.full((1, 2, 64), 3.0)
    v = jnp.full((1, 2, 64), -1e6, jnp.float32)
    slots = jnp.asarray([20], jnp.int32)
    out = kv_write(cache, k, v, slots, k_scale=0.5, v_scale=jnp.float32(2.0), backend="reference")
    row = np.asarray(out[1, 4].astype(jnp.float32))
    np.testing.assert_array_equal(row[:, :64], 6.0)
    np.testing.assert_array_equal(row[:, 64:], -448.0)


def test_block_copy():
    rng = np.random.default_rng(4)
    cache = pool_of(rng)
    sources, targets = [1, 1, 2, 3, 4, 5], [6, 7, *OUTSIDE]
    out = block_copy(cache, *(jnp.asarray(ids, jnp.int32) for ids in (sources, targets)), backend="reference")
    expected = np.asarray(cache).copy()
    expected[[6, 7]] = expected[1]
    np.testing.assert_array_equal(out, expected)


def test_block_gather_and_scatter():
    rng = np.random.default_rng(5)
    cache = pool_of(rng)
    ids = jnp.asarray([3, *OUTSIDE, 6], jnp.int32)
    payload = block_gather(cache, ids, backend="reference")
    np.testing.assert_array_equal(payload[0], cache[3])
    np.testing.assert_array_equal(payload[-1], cache[6])
    np.testing.assert_array_equal(payload[1:-1], 0.0)
    moved = block_scatter(cache, payload + 1, ids, backend="reference")
    expected = np.asarray(cache).copy()
    expected[[3, 6]] += 1
    np.testing.assert_array_equal(moved, expected)
