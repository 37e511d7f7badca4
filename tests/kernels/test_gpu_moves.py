"""The GPU kernels that move tokens and blocks, in Mosaic GPU's interpreter, against their references bit for bit."""

from __future__ import annotations

import itertools
import os
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu_move
from pallas_kernels.block_copy.api import block_copy
from pallas_kernels.block_transfer.api import block_gather, block_scatter
from pallas_kernels.gpu_generations import AMPERE, HOPPER, Generation
from pallas_kernels.kv_write.api import kv_write
from pallas_kernels.mosaic_gpu_move import BY_ENGINE, BY_THREADS, MAX_BOX, Way, cut
from tests.kernels.gpu_interpreter import compile_threads_once, forget_failures, params  # noqa: F401

CASES = int(os.environ.get("JAXSERVE_KERNEL_CASES", "50"))
OPERATIONS = {"kv_write": kv_write, "copy": block_copy, "gather": block_gather, "scatter": block_scatter}
NUM_BLOCKS, NUM_IDS = 14, 7
POOLS = {"bfloat16": (16, 1, 128), "float32": (16, 3, 128), "float8_e4m3fn": (32, 2, 128)}
TURNS = ["bfloat16-kv_write", "float32-copy", "bfloat16-gather", "float32-scatter", "float8_e4m3fn-kv_write"]


def one_cta(monkeypatch: pytest.MonkeyPatch, generation: Generation) -> None:
    """The interpreter runs 132 CTAs one after the other; with one, each warpgroup goes round its slots."""
    small = partial(mosaic_gpu_move.move, num_ctas=1, generation=generation)
    for kernel in ("kv_write", "block_copy", "block_transfer"):
        monkeypatch.setattr(f"pallas_kernels.{kernel}.kernel_gpu.move", small)


@cache
def program(operation: str, generation: Generation, **options: Any) -> Any:
    """Of one generation: as `one_cta` was called for when it is first run."""
    return jax.jit(partial(OPERATIONS[operation], backend="gpu", interpret=params(), **options))


def random_arguments(rng: np.random.Generator, operation: str, dtype: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A pool full of NaN here and there, ids inside and outside, none twice."""

    def floats(*shape: int) -> jax.Array:
        values = rng.standard_normal(shape, dtype=np.float32)
        values[rng.random(shape) < 0.1] = np.nan
        return jnp.asarray(values).astype(dtype)

    def some_of(count: int, size: int) -> np.ndarray:
        ids = rng.permutation(count)[:size].astype(np.int32)
        return np.where(rng.random(size) < 0.3, rng.choice([-5, -1, count, count + 9], size), ids)

    size, heads, width = POOLS[dtype]
    cache = floats(NUM_BLOCKS, size, heads, width)
    if operation == "kv_write":
        slots = some_of(NUM_BLOCKS * size, NUM_IDS)
        kv = [jnp.nan_to_num(floats(NUM_IDS, heads, width // 2)).astype(cache.dtype) for _ in "kv"]
        options: dict[str, Any] = {}
        if dtype.startswith("float8"):
            kv, options = [array.astype(jnp.float32) for array in kv], {"k_scale": 0.5, "v_scale": 2.0}
        return (cache, *kv, jnp.asarray(slots, jnp.int32)), options
    if operation == "copy":
        sources = rng.integers(0, NUM_BLOCKS // 2, NUM_IDS)
        targets = some_of(NUM_BLOCKS // 2, NUM_IDS)
        targets = np.where((targets >= 0) & (targets < NUM_BLOCKS // 2), targets + NUM_BLOCKS // 2, -1)
        return (cache, jnp.asarray(sources, jnp.int32), jnp.asarray(targets, jnp.int32)), {}
    ids = jnp.asarray(some_of(NUM_BLOCKS, NUM_IDS), jnp.int32)
    return ((cache, ids) if operation == "gather" else (cache, floats(NUM_IDS, size, heads, width), ids)), {}


@pytest.mark.parametrize("generation", [HOPPER, AMPERE], ids=["by the engine", "by threads"])
@pytest.mark.parametrize("turn", TURNS)
def test_random_cases(turn: str, generation: Generation, monkeypatch: pytest.MonkeyPatch):
    one_cta(monkeypatch, generation)
    dtype, operation = turn.split("-")
    rng = np.random.default_rng(TURNS.index(turn))
    for number in range(-(-CASES // (2 * len(TURNS)))):
        arguments, options = random_arguments(rng, operation, dtype)
        expected = OPERATIONS[operation](*arguments, backend="reference", **options)
        found = program(operation, generation, **options)(*arguments)
        np.testing.assert_array_equal(bits(found), bits(expected), f"case {number}")


def bits(array: jax.Array) -> np.ndarray:
    return np.asarray(array).view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("way", [BY_ENGINE, BY_THREADS], ids=["by the engine", "by threads"])
@pytest.mark.parametrize("block_size", [1, 16, 32, 64, 128])
@pytest.mark.parametrize("item_bytes", [1, 2, 4])
def test_a_unit_is_cut_into_boxes_that_the_copy_engine_takes(block_size: int, item_bytes: int, way: Way):
    """block_size 1 is a token. Few boxes: each at least an eighth of the largest there could be."""
    for num_kv_heads, head_dim in itertools.product((1, 2, 3, 5, 8, 32), (64, 128, 256)):
        elements = block_size * num_kv_heads * 2 * head_dim
        pieces = cut(elements, item_bytes, way)
        assert pieces.count * pieces.rows * pieces.columns == elements
        assert max(pieces.rows, pieces.columns) <= MAX_BOX
        piece = pieces.rows * pieces.columns * item_bytes
        assert piece <= way.piece_bytes
        assert piece % 128 == 0, "shared memory that the copy engine reads begins at multiples of 128 bytes"
        assert piece >= min(elements * item_bytes, way.piece_bytes) / 8


def test_the_gpu_kv_write_takes_no_tiles():
    rng = np.random.default_rng(0)
    arguments, _ = random_arguments(rng, "kv_write", "bfloat16")
    with pytest.raises(ValueError, match="tiles is 3: the GPU's kv write has none"):
        kv_write(*arguments, backend="gpu", interpret=True, tiles=3)
