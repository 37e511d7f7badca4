"""The attention kernels' one interface: checks its arguments, chooses the backend, calls it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import (
    FLOAT_DTYPES,
    MAX_QUERIES_PER_KV_HEAD,
    Backend,
    Interpret,
    check_backend,
    check_ints,
    check_pool,
    check_scales,
    held_dtype,
    is_fp8,
    name_of_dtype,
    require,
    uncovered_pool,
)
from pallas_kernels.ragged_paged_attention.ref import attention_reference


def ragged_paged_attention(
    q: jax.Array,
    cache: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    num_decode: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    tiles: Any = None,
    backend: Backend,
    interpret: Interpret = False,
) -> jax.Array:
    """softmax(scale q k^T) v of every query over its own sequence: at position p, keys max(0, p - window + 1) ... p.

    Whatever lies past a sequence's length may be NaN. A query's bits depend on its own sequence and on `tiles` alone:
    not on its neighbours, how the sequence was cut into chunks, where its blocks lie, or the tables' width.

    Args:
        q: [T, N, H] queries, one sequence after another. Of the N = K * G heads, head n reads kv head n // G.
        cache: [P, C, K, 2H] blocks, a key beside its value, this step's as well. On a CPU uint16 are bfloat16's bits.
        block_tables: i32[S, M] blocks of each sequence, in the stream's order, padded with 0 (any id is safe).
        seq_lens: i32[S] keys of each sequence. Its last query stands at position seq_len - 1.
        cu_q_lens: i32[S + 1] where in the stream each sequence's queries begin, and, after the last, where it ends.
        num_seqs, num_decode: i32[1] how many of the S sequences there are, and how many of the first have one query.
        scale: what q k^T is multiplied by.
        window: how many positions, its own included, a query looks back over; None for all.
        softcap: scores become softcap * tanh(score / softcap), before the mask (Gemma 2, arXiv:2408.00118 §2).
        sinks: f32[N] a score per head that takes part in the softmax's sum and has no value (arXiv:2309.17453 §3.2).
        k_scale, v_scale: what the stored keys and values of an fp8 pool are multiplied by.
        tiles: the backend's `Tiles`; None chooses by `tuning`. They decide the order of sums, so the bits. CPU: none.
        backend: "tpu", "gpu", "cpu" (after `native.build.load_kernels`) or "reference".
        interpret: run the kernel of a TPU or GPU in its interpreter, on a CPU.

    Returns:
        [T, N, H] of q's dtype; zeros past the last sequence's last query, where "cpu" writes nothing.

    Raises:
        ValueError: shapes or dtypes do not fit each other, or no kernel covers them; `uncovered` tells beforehand.

    Static: everything after `num_decode`, but for sinks, k_scale and v_scale.
    Source: FlashAttention-2 (arXiv:2307.08691 §3.1), Flash-Decoding's split over keys, PagedAttention
        (arXiv:2309.06180 §4.1); one ragged call for both kinds of sequence: arXiv:2604.15464.
    """
    check_backend(backend, has_cpu=True)
    _check_arrays(q, cache, block_tables, seq_lens, cu_q_lens, num_seqs, num_decode, backend)
    check_scales(cache, k_scale, v_scale)
    _check_options(q, scale, window, softcap, sinks)
    arguments = (q, cache, block_tables, seq_lens, cu_q_lens, num_seqs, num_decode)
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    if backend == "cpu":
        from pallas_kernels.ragged_paged_attention.kernel_cpu import attention_cpu

        return attention_cpu(*arguments, **options)
    options |= {"k_scale": k_scale, "v_scale": v_scale}
    if backend == "reference":
        return attention_reference(*arguments, **options)
    if backend == "tpu":
        from pallas_kernels.ragged_paged_attention.kernel_tpu import attention_tpu

        return attention_tpu(*arguments, **options, tiles=tiles, interpret=interpret)
    from pallas_kernels.ragged_paged_attention.kernel_gpu import attention_gpu

    return attention_gpu(*arguments, **options, tiles=tiles, interpret=interpret)


def uncovered(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: Any,
    kv_dtype: Any,
    backend: Backend = "reference",
    table_shape: tuple[int, int] = (1, 1),
) -> str | None:
    """Why the kernels do not cover a model of these sizes, as a sentence; None if they do.

    Args:
        num_heads, num_kv_heads: of one device.
        dtype: the queries'.
        kv_dtype: the pool's.
        backend: whose own limits count too.
        table_shape: of the block tables, (sequences, blocks).
    """
    if backend == "tpu":
        from pallas_kernels.ragged_paged_attention.tuning import tables_past_scalar_memory

        reason = tables_past_scalar_memory(*table_shape)
        if reason is not None:
            return reason
    reason = uncovered_pool(block_size, head_dim, kv_dtype, backend)
    if reason is not None:
        return reason
    if num_heads % num_kv_heads:
        return f"{num_heads} query heads over {num_kv_heads} kv heads: the first must be a multiple of the second"
    if backend != "cpu" and num_heads // num_kv_heads > MAX_QUERIES_PER_KV_HEAD:
        found = num_heads // num_kv_heads
        return f"{found} query heads share a kv head: the kernels have at most {MAX_QUERIES_PER_KV_HEAD}"
    if name_of_dtype(dtype) not in FLOAT_DTYPES:
        return f"queries are {name_of_dtype(dtype)}: the kernels have {', '.join(FLOAT_DTYPES)}"
    if not is_fp8(kv_dtype) and name_of_dtype(kv_dtype) != name_of_dtype(dtype):
        names = f"{name_of_dtype(dtype)}, the cache {name_of_dtype(kv_dtype)}"
        return f"queries are {names}: they must be the same, or the cache one of the fp8 types"
    return None


def _check_arrays(
    q: jax.Array,
    cache: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    num_decode: jax.Array,
    backend: Backend,
) -> None:
    require(q.ndim == 3, f"q has shape {q.shape}: it must be [tokens, heads, head_dim]")
    pool = check_pool(cache, backend)
    num_tokens, num_heads, head_dim = q.shape
    require(num_tokens >= 1, "q holds no token: one at least")
    found = f"q's head_dim is {head_dim}, the cache's {pool.head_dim}"
    require(head_dim == pool.head_dim, f"{found}: the cache's last axis is a key and a value, 2 * head_dim")
    reason = uncovered(
        num_heads=num_heads,
        num_kv_heads=pool.num_kv_heads,
        head_dim=head_dim,
        block_size=pool.block_size,
        dtype=q.dtype,
        kv_dtype=held_dtype(cache, backend),
        backend="cpu" if backend == "cpu" else "reference",
    )
    require(reason is None, str(reason))
    require(block_tables.ndim == 2, f"block_tables has shape {block_tables.shape}: it must be [sequences, blocks]")
    num_rows = block_tables.shape[0]
    require(min(block_tables.shape) >= 1, f"block_tables has shape {block_tables.shape}: no axis may be empty")
    check_ints("block_tables", block_tables, block_tables.shape)
    check_ints("seq_lens", seq_lens, (num_rows,))
    check_ints("cu_q_lens", cu_q_lens, (num_rows + 1,))
    check_ints("num_seqs", num_seqs, (1,))
    check_ints("num_decode", num_decode, (1,))


def _check_options(
    q: jax.Array, scale: float, window: int | None, softcap: float | None, sinks: jax.Array | None
) -> None:
    require(math.isfinite(scale), f"scale is {scale}: it must be finite")
    require(window is None or window >= 1, f"window is {window}: 1 at least, the query's own position; None for all")
    fits = softcap is None or (math.isfinite(softcap) and softcap > 0)
    require(fits, f"softcap is {softcap}: it must be above 0 and finite; None for no cap")
    if sinks is not None:
        heads = (q.shape[1],)
        fits = sinks.shape == heads and sinks.dtype == jnp.float32
        require(fits, f"sinks is {sinks.dtype}{list(sinks.shape)}: it must be float32{list(heads)}, one a query head")
