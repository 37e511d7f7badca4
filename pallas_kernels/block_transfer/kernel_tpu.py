"""Blocks out of the pool and in, on a TPU: HBM to HBM by DMA, the pool in place."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import Interpret, by_head, tpu_interpret
from pallas_kernels.copies_tpu import copy_all

_ANYWHERE = pl.BlockSpec(memory_space=pltpu.HBM)


def block_gather_tpu(cache: jax.Array, ids: jax.Array, *, interpret: Interpret = False) -> jax.Array:
    """`api.block_gather` of checked arguments: ids lie in the pool or are P."""
    pool = by_head(cache)
    out = pl.pallas_call(
        _gather_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[_ANYWHERE],
            out_specs=_ANYWHERE,
            scratch_shapes=[pltpu.VMEM(pool.shape[1:], pool.dtype), pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct((ids.size, *pool.shape[1:]), pool.dtype),
        interpret=tpu_interpret(interpret),
        name="block_gather",
    )(ids, pool)
    return by_head(out)


def block_scatter_tpu(
    cache: jax.Array, payload: jax.Array, ids: jax.Array, *, interpret: Interpret = False
) -> jax.Array:
    """`api.block_scatter` of checked arguments: ids lie in the pool or are P."""
    pool = by_head(cache)
    out = pl.pallas_call(
        _scatter_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[_ANYWHERE, _ANYWHERE],
            out_specs=_ANYWHERE,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={2: 0},
        interpret=tpu_interpret(interpret),
        name="block_scatter",
    )(ids, by_head(payload), pool)
    return by_head(out)


def _gather_kernel(ids: Any, pool: Any, out: Any, zeros: Any, semaphore: Any) -> None:
    # i32[n] in scalar memory; [P, K, C, 2H] and [n, K, C, 2H] in HBM; one block in vector memory
    num_blocks = pool.shape[0]
    zeros[...] = jnp.zeros_like(zeros)

    def copy(i: Any) -> Any:
        return pltpu.make_async_copy(pool.at[lax.min(ids[i], num_blocks - 1)], out.at[i], semaphore)

    copy_all(ids.shape[0], lambda i: ids[i] < num_blocks, copy)
    copy_all(ids.shape[0], lambda i: ids[i] >= num_blocks, lambda i: pltpu.make_async_copy(zeros, out.at[i], semaphore))


def _scatter_kernel(ids: Any, payload: Any, pool: Any, out: Any, semaphore: Any) -> None:
    # i32[n] in scalar memory; [n, K, C, 2H] in HBM; the pool twice: `out` is the same memory
    del pool
    num_blocks = out.shape[0]

    def copy(i: Any) -> Any:
        return pltpu.make_async_copy(payload.at[i], out.at[lax.min(ids[i], num_blocks - 1)], semaphore)

    copy_all(ids.shape[0], lambda i: ids[i] < num_blocks, copy)
