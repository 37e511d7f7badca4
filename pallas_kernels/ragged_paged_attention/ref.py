"""Attention as its definition says, one query at a time, in float32: the oracle of the kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention_reference(
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
) -> jax.Array:
    """`api.ragged_paged_attention` without tiles, splits or running maxima."""
    del num_decode  # a query of a decoding sequence is like any other
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, _, num_kv_heads, _ = cache.shape
    last = block_tables.shape[0] - 1
    end_of_stream = cu_q_lens[num_seqs[0]]

    def attend(token: jax.Array) -> jax.Array:
        sequence = jnp.clip(jnp.searchsorted(cu_q_lens, token, side="right") - 1, 0, last)
        position = seq_lens[sequence] - (cu_q_lens[sequence + 1] - token)
        blocks = jnp.clip(block_tables[sequence], 0, num_blocks - 1)
        kv = cache[blocks].astype(jnp.float32).reshape(-1, num_kv_heads, 2 * head_dim)
        places = jnp.arange(kv.shape[0])
        seen = places <= position
        if window is not None:
            seen &= places > position - window
        kv = jnp.where(seen[:, None, None], kv, 0.0)  # 0 x NaN is NaN: what is not seen is no number at all
        keys = kv[..., :head_dim] * _as_float(k_scale)
        values = kv[..., head_dim:] * _as_float(v_scale)
        queries = q[token].astype(jnp.float32).reshape(num_kv_heads, -1, head_dim)
        scores = jnp.einsum("kgh,skh->kgs", queries, keys, precision="highest") * jnp.float32(scale)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(seen, scores, -jnp.inf)
        weights = _softmax(scores, sinks)
        out = jnp.einsum("kgs,skh->kgh", weights, values, precision="highest").reshape(num_heads, head_dim)
        return jnp.where(token < end_of_stream, out, 0.0).astype(q.dtype)

    return jax.lax.map(attend, jnp.arange(num_tokens, dtype=jnp.int32))


def _softmax(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Of scores [K, G, keys]; a sink [K * G] is one more score of each head, whose weight is left out."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sink = sinks.reshape(*scores.shape[:2], 1)
    return jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]


def _as_float(scale: jax.Array | float | None) -> jax.Array:
    return jnp.asarray(1.0 if scale is None else scale, jnp.float32)
