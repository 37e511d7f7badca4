"""Whole blocks moved inside the cache, out of it and back, against plain numpy; padding touches nobody's block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.ops.blocks import copy_blocks, gather_blocks, scatter_blocks
from jaxserve.state import KVCache

LAYERS, BLOCKS, SHAPE = 3, 9, (4, 2, 6)


@pytest.fixture(params=["float32", "uint16"])
def content(request: Any) -> np.ndarray:
    """[L, P, C, K, 2H] any bits at all, NaNs of every payload among them; the null block is zero."""
    bits = np.random.default_rng(0).integers(0, 256, (LAYERS, BLOCKS, *SHAPE, 4), np.uint8)
    made = bits.view(np.uint32).view("float32")[..., 0] if request.param == "float32" else bits.view(np.uint16)[..., 0]
    made = made.copy()
    made[:, 0] = 0
    return made


@pytest.fixture(params=[1, LAYERS], ids=["an array a layer", "stacked"])
def cache_of(request: Any) -> Callable[[np.ndarray], KVCache]:
    """The cache with that content, its layers in as many arrays or all in one."""

    def make(content: np.ndarray) -> KVCache:
        arrays = content.reshape(-1, request.param * content.shape[1], *SHAPE)
        layers = tuple(jnp.array(array) for array in arrays)
        return KVCache(layers=layers, dtype="bfloat16", layers_per_array=request.param)

    return make


def same_bits(kv: KVCache, want: np.ndarray) -> bool:
    assert (kv.num_blocks, kv.block_shape) == (BLOCKS, (LAYERS, *SHAPE))
    return b"".join(np.asarray(got).tobytes() for got in kv.layers) == want.tobytes()


@pytest.mark.parametrize(
    "pairs",
    [
        [(3, 7)],
        [(1, 2), (2, 3), (3, 1)],  # all are read before any is written
        [(5, 1), (5, 2), (5, 8)],
        [],
    ],
    ids=str,
)
def test_copies_read_everything_first(content: np.ndarray, cache_of: Callable, pairs: list[tuple[int, int]]) -> None:
    padded = np.array(pairs + [(0, 0)] * (4 - len(pairs)), np.int32).T
    want = content.copy()
    for source, target in pairs:
        want[:, target] = content[:, source]
    kv = jax.jit(copy_blocks, donate_argnums=0)(cache_of(content), padded.reshape(-1))
    assert same_bits(kv, want)


def test_gathered_blocks_come_block_by_block(content: np.ndarray, cache_of: Callable) -> None:
    ids = np.array([6, 2, 8, 0], np.int32)
    payload = np.asarray(jax.jit(gather_blocks)(cache_of(content), ids))
    assert payload.shape == (4, LAYERS, *SHAPE)
    assert payload.tobytes() == content[:, ids].swapaxes(0, 1).tobytes()


def test_scattered_blocks_lie_where_they_should_and_padding_nowhere(content: np.ndarray, cache_of: Callable) -> None:
    payload = np.random.default_rng(1).integers(1, 99, (4, LAYERS, *SHAPE)).astype(content.dtype)
    ids = np.array([5, 1, BLOCKS, BLOCKS], np.int32)
    kv = jax.jit(scatter_blocks, donate_argnums=0)(cache_of(content), payload, ids)
    want = content.copy()
    want[:, 5], want[:, 1] = payload[0], payload[1]
    assert same_bits(kv, want)


def test_a_cache_that_is_donated_right_after_a_gather_is_read_before_it_is_written(
    content: np.ndarray, cache_of: Callable
) -> None:
    """A swap is begun and the step dispatched at once, without waiting for the gather."""
    gather: Callable = jax.jit(gather_blocks)
    copy: Callable = jax.jit(copy_blocks, donate_argnums=0)
    big = np.tile(content, (1, 400, 1, 1, 1))
    ids = np.arange(big.shape[1], dtype=np.int32)
    moved = np.stack([np.zeros_like(ids[1:]), ids[1:]]).reshape(-1)  # every block but one becomes zeros
    for _ in range(10):
        kv = cache_of(big)
        payload = gather(kv, ids)
        kv = copy(kv, moved)
        assert np.asarray(payload).tobytes() == big.swapaxes(0, 1).tobytes()
