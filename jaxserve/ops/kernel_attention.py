"""Attention of the token stream, and the write before it, by kernels in place of `paged_attention`."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.config import ModelConfig
from jaxserve.models.decoder import Heads
from jaxserve.state import StepBatch, StepShape
from pallas_kernels.kv_write.api import kv_write
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.rope_write.api import rope_write


class Sequences(NamedTuple):
    """The stream's sequences in its order, as the kernels take them; S of them at most.

    Attributes:
        tables: [S, M] blocks.
        seq_lens: [S] keys, this step's included; 0 past the last.
        cu_q_lens: [S + 1] where each one's tokens begin; from the last one's end on, that.
        num_seqs, num_decode: [1] how many there are, and how many at the beginning feed one token.
    """

    tables: Int[Array, "sequences blocks"]
    seq_lens: Int[Array, " sequences"]
    cu_q_lens: Int[Array, " boundaries"]
    num_seqs: Int[Array, "1"]
    num_decode: Int[Array, "1"]


def stream_sequences(block_tables: Int[Array, "rows blocks"], batch: StepBatch, shape: StepShape) -> Sequences:
    """What all layers share. A decode row that has ended in a loop stands there with one key of the null block."""
    index = jnp.arange(shape.num_tokens)
    decodes = index < batch.num_decode
    is_fed = decodes | (batch.rows < shape.max_rows)
    before = jnp.concatenate([jnp.full((1,), -1, batch.rows.dtype), batch.rows[:-1]])
    # A row has one chunk in a step, so that its tokens stand together.
    begins = decodes | (is_fed & ((index == batch.num_decode) | (batch.rows != before)))
    num_fed, num_seqs = jnp.sum(is_fed, dtype=jnp.int32), jnp.sum(begins, dtype=jnp.int32)
    starts = jnp.nonzero(begins, size=shape.num_samples, fill_value=num_fed)[0].astype(jnp.int32)
    ends = jnp.append(starts[1:], num_fed)
    rows = batch.rows[jnp.minimum(starts, shape.num_tokens - 1)]
    is_here = jnp.arange(shape.num_samples) < num_seqs
    tables = block_tables[jnp.minimum(rows, shape.max_rows - 1)]
    tables = jnp.where((is_here & (rows < shape.max_rows))[:, None], tables, 0)
    seq_lens = jnp.where(is_here, batch.positions[jnp.maximum(ends - 1, 0)] + 1, 0)
    return Sequences(tables, seq_lens, jnp.append(starts, num_fed), num_seqs[None], batch.num_decode[None])


def kernel_write(
    cache: Array,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    slots: Int[Array, " tokens"],
    shape: StepShape,
    *,
    first_block: Array | int = 0,
    num_blocks: int | None = None,
) -> Array:
    """What `write_kv` does, which serves a CPU's kernels: the cache [P, C, K, 2H] with each token's key and value.

    Args:
        first_block, num_blocks: of the layer, where the cache holds several; slots count from its first on.
    """
    assert shape.attention not in ("xla", "cpu")
    return kv_write(
        cache,
        k.astype(cache.dtype),
        v.astype(cache.dtype),
        slots,
        first_block=first_block,
        num_blocks=num_blocks,
        backend=shape.attention,
        interpret=shape.interpret_kernels,
    )


def kernel_attention(
    q: Float[Array, "tokens kv_heads groups head_dim"],
    cache: Array,
    sequences: Sequences,
    shape: StepShape,
    *,
    dtype: str,
    window: int | None,
) -> Float[Array, "tokens kv_heads groups head_dim"]:
    """What `paged_attention` computes. q is already scaled; it is rounded to the cache's dtype, as there."""
    assert shape.attention != "xla"
    flat = q.reshape(shape.num_tokens, -1, q.shape[-1]).astype(dtype)
    out = ragged_paged_attention(
        flat,
        cache,
        *sequences,
        scale=1.0,
        window=window,
        backend=shape.attention,
        interpret=shape.interpret_kernels,
    )
    return out.reshape(q.shape).astype(jnp.float32)


def attend_heads(
    heads: Heads,
    cache: Array,
    slots: Int[Array, " tokens"],
    num_tokens: Int[Array, "1"],
    sequences: Sequences,
    *,
    dtype: str,
    config: ModelConfig,
    window: int | None,
) -> tuple[Float[Array, "tokens kv_heads groups head_dim"], Array]:
    """A layer from its heads to attention's result, of the cache's dtype, and the cache: a CPU's two kernels.

    Args:
        num_tokens: how many of the stream are somebody's; what comes back of the others may be anything.
    """
    q, cache = rope_write(
        heads.qkv,
        *heads.tables,
        cache,
        slots,
        num_tokens,
        dtype=dtype,
        scale=config.head_dim**-0.5,
        eps=config.rms_norm_eps,
        bias=heads.layer.get("qkv_bias"),
        q_norm=heads.layer.get("q_norm"),
        k_norm=heads.layer.get("k_norm"),
    )
    flat = q.reshape(len(q), -1, config.head_dim)
    out = ragged_paged_attention(flat, cache, *sequences, scale=1.0, window=window, backend="cpu")
    return out.reshape(q.shape), cache
