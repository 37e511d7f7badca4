"""The kv write kernels' one interface: checks its arguments, packs the rows, chooses the backend, calls it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import (
    FLOAT_DTYPES,
    Backend,
    Interpret,
    as_scale,
    check_backend,
    check_ints,
    check_pool,
    check_scales,
    is_fp8,
    name_of_dtype,
    require,
)


def kv_write(
    cache: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    first_block: jax.Array | int = 0,
    num_blocks: int | None = None,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    tiles: Any = None,
    backend: Backend,
    interpret: Interpret = False,
) -> jax.Array:
    """The pool with each token's key and value at its slot.

    Args:
        cache: [P, C, K, 2H] blocks, a key beside its value.
        k, v: [T, K, H] of the step's tokens.
        slots: i32[T] block * C + offset. A slot below 0 or from P * C on drops its token; no other occurs twice.
        first_block, num_blocks: of the part of the pool that slots count in and tokens go to, such as one layer's where
            a pool holds several. What depends on the slots alone is then the same for each part: in a loop over them a
            compiler computes it once.
        k_scale, v_scale: what the stored keys and values of an fp8 pool are multiplied by when read.
        tiles: the backend's `Tiles`; None chooses by `tuning`. They do not change what is written.
        backend: "tpu", "gpu" or "reference".
        interpret: run the kernel in the backend's interpreter, on a CPU.

    Raises:
        ValueError: shapes or dtypes do not fit each other, or no kernel covers them.

    Donates: cache, where the caller does: the kernels write in place.
    """
    check_backend(backend)
    pool = check_pool(cache)
    check_scales(cache, k_scale, v_scale)
    expected = (slots.size, pool.num_kv_heads, pool.head_dim)
    for name, array in (("k", k), ("v", v)):
        require(array.shape == expected, f"{name} has shape {array.shape}: slots and cache ask for {expected}")
        fits = name_of_dtype(array.dtype) in FLOAT_DTYPES and (is_fp8(cache.dtype) or array.dtype == cache.dtype)
        wanted = " or ".join(FLOAT_DTYPES) if is_fp8(cache.dtype) else name_of_dtype(cache.dtype)
        require(fits, f"{name} is {array.dtype}: a cache of {cache.dtype} takes {wanted}")
    require(slots.size >= 1, "slots is empty: one token at least")
    check_ints("slots", slots, (slots.size,))
    rows = pack_rows(k, v, cache.dtype, k_scale, v_scale)
    first_slot = first_block * pool.block_size
    num_slots = (pool.num_blocks if num_blocks is None else num_blocks) * pool.block_size
    if backend == "tpu":
        from pallas_kernels.kv_write.kernel_tpu import kv_write_tpu

        return kv_write_tpu(cache, rows, slots, first_slot, num_slots, tiles=tiles, interpret=interpret)
    if num_blocks is not None:
        is_inside = (slots >= 0) & (slots < num_slots)
        slots = jnp.where(is_inside, slots + first_slot, pool.num_blocks * pool.block_size)
    if backend == "reference":
        from pallas_kernels.kv_write.ref import kv_write_reference

        return kv_write_reference(cache, rows, slots)
    from pallas_kernels.kv_write.kernel_gpu import kv_write_gpu

    return kv_write_gpu(cache, rows, slots, tiles=tiles, interpret=interpret)


def pack_rows(k: jax.Array, v: jax.Array, dtype: Any, k_scale: Any, v_scale: Any) -> jax.Array:
    """[T, K, 2H] as the pool stores it. What is past fp8's range is stored as its largest number, not as NaN."""
    if is_fp8(dtype):
        largest = float(jnp.finfo(dtype).max)
        k = jnp.clip(k.astype(jnp.float32) / as_scale(k_scale), -largest, largest)
        v = jnp.clip(v.astype(jnp.float32) / as_scale(v_scale), -largest, largest)
    return jnp.concatenate([k, v], axis=-1).astype(dtype)
