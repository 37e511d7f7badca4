"""Copies of blocks on a TPU: HBM to HBM by DMA, in place."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import Interpret, by_head, tpu_interpret
from pallas_kernels.copies_tpu import copy_all


def block_copy_tpu(
    cache: jax.Array, sources: jax.Array, targets: jax.Array, *, interpret: Interpret = False
) -> jax.Array:
    """`api.block_copy` of checked arguments: sources lie in the pool, targets in it or at P."""
    pool = by_head(cache)
    out = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={2: 0},
        interpret=tpu_interpret(interpret),
        name="block_copy",
    )(sources, targets, pool)
    return by_head(out)


def _kernel(sources: Any, targets: Any, pool: Any, out: Any, semaphore: Any) -> None:
    # i32[n] and i32[n] in scalar memory; the pool [P, K, C, 2H] in HBM twice: `out` is the same memory
    del pool

    def copy(i: Any) -> Any:
        return pltpu.make_async_copy(out.at[sources[i]], out.at[targets[i]], semaphore)

    copy_all(sources.shape[0], lambda i: targets[i] < out.shape[0], copy)
