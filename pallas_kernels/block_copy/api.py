"""The block copy kernels' one interface: checks its arguments, chooses the backend, calls it."""

from __future__ import annotations

import jax

from pallas_kernels.common import (
    Backend,
    Interpret,
    check_backend,
    check_ints,
    check_pool,
    past_pool_if_outside,
    require,
)


def block_copy(
    cache: jax.Array, sources: jax.Array, targets: jax.Array, *, backend: Backend, interpret: Interpret = False
) -> jax.Array:
    """The pool with each target block as its source block was.

    Args:
        cache: [P, C, K, 2H] blocks.
        sources: i32[n] block ids, clamped into the pool.
        targets: i32[n] block ids. A pair whose target is below 0 or from P on is padding; no other target occurs
            twice or is a source.
        backend: "tpu", "gpu" or "reference".
        interpret: run the kernel in the backend's interpreter, on a CPU.

    Raises:
        ValueError: shapes or dtypes do not fit each other, or no kernel covers them.

    Donates: cache, where the caller does: the kernels write in place.
    """
    check_backend(backend)
    pool = check_pool(cache)
    require(sources.size >= 1, "sources is empty: one pair at least, padded with targets past the pool")
    check_ints("sources", sources, (sources.size,))
    check_ints("targets", targets, sources.shape)
    sources = sources.clip(0, pool.num_blocks - 1)
    targets = past_pool_if_outside(targets, pool.num_blocks)
    if backend == "reference":
        from pallas_kernels.block_copy.ref import block_copy_reference

        return block_copy_reference(cache, sources, targets)
    if backend == "tpu":
        from pallas_kernels.block_copy.kernel_tpu import block_copy_tpu

        return block_copy_tpu(cache, sources, targets, interpret=interpret)
    from pallas_kernels.block_copy.kernel_gpu import block_copy_gpu

    return block_copy_gpu(cache, sources, targets, interpret=interpret)
