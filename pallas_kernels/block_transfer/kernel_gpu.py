"""The GPU's block gather and scatter: between the pool and a payload that goes to the host or comes from it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu_move import move


def block_gather_gpu(cache: jax.Array, ids: jax.Array, *, interpret: Any) -> jax.Array:
    """`api.block_gather`, whose checks have been made."""
    num_blocks, count = cache.shape[0], ids.size
    places = jnp.where(ids < num_blocks, jnp.arange(count, dtype=jnp.int32), count)
    sources = jnp.minimum(ids, num_blocks - 1)
    flat = cache.reshape(num_blocks, -1)
    payload = jnp.zeros((count, flat.shape[1]), cache.dtype)
    return move(payload, flat, sources, places, interpret=interpret, name="block_gather").reshape(-1, *cache.shape[1:])


def block_scatter_gpu(cache: jax.Array, payload: jax.Array, ids: jax.Array, *, interpret: Any) -> jax.Array:
    """`api.block_scatter`, whose checks have been made."""
    count = ids.size
    flat = cache.reshape(cache.shape[0], -1)
    moved = move(
        flat,
        payload.reshape(count, -1),
        jnp.arange(count, dtype=jnp.int32),
        ids,
        interpret=interpret,
        name="block_scatter",
    )
    return moved.reshape(cache.shape)
