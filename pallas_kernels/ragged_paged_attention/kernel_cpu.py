"""Attention on a CPU: a call of the C++ kernel (kernel_cpu.cc)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention_cpu(
    q: jax.Array,
    cache: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    num_decode: jax.Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """`api.ragged_paged_attention`. The kernels must have been loaded (`native.build.load_kernels`)."""
    del num_decode  # a query of a decoding sequence is like any other
    call = jax.ffi.ffi_call("jaxserve_attention", jax.ShapeDtypeStruct(q.shape, q.dtype))
    none = jnp.zeros((0,), jnp.float32)
    return call(
        q,
        cache,
        block_tables,
        seq_lens,
        cu_q_lens,
        num_seqs,
        none if sinks is None else sinks,
        scale=float(scale),
        softcap=float(softcap or 0.0),
        window=window or 0,
    )
