"""Attention of a ragged token stream over paged keys and values, in plain XLA.

Correct on every backend. Online softmax over key tiles (Milakov & Gimelshein, arXiv:1805.02867;
FlashAttention, arXiv:2205.14135 §3.1), with dynamic trip counts, so that one program serves every
context length. Key tiles are anchored at absolute position 0: how a sequence was cut into chunks does
not move them. A tile that is wholly masked for a row leaves that row's bits as they were.

Tiles of 64 keys keep the gathered copy in the CPU's cache: one decode step's attention of 64 rows at
context 224 (3 kv heads, 9 query heads, head_dim 64, float32, two cores) took 2.2 ms with tiles of 64,
8.6 ms with 128 and 27 ms over the whole context at once.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.state import StepBatch, StepShape

Carry = tuple[jax.Array, jax.Array, jax.Array]  # highest score so far, sum of exp, weighted values
_DECODE_GROUP = 8  # rows; as fast a row as 64 at once, and short contexts do not wait for long ones
_FLOOR = -1e30  # the running maximum before any key: finite, so that exp(-inf - floor) is 0 and not NaN


def write_kv(
    cache: Array,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    slots: Int[Array, " tokens"],
    dtype: str,
) -> Array:
    """The cache [P, C, K, 2H] with each token's key and value at its slot (block * C + offset).

    A slot past the end drops its token (padding).
    """
    num_blocks, block_size, *heads = cache.shape
    kv = jnp.concatenate([k, v], axis=-1).astype(dtype)
    if cache.dtype == jnp.uint16:
        kv = jax.lax.bitcast_convert_type(kv, jnp.uint16)
    flat = cache.reshape(num_blocks * block_size, *heads)
    return flat.at[slots].set(kv, mode="drop", unique_indices=False).reshape(cache.shape)


def paged_attention(
    q: Float[Array, "tokens kv_heads groups head_dim"],
    cache: Array,
    block_tables: Int[Array, "rows blocks"],
    batch: StepBatch,
    shape: StepShape,
    *,
    dtype: str,
    window: int | None,
) -> Float[Array, "tokens kv_heads groups head_dim"]:
    """softmax(q k^T) v for every token over its own sequence up to itself. q is already scaled.

    Args:
        cache: [P, C, K, 2H] as `state.KVCache` stores it; holds this step's keys and values already.
        dtype: what the cache's bits mean.
        window: how many positions, itself included, a token looks back over; None for all.
    """
    out = _attend_decode(q[: shape.num_samples], cache, block_tables, batch, shape, dtype, window)
    padded = jnp.zeros((shape.num_tokens + shape.q_tile, *q.shape[1:]), jnp.float32)
    padded = jax.lax.dynamic_update_slice(padded, out, (0, 0, 0, 0))
    # Decode outputs past num_decode are of prefill tokens and wrong; the tiles overwrite them.
    return _attend_prefill(q, padded, cache, block_tables, batch, shape, dtype, window)[: shape.num_tokens]


def _gather_tile(
    cache: Array, blocks: Int[Array, "... blocks"], dtype: str
) -> tuple[Float[Array, "... keys kv_heads head_dim"], Float[Array, "... keys kv_heads head_dim"]]:
    """Keys and values, float32, of the blocks of one tile."""
    kv = cache[blocks]
    if kv.dtype != jnp.dtype(dtype):
        kv = jax.lax.bitcast_convert_type(kv, jnp.dtype(dtype))
    kv = kv.astype(jnp.float32).reshape(*blocks.shape[:-1], -1, *cache.shape[2:])
    return tuple(jnp.split(kv, 2, axis=-1))  # type: ignore[return-value]


def _attend_decode(
    q: jax.Array,
    cache: jax.Array,
    block_tables: jax.Array,
    batch: StepBatch,
    shape: StepShape,
    dtype: str,
    window: int | None,
) -> jax.Array:
    """One query a row, in groups of 8 rows of similar length, each group up to its own longest context."""
    num_rows = q.shape[0]
    group = min(_DECODE_GROUP, num_rows)
    pad = -num_rows % group
    is_decode = jnp.arange(num_rows) < batch.num_decode
    lengths = jnp.pad(jnp.where(is_decode, batch.positions[:num_rows] + 1, 0), (0, pad))
    order = jnp.argsort(lengths)  # rows that do not decode come first and are skipped by whole groups
    rows = jnp.minimum(jnp.pad(batch.rows[:num_rows], (0, pad)), shape.max_rows - 1)[order]
    q, lengths = jnp.pad(q, ((0, pad), (0, 0), (0, 0), (0, 0)))[order], lengths[order]
    tables = block_tables[rows]

    def attend_group(index: jax.Array, out: jax.Array) -> jax.Array:
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, index * group, group)  # noqa: E731
        acc = _attend_group(part(q), cache, part(tables), part(lengths), shape, dtype, window)
        return jax.lax.dynamic_update_slice_in_dim(out, acc, index * group, axis=0)

    num_groups = (num_rows + pad) // group
    first = (num_rows + pad - batch.num_decode) // group
    out = jax.lax.fori_loop(first, num_groups, attend_group, jnp.zeros(q.shape, jnp.float32))
    return out[jnp.argsort(order)][:num_rows]


def _attend_group(
    q: jax.Array,
    cache: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    shape: StepShape,
    dtype: str,
    window: int | None,
) -> jax.Array:
    """Softmax attention [B, K, G, H] of the last position of each row. Length 0: not a decode row."""
    num_rows, num_kv, num_groups, head_dim = q.shape
    blocks_per_tile = shape.kv_tile // shape.block_size
    positions = lengths - 1

    def body(tile: jax.Array, carry: Carry) -> Carry:
        blocks = jax.lax.dynamic_slice(tables, (0, tile * blocks_per_tile), (num_rows, blocks_per_tile))
        k, v = _gather_tile(cache, blocks, dtype)
        key_positions = tile * shape.kv_tile + jnp.arange(shape.kv_tile)
        seen = _visible(key_positions[None, :], positions[:, None], window)
        scores = jnp.einsum("bkgh,bskh->bkgs", q, k)
        scores = jnp.where(seen[:, None, None, :], scores, -jnp.inf)
        v = jnp.where(seen[:, :, None, None], v, 0.0)  # 0 x NaN of a stale block would be NaN
        return _fold_tile(carry, scores, lambda p: jnp.einsum("bkgs,bskh->bkgh", p, v))

    first = jnp.int32(0)
    if window is not None:
        shortest = jnp.min(jnp.where(lengths > 0, lengths, jnp.iinfo(jnp.int32).max))
        first = jnp.maximum(shortest - window, 0) // shape.kv_tile
    last = -(-jnp.max(lengths) // shape.kv_tile)
    return _finish(jax.lax.fori_loop(first, last, body, _begin((num_rows, num_kv, num_groups), head_dim)))


def _attend_prefill(
    q: jax.Array,
    out: jax.Array,
    cache: jax.Array,
    block_tables: jax.Array,
    batch: StepBatch,
    shape: StepShape,
    dtype: str,
    window: int | None,
) -> jax.Array:
    """Query tiles of the chunks in stream order, each over its row's key tiles; writes into `out`.

    A partial tile also computes and writes rows past its end; the tile after it, or nobody, owns those.
    """
    num_kv, num_groups, head_dim = q.shape[1:]
    q_tile, kv_tile = shape.q_tile, shape.kv_tile
    blocks_per_tile = kv_tile // shape.block_size
    heads = (num_kv, num_groups, q_tile)
    q = jnp.pad(q, ((0, q_tile), (0, 0), (0, 0), (0, 0)))  # so that slicing the last tile does not clamp

    def attend_tile(index: jax.Array, out: jax.Array) -> jax.Array:
        start = batch.tile_start[index]
        table = block_tables[jnp.minimum(batch.rows[start], shape.max_rows - 1)]
        first_position = batch.positions[start]
        positions = first_position + jnp.arange(q_tile)
        queries = jax.lax.dynamic_slice(q, (start, 0, 0, 0), (q_tile, num_kv, num_groups, head_dim))
        queries = queries.transpose(1, 2, 0, 3).reshape(num_kv, num_groups * q_tile, head_dim)

        def body(tile: jax.Array, carry: Carry) -> Carry:
            blocks = jax.lax.dynamic_slice(table, (tile * blocks_per_tile,), (blocks_per_tile,))
            k, v = _gather_tile(cache, blocks, dtype)
            key_positions = tile * kv_tile + jnp.arange(kv_tile)
            seen = _visible(key_positions[None, :], positions[:, None], window)
            written = key_positions < first_position + batch.tile_len[index]
            scores = jnp.einsum("kqh,khs->kqs", queries, k.transpose(1, 2, 0))
            scores = scores.reshape(num_kv, num_groups, q_tile, kv_tile)
            scores = jnp.where(seen & written[None, :], scores, -jnp.inf)
            v = jnp.where(written[:, None, None], v, 0.0).transpose(1, 0, 2)
            return _fold_tile(
                carry,
                scores,
                lambda p: jnp.einsum("kqs,ksh->kqh", p.reshape(num_kv, -1, kv_tile), v).reshape((*heads, head_dim)),
            )

        first = jnp.int32(0)
        if window is not None:
            first = jnp.maximum(first_position - window + 1, 0) // kv_tile
        last = -(-(first_position + batch.tile_len[index]) // kv_tile)
        acc = _finish(jax.lax.fori_loop(first, last, body, _begin(heads, head_dim)))
        return jax.lax.dynamic_update_slice(out, acc.transpose(2, 0, 1, 3), (start, 0, 0, 0))

    return jax.lax.fori_loop(0, batch.num_tiles, attend_tile, out)


def _begin(heads: tuple[int, ...], head_dim: int) -> Carry:
    return jnp.full(heads, _FLOOR), jnp.zeros(heads), jnp.zeros((*heads, head_dim))


def _fold_tile(carry: Carry, scores: jax.Array, weigh: Callable[[jax.Array], jax.Array]) -> Carry:
    """Takes one more tile of keys in.

    Args:
        scores: [..., keys], -inf where a key may not be seen.
        weigh: p [..., keys] -> the tile's values weighted by p, [..., H].
    """
    high, total, acc = carry
    new_high = jnp.maximum(high, scores.max(-1))
    p = jnp.exp(scores - new_high[..., None])
    shrink = jnp.exp(high - new_high)
    return new_high, total * shrink + p.sum(-1), acc * shrink[..., None] + weigh(p)


def _finish(carry: Carry) -> jax.Array:
    """The weighted values [..., H]; 0 for a query that saw no key (padding)."""
    _, total, acc = carry
    return acc / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]


def _visible(key_positions: Int[Array, "..."], positions: Int[Array, "..."], window: int | None) -> jax.Array:
    seen = key_positions <= positions
    return seen if window is None else seen & (key_positions > positions - window)
