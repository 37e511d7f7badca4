"""The GPU's kv write: each token's row, a unit, to its slot."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import require
from pallas_kernels.mosaic_gpu_move import move


def kv_write_gpu(cache: jax.Array, rows: jax.Array, slots: jax.Array, *, tiles: Any, interpret: Any) -> jax.Array:
    """`api.kv_write` of packed rows, whose checks have been made."""
    require(tiles is None, f"tiles is {tiles}: the GPU's kv write has none")
    num_slots = cache.shape[0] * cache.shape[1]
    slots = jnp.where((slots < 0) | (slots >= num_slots), num_slots, slots)
    tokens = jnp.arange(slots.size, dtype=jnp.int32)
    flat = cache.reshape(num_slots, -1)
    written = move(flat, rows.reshape(slots.size, -1), tokens, slots, interpret=interpret, name="kv_write")
    return written.reshape(cache.shape)
