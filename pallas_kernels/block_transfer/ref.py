"""Moving blocks out of the pool and in as a gather and a scatter: the oracle of the kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def block_gather_reference(cache: jax.Array, ids: jax.Array) -> jax.Array:
    """[n, C, K, 2H] the blocks of the cache [P, C, K, 2H]; zeros for ids from P on."""
    is_block = (ids < cache.shape[0])[:, None, None, None]
    return jnp.where(is_block, cache[jnp.minimum(ids, cache.shape[0] - 1)], jnp.zeros((), cache.dtype))


def block_scatter_reference(cache: jax.Array, payload: jax.Array, ids: jax.Array) -> jax.Array:
    """The cache [P, C, K, 2H] with payload [n, C, K, 2H] at its ids; ids from P on are dropped."""
    return cache.at[ids].set(payload, mode="drop")
