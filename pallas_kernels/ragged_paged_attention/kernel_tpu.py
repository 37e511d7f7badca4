"""Attention over a paged pool on a TPU: one kernel, called for decode rows and for chunks.

A grid step has a tile of queries: of one decoding sequence, or `q_tile` tokens of the stream, whoever's they are. For
each sequence in the tile it folds the sequence's keys, tile by tile from position 0, into an online softmax. Blocks
come by DMA into one of two buffers while the other is folded; the first fetch of the next sequence, or of the next
grid step, is under way before the last fold of this one.

    pool in HBM   [P, K, C, 2H]         a head's part of a block is whole tiles
    buffers       [2, K, B, C, 2H]      B blocks = one kv_tile; a head's tile is [B * C, 2H] without moving anything
    rows          [K, M, H]             M = tokens x rows a token: the group's heads (chunks), or 8 or 16 (decode)

Bits: a row's state changes by its own row of each product and by what is elementwise; a tile that a row may not see
multiplies its state by one and adds zero. So a token's bits are those of its sequence and of `kv_tile`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import Interpret, as_scale, by_head, require, tpu_interpret
from pallas_kernels.ragged_paged_attention.tuning import Tiles, tiles_for

_LANES = 128
_FLOOR = -1e30  # the running maximum before any key: finite, so that exp(-inf - floor) is 0 and not NaN
_SMEM_BYTES = 768 * 1024  # of a core's 1 MiB of scalar memory, for block tables and lengths


class Config(NamedTuple):
    """What is static in a call.

    Attributes:
        q_tile: tokens of a tile of queries.
        token_rows: rows of a token in it.
        table_width: blocks a sequence's table has.
        head_dim: H.
    """

    q_tile: int
    token_rows: int
    table_width: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    has_sinks: bool
    tiles: Tiles


class Scalars(NamedTuple):
    """Refs in scalar memory."""

    begins: Any  # i32[tiles + 1] first sequence of a tile of queries
    ends: Any  # i32[tiles + 1] and the one after its last; not after `begins` where the tile has none
    first_tile: Any  # i32[1] the first tile that has a sequence
    tables: Any  # i32[S * M]
    seq_lens: Any  # i32[S]
    cu_q_lens: Any  # i32[S + 1]
    kv_scales: Any  # f32[2] of keys and of values


class Work(NamedTuple):
    """One fetch: the keys of one tile for the queries of one sequence in one tile."""

    tile: Any
    sequence: Any
    kv_tile: Any


class Keys(NamedTuple):
    """What the queries of one sequence in one tile look at.

    Attributes:
        limit: one more than the last position.
        first_tile, end_tile: the tiles of keys.
    """

    limit: Any
    first_tile: Any
    end_tile: Any


def attention_tpu(
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
    tiles: Tiles | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """`api.ragged_paged_attention` of checked arguments.

    Raises:
        ValueError: tiles do not fit the pool, or the block tables do not fit scalar memory.
    """
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = cache.shape[1:3]
    group = num_heads // num_kv_heads
    if tiles is None:
        sizes = {"num_kv_heads": num_kv_heads, "group": group, "head_dim": head_dim, "block_size": block_size}
        tiles = tiles_for(None, **sizes, kv_itemsize=cache.dtype.itemsize)
    tiles.check(block_size)
    num_rows, table_width = block_tables.shape
    wanted = 4 * num_rows * table_width
    message = f"block_tables of {num_rows} x {table_width} take {wanted} bytes of scalar memory, which has room for "
    require(wanted <= _SMEM_BYTES, message + f"{_SMEM_BYTES}: use larger blocks, fewer rows or shorter contexts")

    config = Config(1, 8 if group <= 8 else 16, table_width, head_dim, scale, window, softcap, sinks is not None, tiles)
    of_sequences = (block_tables.reshape(-1), seq_lens, cu_q_lens)
    kv_scales = jnp.concatenate([as_scale(k_scale), as_scale(v_scale)])
    call = partial(_attend_tiles, by_head(cache), of_sequences, kv_scales, sinks, interpret=interpret)

    most = min(num_rows, num_tokens)
    each = jnp.arange(most, dtype=jnp.int32)
    decoded = call(q[:most], each, jnp.where(each < num_decode, each + 1, 0), config=config)
    config = config._replace(q_tile=tiles.q_tile, token_rows=group)
    out = call(q, *_sequences_of_tiles(num_tokens, cu_q_lens, num_seqs, num_decode, tiles.q_tile), config=config)
    is_decode = (each < num_decode)[:, None, None]
    return out.at[:most].set(jnp.where(is_decode, decoded, out[:most]))


def _sequences_of_tiles(
    num_tokens: int, cu_q_lens: jax.Array, num_seqs: jax.Array, num_decode: jax.Array, q_tile: int
) -> tuple[jax.Array, jax.Array]:
    """i32[tiles] twice: from which sequence, to before which, each tile of the stream has chunks."""
    starts = jnp.arange(pl.cdiv(num_tokens, q_tile), dtype=jnp.int32) * q_tile
    begins = jnp.searchsorted(cu_q_lens, starts, side="right").astype(jnp.int32) - 1
    ends = jnp.searchsorted(cu_q_lens, starts + q_tile, side="left").astype(jnp.int32)
    return jnp.maximum(begins, num_decode), jnp.minimum(ends, num_seqs)


def _attend_tiles(
    pool: jax.Array,
    of_sequences: tuple[jax.Array, jax.Array, jax.Array],
    kv_scales: jax.Array,
    sinks: jax.Array | None,
    q: jax.Array,
    begins: jax.Array,
    ends: jax.Array,
    *,
    config: Config,
    interpret: Interpret,
) -> jax.Array:
    """One call of the kernel: [tokens, N, H] of q [tokens, N, H]."""
    num_kv_heads, block_size, width = pool.shape[1:]
    tiles, num_tiles = config.tiles, begins.size
    rows = config.q_tile * config.token_rows
    key_width, value_width = _widths(config.head_dim)
    begins, ends = jnp.pad(begins, (0, 1)), jnp.pad(ends, (0, 1))
    first = jnp.argmax(begins < ends).astype(jnp.int32)[None]
    scalars = Scalars(begins, ends, first, *of_sequences, kv_scales)
    inputs, in_specs = [_to_rows(q, num_tiles, num_kv_heads, config)], [_tile_spec(num_kv_heads, rows, key_width)]
    if sinks is not None:
        inputs.append(_sink_rows(sinks, num_kv_heads, config))
        in_specs.append(pl.BlockSpec((num_kv_heads, rows, _LANES), lambda i, *_: (0, 0, 0)))
    state = pltpu.VMEM((num_kv_heads, rows, _LANES), jnp.float32)
    out = pl.pallas_call(
        partial(_kernel, config=config),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(num_tiles,),
            in_specs=[*in_specs, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=_tile_spec(num_kv_heads, rows, value_width),
            scratch_shapes=[
                pltpu.VMEM((2, num_kv_heads, tiles.kv_tile // block_size, block_size, width), pool.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                state,
                state,
                pltpu.VMEM((num_kv_heads, rows, value_width), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((num_tiles, num_kv_heads, rows, value_width), q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=tiles.vmem_limit_mib << 20
        ),
        interpret=tpu_interpret(interpret),
        name=f"ragged_paged_attention_{'decode' if config.q_tile == 1 else 'chunk'}",
    )(*scalars, *inputs, pool)
    return _from_rows(out, q.shape, config)


def _widths(head_dim: int) -> tuple[int, int]:
    """Columns of queries and of outputs. Heads of 64 are multiplied with key and value side by side, in one row of
    lanes: queries have zeros where the values lie, and outputs are read where the values were."""
    return (2 * head_dim, 2 * head_dim) if head_dim < _LANES else (head_dim, head_dim)


def _to_rows(q: jax.Array, num_tiles: int, num_kv_heads: int, config: Config) -> jax.Array:
    """[tiles, K, M, columns] of q [tokens, N, H]."""
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // num_kv_heads
    padding = [(0, num_tiles * config.q_tile - num_tokens), (0, 0), (0, config.token_rows - group)]
    q = jnp.pad(q.reshape(num_tokens, num_kv_heads, group, head_dim), [*padding, (0, _widths(head_dim)[0] - head_dim)])
    q = q.reshape(num_tiles, config.q_tile, num_kv_heads, config.token_rows, -1)
    return q.transpose(0, 2, 1, 3, 4).reshape(num_tiles, num_kv_heads, config.q_tile * config.token_rows, -1)


def _from_rows(out: jax.Array, shape: tuple[int, ...], config: Config) -> jax.Array:
    """[tokens, N, H] of the kernel's output."""
    num_tokens, num_heads, head_dim = shape
    num_tiles, num_kv_heads = out.shape[:2]
    out = out.reshape(num_tiles, num_kv_heads, config.q_tile, config.token_rows, -1).transpose(0, 2, 1, 3, 4)
    out = out[..., : num_heads // num_kv_heads, -head_dim:]
    return out.reshape(num_tiles * config.q_tile, num_heads, head_dim)[:num_tokens]


def _sink_rows(sinks: jax.Array, num_kv_heads: int, config: Config) -> jax.Array:
    """f32[K, M, lanes] of sinks f32[N]."""
    sinks = sinks.reshape(num_kv_heads, 1, -1)
    sinks = jnp.pad(sinks, ((0, 0), (0, 0), (0, config.token_rows - sinks.shape[-1])))
    sinks = jnp.broadcast_to(sinks, (num_kv_heads, config.q_tile, config.token_rows))
    return jnp.broadcast_to(sinks.reshape(num_kv_heads, -1, 1), (*sinks.shape[:1], sinks[0].size, _LANES))


def _tile_spec(num_kv_heads: int, rows: int, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, num_kv_heads, rows, width), lambda i, *_: (i, 0, 0, 0))


# --- the kernel --------------------------------------------------------------------------------------------


def _kernel(*refs: Any, config: Config) -> None:
    scalars, refs = Scalars(*refs[: len(Scalars._fields)]), refs[len(Scalars._fields) :]
    q_ref, *sink_refs = refs[: 1 + config.has_sinks]  # [K, M, columns], f32[K, M, lanes]
    pool_ref, out_ref, buffers, semaphores, highest, total, weighted, folds = refs[1 + config.has_sinks :]
    tile = pl.program_id(0)
    fetches = Fetches(scalars, pool_ref, buffers, semaphores, config)
    _reset(sink_refs, highest, total, weighted)

    @pl.when(tile == 0)
    def _():
        folds[0] = 0

    first, end = scalars.begins[tile], scalars.ends[tile]

    @pl.when((tile == scalars.first_tile[0]) & (first < end))
    def _():
        fetches.start(Work(tile, first, fetches.keys_of(tile, first).first_tile), 0)

    def fold_sequence(sequence: Any, carry: None) -> None:
        keys = fetches.keys_of(tile, sequence)
        last_seen = _last_seen(scalars, tile, sequence, config)

        def fold(kv_tile: Any, carry: None) -> None:
            slot = folds[0] % 2
            folds[0] = folds[0] + 1
            work = Work(tile, sequence, kv_tile)
            fetches.start_next(work, keys, 1 - slot)
            fetches.wait(work, slot)
            _clear_past(buffers, slot, keys.limit - kv_tile * config.tiles.kv_tile)
            state = (highest, total, weighted)
            _fold_heads(q_ref, buffers, slot, state, last_seen, kv_tile, scalars.kv_scales[0], config)

        lax.fori_loop(keys.first_tile, keys.end_tile, fold, carry)

    lax.fori_loop(first, end, fold_sequence, None)
    _finish(out_ref, total, weighted, scalars.kv_scales[1])


class Fetches(NamedTuple):
    """Which keys a tile of queries needs, and how they come into the buffers."""

    scalars: Scalars
    pool: Any
    buffers: Any
    semaphores: Any
    config: Config

    def keys_of(self, tile: Any, sequence: Any) -> Keys:
        """One tile of keys at least, so that every sequence has a fetch to follow the one before."""
        s, config = self.scalars, self.config
        end = s.cu_q_lens[sequence + 1]
        first_token = jnp.maximum(s.cu_q_lens[sequence], tile * config.q_tile)
        end_token = jnp.minimum(end, (tile + 1) * config.q_tile)
        to_position = s.seq_lens[sequence] - end
        most = config.table_width * self.buffers.shape[3]
        limit = jnp.clip(end_token + to_position, 1, most)
        end_tile = pl.cdiv(limit, config.tiles.kv_tile)
        if config.window is None:
            return Keys(limit, 0, end_tile)
        first = jnp.maximum(first_token + to_position - config.window + 1, 0) // config.tiles.kv_tile
        return Keys(limit, jnp.minimum(first, end_tile - 1), end_tile)

    def _copies(self, work: Work, slot: Any, act: Any) -> None:
        """`act` on the copy of each block of a tile that has keys to see."""
        per_tile, block_size = self.buffers.shape[2:4]
        first = work.kv_tile * per_tile
        count = jnp.minimum(pl.cdiv(self.keys_of(work.tile, work.sequence).limit, block_size) - first, per_tile)

        def of_block(i: Any, carry: None) -> None:
            block = self.scalars.tables[work.sequence * self.config.table_width + first + i]
            block = jnp.clip(block, 0, self.pool.shape[0] - 1)
            act(pltpu.make_async_copy(self.pool.at[block], self.buffers.at[slot, :, i], self.semaphores.at[slot]))

        lax.fori_loop(0, count, of_block, None)

    def start(self, work: Work, slot: Any) -> None:
        self._copies(work, slot, lambda copy: copy.start())

    def wait(self, work: Work, slot: Any) -> None:
        self._copies(work, slot, lambda copy: copy.wait())

    def start_next(self, work: Work, keys: Keys, slot: Any) -> None:
        """Starts what comes after `work`: the sequence's next tile, the next sequence's first, the next grid step's."""
        s = self.scalars
        in_sequence = work.kv_tile + 1 < keys.end_tile
        in_tile = in_sequence | (work.sequence + 1 < s.ends[work.tile])
        tile = jnp.where(in_tile, work.tile, work.tile + 1)
        sequence = jnp.where(in_tile, jnp.where(in_sequence, work.sequence, work.sequence + 1), s.begins[tile])

        @pl.when(in_tile | (sequence < s.ends[tile]))
        def _():
            first = self.keys_of(tile, sequence).first_tile
            self.start(Work(tile, sequence, jnp.where(in_sequence, work.kv_tile + 1, first)), slot)


def _last_seen(scalars: Scalars, tile: Any, sequence: Any, config: Config) -> jax.Array:
    """i32[M, lanes] the last position that each row sees; -1 for rows of others."""
    rows = config.q_tile * config.token_rows
    token = tile * config.q_tile + lax.broadcasted_iota(jnp.int32, (rows, _LANES), 0) // config.token_rows
    begin, end = scalars.cu_q_lens[sequence], scalars.cu_q_lens[sequence + 1]
    return jnp.where((token >= begin) & (token < end), token + (scalars.seq_lens[sequence] - end), -1)


def _clear_past(buffers: Any, slot: Any, keys: Any) -> None:
    """Zeros from key number `keys` of the buffer on: what nobody wrote may be NaN, and 0 x NaN is NaN."""
    per_tile, block_size = buffers.shape[2:4]

    @pl.when(keys < per_tile * block_size)
    def _():
        cut = keys // block_size
        head = buffers[slot, :, cut]  # [K, C, 2H]
        is_key = lax.broadcasted_iota(jnp.int32, head.shape, 1) < keys % block_size
        buffers[slot, :, cut] = jnp.where(is_key, head, jnp.zeros_like(head))

        def clear(block: Any, carry: None) -> None:
            buffers[slot, :, block] = jnp.zeros_like(head)

        lax.fori_loop(cut + 1, per_tile, clear, None)


def _reset(sink_refs: list[Any], highest: Any, total: Any, weighted: Any) -> None:
    """The state before any key. A sink is a score that came first, with weight one and no value."""
    weighted[...] = jnp.zeros_like(weighted)
    if sink_refs:
        highest[...] = sink_refs[0][...]
        total[...] = (lax.broadcasted_iota(jnp.int32, total.shape, 2) == 0).astype(jnp.float32)
    else:
        highest[...] = jnp.full_like(highest, _FLOOR)
        total[...] = jnp.zeros_like(total)


def _fold_heads(
    q_ref: Any, buffers: Any, slot: Any, state: tuple[Any, Any, Any], last_seen: Any, kv_tile: Any, k_scale: Any,
    config: Config,
) -> None:  # fmt: skip
    num_kv_heads, per_tile, block_size, width = buffers.shape[1:]
    keys = per_tile * block_size
    position = kv_tile * keys + lax.broadcasted_iota(jnp.int32, (q_ref.shape[1], keys), 1)
    limit = _widen(last_seen, keys)
    seen = position <= limit
    if config.window is not None:
        seen &= position > limit - config.window
    scale = config.scale * k_scale

    def fold_head(head: Any) -> None:
        kv = buffers[slot, head].reshape(keys, width).astype(q_ref.dtype)
        _fold(q_ref[head], kv, tuple(ref.at[head] for ref in state), seen, scale, config)

    together = min(config.tiles.unrolled_heads, num_kv_heads)
    if num_kv_heads % together:
        together = 1

    def fold_some(first: Any, carry: None) -> None:
        for i in range(together):
            fold_head(first * together + i)

    lax.fori_loop(0, num_kv_heads // together, fold_some, None)


def _fold(q: Any, kv: Any, state: tuple[Any, ...], seen: Any, scale: Any, config: Config) -> None:
    """One head's tile of keys into the state of its rows: q [M, columns], kv [keys, 2H].

    The sum of weights is kept by lane and summed up at the end: one reduction a row, and its order is the same
    however many rows there are.
    """
    highest, total, weighted = state
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    dot = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    keys, values = (kv, kv) if config.head_dim < _LANES else (kv[:, : config.head_dim], kv[:, config.head_dim :])
    scores = dot(q, keys, (((1,), (1,)), ((), ()))) * scale
    if config.softcap is not None:
        scores = config.softcap * jnp.tanh(scores / config.softcap)
    scores = jnp.where(seen, scores, -jnp.inf)
    before = highest[...]
    now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - _widen(now, scores.shape[1]))
    fade = jnp.exp(before - now)
    highest[...] = now
    total[...] = fade * total[...] + _by_lane(weights)
    added = dot(weights.astype(q.dtype), values, (((1,), (0,)), ((), ())))
    weighted[...] = _widen(fade, added.shape[1]) * weighted[...] + added


def _finish(out_ref: Any, total: Any, weighted: Any, v_scale: Any) -> None:
    """Writes values by weight; zeros for rows that saw no key."""

    def finish_head(head: Any, carry: None) -> None:
        lanes = total[head]
        for shift in (64, 32, 16, 8, 4, 2, 1):  # lane i + lane i + shift: all lanes end with the sum, in one order
            lanes = lanes + jnp.concatenate([lanes[:, shift:], lanes[:, :shift]], axis=1)
        divisor = _widen(jnp.where(lanes == 0.0, 1.0, lanes), weighted.shape[2])
        out_ref[head] = (weighted[head] * v_scale / divisor).astype(out_ref.dtype)

    lax.fori_loop(0, total.shape[0], finish_head, None)


def _widen(lanes: jax.Array, width: int) -> jax.Array:
    """[M, width] of [M, lanes] whose lanes are all the same."""
    return lanes[:, :width] if width <= _LANES else jnp.concatenate([lanes] * (width // _LANES), axis=1)


def _by_lane(weights: jax.Array) -> jax.Array:
    """[M, lanes] of [M, keys]: lane i has the sum of keys i, i + 128, ..."""
    keys = weights.shape[1]
    if keys < _LANES:
        return jnp.concatenate([weights, jnp.zeros((weights.shape[0], _LANES - keys), weights.dtype)], axis=1)
    return sum((weights[:, i : i + _LANES] for i in range(_LANES, keys, _LANES)), weights[:, :_LANES])
