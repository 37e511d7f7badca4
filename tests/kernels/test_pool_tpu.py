"""The TPU kernels that write to the pool, in the TPU interpreter: bit for bit what the references give."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_copy.api import block_copy
from pallas_kernels.block_transfer.api import block_gather, block_scatter
from pallas_kernels.kv_write.api import kv_write
from pallas_kernels.kv_write.kernel_tpu import run_lengths
from pallas_kernels.kv_write.tuning import Tiles
from tests.kernels.tpu_interpreter import CHECKED, run_checked

DTYPES = ["float32", "bfloat16", "float8_e4m3fn"]
OUTSIDE = [-1, 12, 4000]  # of a pool of 12 blocks


def pool_of(rng: np.random.Generator, dtype: str, block_size: int = 16) -> jax.Array:
    """Twelve blocks, some of whose rows are NaN: nobody wrote them, and they are moved like others."""
    pool = rng.standard_normal((12, block_size, 2, 128), dtype=np.float32)
    pool[rng.random(pool.shape[:2]) < 0.3] = np.nan
    return jnp.asarray(pool).astype(dtype)


def assert_same_bits(found: jax.Array, expected: jax.Array) -> None:
    words = {1: np.uint8, 2: np.uint16, 4: np.uint32}[expected.dtype.itemsize]
    np.testing.assert_array_equal(np.asarray(found).view(words), np.asarray(expected).view(words))


def slots_of(rng: np.random.Generator, kind: str, count: int, block_size: int) -> np.ndarray:
    """Slots as steps have them, and in no order at all."""
    num_slots = 12 * block_size
    if kind == "decode":  # one token here and there
        return rng.permutation(num_slots)[:count]
    if kind == "chunks":  # of three sequences, each going on in other blocks; padding between and after
        first = rng.permutation(12)
        of_blocks = [np.arange(block) * 0 + np.arange(b * block_size, (b + 1) * block_size) for b, block in
                     zip(first, [block_size] * 12, strict=True)]  # fmt: skip
        chunks = [np.concatenate(of_blocks[4 * i : 4 * i + 4])[int(rng.integers(0, 13)) :] for i in range(3)]
        parts = [chunk[: count // 3 - 2] for chunk in chunks]
        return np.concatenate([parts[0], [-1, num_slots], parts[1], parts[2], np.full(count, 10**6)])[:count]
    near = np.arange(40)  # many runs in few groups, so that reads must wait for writes
    return rng.permutation(near)[:count]


@pytest.fixture(scope="module")
def write() -> Any:
    tiles = Tiles(token_tile=16)
    return jax.jit(partial(kv_write, backend="tpu", tiles=tiles, interpret=CHECKED))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_write(write: Any, dtype: str):
    rng = np.random.default_rng(DTYPES.index(dtype))
    scales = {"k_scale": 0.5, "v_scale": 0.25} if dtype.startswith("float8") else {}
    of_step = "bfloat16" if dtype == "bfloat16" else "float32"
    for kind in ("decode", "chunks", "scattered"):
        cache = pool_of(rng, dtype)
        k, v = (jnp.asarray(rng.standard_normal((37, 2, 64), dtype=np.float32)).astype(of_step) for _ in range(2))
        slots = jnp.asarray(slots_of(rng, kind, 37, 16), jnp.int32)
        expected = kv_write(cache, k, v, slots, **scales, backend="reference")
        assert_same_bits(run_checked(write, cache, k, v, slots, **scales), expected)


@pytest.mark.parametrize("backend", ["tpu", "reference"])
def test_kv_write_to_one_layer_of_a_pool_that_holds_three(backend: str):
    """Slots that are padding in a layer's part are no slots of the next one."""
    rng = np.random.default_rng(9)
    cache = pool_of(rng, "bfloat16")
    k, v = (jnp.asarray(rng.standard_normal((37, 2, 64), dtype=np.float32)).astype("bfloat16") for _ in range(2))
    slots = jnp.asarray(np.append(rng.permutation(4 * 16)[:34], [4 * 16, -1, 7 * 16]), jnp.int32)
    alone = kv_write(cache[4:8], k, v, slots, backend="reference")
    if backend == "tpu":
        tiles = Tiles(token_tile=16)
        call = jax.jit(partial(kv_write, backend="tpu", tiles=tiles, interpret=CHECKED, num_blocks=4))
        found = run_checked(call, cache, k, v, slots, first_block=jnp.int32(4))
    else:
        found = kv_write(cache, k, v, slots, first_block=4, num_blocks=4, backend="reference")
    assert_same_bits(found, jnp.concatenate([cache[:4], alone, cache[8:]]))


def test_runs_are_cut_at_groups_tiles_and_gaps():
    slots = [
        8,
        9,
        10,
        11,
        12,
        13,
        14,
        15,
        16,
        17,
        -1,
        18,
        19,
        21,
        22,
        23,
        0,
        1,
        2,
        500,
        3,
        4,
        7,
        7,
        6,
        5,
        3,
        2,
        1,
        1,
        1,
        1,
    ]
    lengths = np.asarray(run_lengths(jnp.asarray(slots, jnp.int32), 400, 16)).tolist()
    expected = [8, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 2, 0, 3, 0, 0, 3, 0, 0, 0, 2, 0, *[1] * 10]
    assert lengths == expected


@pytest.mark.parametrize("token_tile", [8, 20])
def test_tiles_of_tokens_are_whole_groups(token_tile: int):
    with pytest.raises(ValueError, match=f"token_tile is {token_tile}: it must be a multiple of 8, and 16 at least"):
        Tiles(token_tile=token_tile)


def test_tiles_need_memory():
    with pytest.raises(ValueError, match="vmem_limit_mib is 0: 1 at least"):
        Tiles(vmem_limit_mib=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_copy(dtype: str):
    cache = pool_of(np.random.default_rng(0), dtype, block_size=32)
    sources = jnp.asarray([1, 1, 7, *OUTSIDE, 3], jnp.int32)
    targets = jnp.asarray([2, 5, 11, *OUTSIDE, 4], jnp.int32)
    copy = partial(run_checked, jax.jit(partial(block_copy, backend="tpu", interpret=CHECKED)))
    assert_same_bits(copy(cache, sources, targets), block_copy(cache, sources, targets, backend="reference"))


def test_more_blocks_than_are_in_flight():
    cache = jnp.asarray(np.random.default_rng(1).standard_normal((60, 16, 1, 128), dtype=np.float32))
    sources, targets = jnp.arange(1, 24, dtype=jnp.int32), jnp.arange(30, 53, dtype=jnp.int32)
    copy = partial(run_checked, jax.jit(partial(block_copy, backend="tpu", interpret=CHECKED)))
    assert_same_bits(copy(cache, sources, targets), block_copy(cache, sources, targets, backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_gather_and_scatter(dtype: str):
    rng = np.random.default_rng(2)
    cache = pool_of(rng, dtype)
    ids = jnp.asarray([3, *OUTSIDE, 11, 1], jnp.int32)
    gather = jax.jit(partial(block_gather, backend="tpu", interpret=CHECKED))
    payload = run_checked(gather, cache, ids)
    assert_same_bits(payload, block_gather(cache, ids, backend="reference"))
    elsewhere = jnp.asarray([5, 1, 12, -7, 2, 9], jnp.int32)
    scatter = jax.jit(partial(block_scatter, backend="tpu", interpret=CHECKED))
    found = run_checked(scatter, cache, payload, elsewhere)
    assert_same_bits(found, block_scatter(cache, payload, elsewhere, backend="reference"))
