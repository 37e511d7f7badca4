"""Writing keys and values as one scatter: the oracle of the kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def kv_write_reference(cache: jax.Array, rows: jax.Array, slots: jax.Array) -> jax.Array:
    """The cache [P, C, K, 2H] with rows [T, K, 2H] at their slots; slots outside of it are dropped."""
    num_blocks, block_size, *head = cache.shape
    num_slots = num_blocks * block_size
    slots = jnp.where(slots < 0, num_slots, slots)  # a negative index would count from the end
    return cache.reshape(num_slots, *head).at[slots].set(rows, mode="drop").reshape(cache.shape)
