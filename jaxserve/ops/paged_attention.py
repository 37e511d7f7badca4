"""Attention of a ragged token stream over paged keys and values, in plain XLA.

Correct on every backend. Online softmax over key tiles (Milakov & Gimelshein, arXiv:1805.02867;
FlashAttention, arXiv:2205.14135 §3.1), with dynamic trip counts, so that one program serves every
context length. Key tiles are anchored at absolute position 0: how a sequence was cut into chunks does
not move them. A tile that is wholly masked for a row leaves that row's bits as they were.

Tiles and groups of rows keep the gathered copy in the CPU's cache, 1,024 keys at once: `docs/architecture.md` has
the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxserve.layers.stable_sum import stable_map, stable_sum
from jaxserve.state import StepBatch, StepShape

Carry = tuple[jax.Array, jax.Array, jax.Array]  # highest score so far, sum of exp, weighted values
_GROUP_KEYS = 1024  # of a tile, of all rows of a group: their copy stays in the cache, and short rows wait for few long
# XLA:CPU sums a product of one row in another order than of more, and of bfloat16 one of two to six as well on some
# processors (jax 0.10.2's YNNPACK on a Xeon with AMX; of seven and more none in 108 combinations of sizes).
# Eight cost decode attention of 64 rows 3 to 45 % more than two, there.
_MIN_ROWS = {"float32": 2, "bfloat16": 8}
_FEW_QUERIES = 16  # so few share a copy of a tile that they use it as it is, keys beside values
# Where no context is that long, programs are spared the two forms for many keys: a tenth of the demo's compilation.
_LONG_CONTEXT = 4096
_MANY_TILES = 2  # of keys before a chunk: from here on two of its query tiles take less time together
_WIDE_PRODUCT = 16_384  # columns x keys of a product; XLA:CPU sums some larger ones in another order (65,536)
_COLUMNS = 64  # XLA:CPU's float32 product chooses its kernel, and order, by rows where columns are no multiple
_FLOOR = -1e30  # the running maximum before any key: finite, so that exp(-inf - floor) is 0 and not NaN


class DecodeOrder(NamedTuple):
    """Decoding rows by length, padded to whole groups.

    Attributes:
        order, inverse: which row of the stream is where, and back; None where one group holds all, as they are.
        lengths: [padded] keys; 0 of rows that do not decode.
        tables: [padded, M] blocks.
    """

    order: Int[Array, " padded"] | None
    inverse: Int[Array, " padded"] | None
    lengths: Int[Array, " padded"]
    tables: Int[Array, "padded blocks"]


def write_kv(
    cache: Array,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    slots: Int[Array, " tokens"],
    dtype: str,
    *,
    first_block: Array | int = 0,
    num_blocks: int | None = None,
) -> Array:
    """The cache [P, C, K, 2H] with each token's key and value at its slot (block * C + offset).

    A slot past the end drops its token (padding).

    Args:
        first_block, num_blocks: of the layer, where the cache holds several; slots count from its first on, and past
            its last is past the end.
    """
    num_all, block_size, *heads = cache.shape
    if num_blocks is not None:
        is_written = slots < num_blocks * block_size
        slots = jnp.where(is_written, slots + first_block * block_size, num_all * block_size)
    kv = jnp.concatenate([k, v], axis=-1).astype(dtype)
    if cache.dtype == jnp.uint16:
        kv = jax.lax.bitcast_convert_type(kv, jnp.uint16)
    flat = cache.reshape(num_all * block_size, *heads)
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
    order: DecodeOrder | None = None,
) -> Float[Array, "tokens kv_heads groups head_dim"]:
    """softmax(q k^T) v for every token over its own sequence up to itself. q is already scaled.

    Args:
        cache: [P, C, K, 2H] as `state.KVCache` stores it; holds this step's keys and values already.
        dtype: what the cache's bits mean.
        window: how many positions, itself included, a token looks back over; None for all.
        order: `decode_order`'s, which is the same in all layers.
    """
    order = decode_order(block_tables, batch, shape) if order is None else order
    out = _attend_decode(q[: shape.num_samples], cache, batch, order, shape, dtype, window)
    padded = jnp.zeros((shape.num_tokens + 2 * shape.q_tile, *q.shape[1:]), jnp.float32)
    padded = jax.lax.dynamic_update_slice(padded, out, (0, 0, 0, 0))
    # Decode outputs past num_decode are of prefill tokens and wrong; the tiles overwrite them.
    return _attend_prefill(q, padded, cache, block_tables, batch, shape, dtype, window)[: shape.num_tokens]


def _gather_tile(
    cache: Array, blocks: Int[Array, "batch blocks"], dtype: str, written: Bool[Array, "batch keys"] | None
) -> Float[Array, "batch kv_heads keys two_head_dim"]:
    """Keys and values side by side of the blocks of one tile, by head; zeros where nothing is written.

    Args:
        written: None where all are.

    Zeros because 0 x NaN of a stale block would be NaN. Each head's part of a block is one slice of the
    gather, so that the products need no transposed copy: 22 instead of 31 ms of processor time for six
    layers of 64 rows at context 200 in bfloat16, 30 instead of 37 in float32.
    """
    block_size, num_kv, width = cache.shape[1:]
    heads = jnp.arange(num_kv, dtype=blocks.dtype)[:, None]
    index = jnp.stack(jnp.broadcast_arrays(blocks[:, None, :], heads), axis=-1)  # [B, K, blocks, 2]
    kv = jax.lax.gather(
        cache,
        index,
        jax.lax.GatherDimensionNumbers(offset_dims=(3, 4), collapsed_slice_dims=(0, 2), start_index_map=(0, 2)),
        slice_sizes=(1, block_size, 1, width),
        mode="promise_in_bounds",
    )
    if kv.dtype != jnp.dtype(dtype):
        kv = jax.lax.bitcast_convert_type(kv, jnp.dtype(dtype))
    kv = kv.astype(_product_dtype(dtype)).reshape(*blocks.shape[:1], num_kv, -1, width)
    return kv if written is None else jnp.where(written[:, None, :, None], kv, jnp.zeros((), kv.dtype))


def _product_dtype(dtype: str) -> jnp.dtype:
    """What queries, keys, values and softmax weights are multiplied in; sums are float32.

    bfloat16 as it is: its products are twice as fast. float16 could overflow.
    """
    return jnp.dtype(dtype if dtype == "bfloat16" else "float32")


def decode_order(block_tables: Int[Array, "rows blocks"], batch: StepBatch, shape: StepShape) -> DecodeOrder:
    """What decoding rows share in all layers."""
    num_rows = shape.num_samples
    group = _decode_group(shape)
    pad = -num_rows % group
    is_decode = jnp.arange(num_rows) < batch.num_decode
    lengths = jnp.pad(jnp.where(is_decode, batch.positions[:num_rows] + 1, 0), (0, pad))
    rows = jnp.minimum(jnp.pad(batch.rows[:num_rows], (0, pad)), shape.max_rows - 1)
    if num_rows <= group:
        return DecodeOrder(None, None, lengths, block_tables[rows])
    order = jnp.argsort(lengths)  # rows that do not decode come first and are skipped by whole groups
    return DecodeOrder(order, jnp.argsort(order), lengths[order], block_tables[rows[order]])


def _decode_group(shape: StepShape) -> int:
    return min(max(_GROUP_KEYS // shape.kv_tile, 1), shape.num_samples)


def _attend_decode(
    q: jax.Array,
    cache: jax.Array,
    batch: StepBatch,
    order: DecodeOrder,
    shape: StepShape,
    dtype: str,
    window: int | None,
) -> jax.Array:
    """One query a row, in groups of rows of similar length, each group up to its own longest context."""
    group, num_rows, num_padded = _decode_group(shape), q.shape[0], len(order.lengths)
    if order.order is None:  # one group
        keys = order.lengths
        return _attend_tiles(q, keys[:, None] - 1, keys, cache, order.tables, shape, dtype, window)
    q = jnp.pad(q, ((0, num_padded - num_rows), (0, 0), (0, 0), (0, 0)))[order.order]

    def attend_group(index: jax.Array, out: jax.Array) -> jax.Array:
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, index * group, group)  # noqa: E731
        keys = part(order.lengths)
        acc = _attend_tiles(part(q), keys[:, None] - 1, keys, cache, part(order.tables), shape, dtype, window)
        return jax.lax.dynamic_update_slice_in_dim(out, acc, index * group, axis=0)

    first = (num_padded - batch.num_decode) // group
    out = jax.lax.fori_loop(first, num_padded // group, attend_group, jnp.zeros(q.shape, jnp.float32))
    return out[order.inverse][:num_rows]


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

    A partial tile also computes and writes rows past its end; the tile after it, or nobody, owns those. Two tiles of
    one chunk go together and read the keys once where there are many before them: a chunk of 256 takes an eighth less
    time at 1,792, a tenth more at 0. Tiles of twice the size would take half as long again for chunks of 100.
    """
    num_kv, num_groups, head_dim = q.shape[1:]
    q = jnp.pad(q, ((0, 2 * shape.q_tile), (0, 0), (0, 0), (0, 0)))  # so that slicing the last tiles does not clamp
    rows, positions = batch.rows[batch.tile_start], batch.positions[batch.tile_start]
    # A row has one chunk in a step: two tiles of the same row are of the same chunk.
    is_pair = (rows[:-1] == rows[1:]) & (jnp.arange(1, shape.num_tiles) < batch.num_tiles)
    is_pair = jnp.append(is_pair & (positions[:-1] >= _MANY_TILES * shape.kv_tile), False)

    def attend(num_queries: int, index: jax.Array, num_tokens: jax.Array, out: jax.Array) -> jax.Array:
        start = batch.tile_start[index]
        table = block_tables[jnp.minimum(batch.rows[start], shape.max_rows - 1)]
        first_position = batch.positions[start]
        positions = jnp.tile(first_position + jnp.arange(num_queries), num_groups)
        queries = jax.lax.dynamic_slice(q, (start, 0, 0, 0), (num_queries, num_kv, num_groups, head_dim))
        queries = queries.transpose(1, 2, 0, 3).reshape(1, num_kv, num_groups * num_queries, head_dim)
        keys = first_position + num_tokens
        acc = _attend_tiles(queries, positions[None], keys[None], cache, table[None], shape, dtype, window)
        acc = acc.reshape(num_kv, num_groups, num_queries, head_dim).transpose(2, 0, 1, 3)
        return jax.lax.dynamic_update_slice(out, acc, (start, 0, 0, 0))

    def attend_one(index: jax.Array, out: jax.Array) -> jax.Array:
        return attend(shape.q_tile, index, batch.tile_len[index], out)

    def attend_two(index: jax.Array, out: jax.Array) -> jax.Array:
        return attend(2 * shape.q_tile, index, batch.tile_len[index] + batch.tile_len[index + 1], out)

    if shape.num_tokens <= shape.q_tile or not _has_long_contexts(shape):
        return jax.lax.fori_loop(0, batch.num_tiles, attend_one, out)

    def attend_next(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, out = carry
        out = jax.lax.cond(is_pair[index], attend_two, attend_one, index, out)
        return index + jnp.where(is_pair[index], 2, 1), out

    return jax.lax.while_loop(lambda carry: carry[0] < batch.num_tiles, attend_next, (jnp.int32(0), out))[1]


def _attend_tiles(
    q: Float[Array, "batch kv_heads queries head_dim"],
    positions: Int[Array, "batch queries_or_one"],
    num_keys: Int[Array, " batch"],
    cache: Array,
    tables: Int[Array, "batch blocks"],
    shape: StepShape,
    dtype: str,
    window: int | None,
) -> Float[Array, "batch kv_heads queries head_dim"]:
    """Softmax attention of `queries` queries an entry over the entry's own keys [0, num_keys).

    A query's bits depend on nothing but itself and the keys up to it, whatever the sizes: the products
    have rows enough (XLA:CPU sums fewer in another order), contract the last axis of both or
    give a multiple of 64 columns, and the row sums are `stable_sum`'s.
    """
    num_entries, num_kv, num_queries, head_dim = q.shape
    blocks_per_tile = shape.kv_tile // shape.block_size
    kind = _product_dtype(dtype)
    extra = max(_MIN_ROWS[kind.name] - num_queries, 0)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, extra), (0, 0))).astype(kind)
    if positions.shape[1] > 1:
        positions = jnp.pad(positions, ((0, 0), (0, extra)), mode="edge")
    whole = num_queries <= _FEW_QUERIES and 2 * head_dim % _COLUMNS == 0
    whole = whole and 2 * head_dim * shape.kv_tile <= _WIDE_PRODUCT
    # 32 columns by 16 keys, float32: summed in another order than with the values' columns beside them (jax 0.12).
    whole = whole and (head_dim % _COLUMNS == 0 or shape.kv_tile % _COLUMNS == 0)
    if whole:  # twice the products cost less than a copy of keys without values and of values without keys
        q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, head_dim)))
    width = 2 * head_dim if whole else head_dim + -head_dim % _COLUMNS
    by_entry_and_head = ((0, 1), (0, 1))

    def take_tile(tile: jax.Array, carry: Carry, *, seen_by_all: bool = False) -> Carry:
        blocks = jax.lax.dynamic_slice(tables, (0, tile * blocks_per_tile), (num_entries, blocks_per_tile))
        key_positions = tile * shape.kv_tile + jnp.arange(shape.kv_tile)
        written = key_positions < num_keys[:, None]
        kv = _gather_tile(cache, blocks, dtype, None if seen_by_all else written)
        keys = kv if whole else kv[..., :head_dim]
        values = kv if whole else jnp.pad(kv[..., head_dim:], ((0, 0), (0, 0), (0, 0), (0, width - head_dim)))
        seen = _visible(key_positions, positions[..., None], window) & written[:, None, :]
        scores = jax.lax.dot_general(q, keys, (((3,), (3,)), by_entry_and_head), preferred_element_type=jnp.float32)
        scores = scores if seen_by_all else jnp.where(seen[:, None], scores, -jnp.inf)

        def weigh(p: jax.Array) -> jax.Array:
            dims = (((3,), (2,)), by_entry_and_head)
            return jax.lax.dot_general(p.astype(kind), values, dims, preferred_element_type=jnp.float32)

        return _fold_tile(carry, scores, weigh)

    first = jnp.int32(0)
    if window is not None:
        earliest = jnp.min(jnp.where(num_keys > 0, positions[:, 0], jnp.iinfo(jnp.int32).max))
        first = jnp.maximum(earliest - window + 1, 0) // shape.kv_tile
    last = -(-jnp.max(num_keys) // shape.kv_tile)
    carry = _begin((num_entries, num_kv, num_queries + extra), width)
    if num_queries > _FEW_QUERIES and window is None and _has_long_contexts(shape):
        # The tiles before the queries need no mask: a tenth less time.
        plain = jnp.min(positions) // shape.kv_tile
        carry = jax.lax.fori_loop(first, plain, partial(take_tile, seen_by_all=True), carry)
        first = plain
    acc = _finish(jax.lax.fori_loop(first, last, take_tile, carry))
    return acc[:, :, :num_queries, head_dim:] if whole else acc[:, :, :num_queries, :head_dim]


def _has_long_contexts(shape: StepShape) -> bool:
    return shape.max_blocks * shape.block_size >= _LONG_CONTEXT


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
    shrink = stable_map(jnp.exp, high - new_high)
    return new_high, total * shrink + stable_sum(p), acc * shrink[..., None] + weigh(p)


def _finish(carry: Carry) -> jax.Array:
    """The weighted values [..., H]; 0 for a query that saw no key (padding)."""
    _, total, acc = carry
    return acc / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]


def _visible(key_positions: Int[Array, "..."], positions: Int[Array, "..."], window: int | None) -> jax.Array:
    seen = key_positions <= positions
    return seen if window is None else seen & (key_positions > positions - window)
