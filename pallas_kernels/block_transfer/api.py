"""The block transfer kernels' interface: checks its arguments, chooses the backend, calls it."""

from __future__ import annotations

import jax

from pallas_kernels.common import (
    Backend,
    Interpret,
    PoolShape,
    check_backend,
    check_ints,
    check_pool,
    past_pool_if_outside,
    require,
)


def block_gather(cache: jax.Array, ids: jax.Array, *, backend: Backend, interpret: Interpret = False) -> jax.Array:
    """[n, C, K, 2H] copies of blocks, one after another: what a swap sends to the host.

    Args:
        cache: [P, C, K, 2H] blocks.
        ids: i32[n] block ids; one below 0 or from P on is padding and gives zeros.
        backend: "tpu", "gpu" or "reference".
        interpret: run the kernel in the backend's interpreter, on a CPU.

    Raises:
        ValueError: shapes or dtypes do not fit each other, or no kernel covers them.
    """
    pool = _check(cache, ids, backend)
    ids = past_pool_if_outside(ids, pool.num_blocks)
    if backend == "reference":
        from pallas_kernels.block_transfer.ref import block_gather_reference

        return block_gather_reference(cache, ids)
    if backend == "tpu":
        from pallas_kernels.block_transfer.kernel_tpu import block_gather_tpu

        return block_gather_tpu(cache, ids, interpret=interpret)
    from pallas_kernels.block_transfer.kernel_gpu import block_gather_gpu

    return block_gather_gpu(cache, ids, interpret=interpret)


def block_scatter(
    cache: jax.Array, payload: jax.Array, ids: jax.Array, *, backend: Backend, interpret: Interpret = False
) -> jax.Array:
    """The pool with each block of the payload at its id: what a swap brings back.

    Args:
        cache: [P, C, K, 2H] blocks.
        payload: [n, C, K, 2H] as `block_gather` gave it.
        ids: i32[n] block ids; one below 0 or from P on drops its block; no other occurs twice.
        backend: "tpu", "gpu" or "reference".
        interpret: run the kernel in the backend's interpreter, on a CPU.

    Raises:
        ValueError: shapes or dtypes do not fit each other, or no kernel covers them.

    Donates: cache, where the caller does: the kernels write in place.
    """
    pool = _check(cache, ids, backend)
    expected = (ids.size, *cache.shape[1:])
    require(payload.shape == expected, f"payload has shape {payload.shape}: ids and cache ask for {expected}")
    require(payload.dtype == cache.dtype, f"payload is {payload.dtype}: the cache holds {cache.dtype}, so must it")
    ids = past_pool_if_outside(ids, pool.num_blocks)
    if backend == "reference":
        from pallas_kernels.block_transfer.ref import block_scatter_reference

        return block_scatter_reference(cache, payload, ids)
    if backend == "tpu":
        from pallas_kernels.block_transfer.kernel_tpu import block_scatter_tpu

        return block_scatter_tpu(cache, payload, ids, interpret=interpret)
    from pallas_kernels.block_transfer.kernel_gpu import block_scatter_gpu

    return block_scatter_gpu(cache, payload, ids, interpret=interpret)


def _check(cache: jax.Array, ids: jax.Array, backend: str) -> PoolShape:
    check_backend(backend)
    pool = check_pool(cache)
    require(ids.size >= 1, "ids is empty: one block at least, padded with ids past the pool")
    check_ints("ids", ids, (ids.size,))
    return pool
