"""Keys and values to their slots of the pool on a TPU, in place.

Memory is moved in groups of eight rows, the least that a DMA takes of a pool whose heads' tokens lie one after
another. Tokens that follow each other in the stream and in a group are a run; a run is one read of its group, one
rotation of its rows into their places, and one write. A run of a whole group is not read. All runs of a tile of tokens
are in flight together, unless two of them have the same group: then each waits for the one before.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import Interpret, by_head, tpu_interpret
from pallas_kernels.kv_write.tuning import Tiles

_GROUP = 8


def kv_write_tpu(
    cache: jax.Array,
    rows: jax.Array,
    slots: jax.Array,
    first_slot: jax.Array | int,
    num_slots: int,
    *,
    tiles: Tiles | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """`api.kv_write` of rows [T, K, 2H] as `pack_rows` made them, to the slots from `first_slot` on."""
    tiles = Tiles() if tiles is None else tiles
    num_blocks, block_size, num_kv_heads, width = cache.shape
    padding = -slots.size % tiles.token_tile
    slots = jnp.pad(slots, (0, padding), constant_values=-1)
    # float32 holds what the pool holds, and is what rotates
    rows = jnp.pad(jnp.swapaxes(rows, 0, 1).astype(jnp.float32), ((0, 0), (0, padding), (0, 0)))
    lengths = run_lengths(slots, num_slots, tiles.token_tile)
    runs = _runs_of_tiles(slots, lengths, tiles.token_tile)
    num_tiles = slots.size // tiles.token_tile
    out = pl.pallas_call(
        partial(_kernel, block_size=block_size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(num_tiles,),
            in_specs=[
                pl.BlockSpec((num_kv_heads, tiles.token_tile, width), lambda i, *_: (0, i, 0)),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[
                pltpu.VMEM((tiles.token_tile, num_kv_heads, _GROUP, width), cache.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((num_blocks, num_kv_heads, block_size, width), cache.dtype),
        input_output_aliases={6: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=tiles.vmem_limit_mib << 20
        ),
        interpret=tpu_interpret(interpret),
        name="kv_write",
    )(slots + first_slot, lengths, *runs, rows, by_head(cache))
    return by_head(out)


def run_lengths(slots: jax.Array, num_slots: int, token_tile: int) -> jax.Array:
    """i32[T] tokens of the run that begins at each token; 0 where none begins, and for slots outside the pool."""
    token = jnp.arange(slots.size, dtype=jnp.int32)
    inside = (slots >= 0) & (slots < num_slots)
    follows = (slots == jnp.roll(slots, 1) + 1) & jnp.roll(inside, 1)
    follows &= (slots % _GROUP != 0) & (token % token_tile != 0)
    begins = inside & ~follows
    # a run ends where the next begins, at a token without a slot, or at the end
    ends = jnp.where(begins | ~inside, token, slots.size)
    next_end = jnp.append(lax.cummin(ends, reverse=True)[1:], jnp.int32(slots.size))
    return jnp.where(begins, next_end - token, 0)


def _runs_of_tiles(slots: jax.Array, lengths: jax.Array, token_tile: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each tile of tokens: i32[T] where in it its runs begin, in order; i32[tiles] how many they are; i32[tiles] 1
    where two of them have the same group."""
    begins = (lengths > 0).reshape(-1, token_tile)
    place = jnp.arange(token_tile, dtype=jnp.int32)
    rank = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
    is_run = begins[:, :, None] & (rank[:, :, None] == place)
    firsts = jnp.sum(jnp.where(is_run, place[:, None], 0), axis=1, dtype=jnp.int32)
    groups = jnp.where(begins, slots.reshape(begins.shape) // _GROUP, -1 - place)
    same = groups[:, :, None] == groups[:, None, :]
    shared = jnp.sum(same, axis=(1, 2), dtype=jnp.int32) > token_tile
    return firsts.reshape(-1), jnp.sum(begins, axis=1, dtype=jnp.int32), shared.astype(jnp.int32)


class _Run(NamedTuple):
    """Tokens that go to one group.

    Attributes:
        buffer: which holds the group.
        first: the first one, in its tile.
        length: how many.
        row: of the group, where the first one goes.
        in_pool: the group.
    """

    buffer: Any
    first: Any
    length: Any
    row: Any
    in_pool: Any


def _kernel(
    slots: Any, lengths: Any, firsts: Any, counts: Any, shared: Any, rows: Any, pool: Any, out: Any, groups: Any,
    semaphores: Any, *, block_size: int,
) -> None:  # fmt: skip
    # i32[T] three times, i32[tiles] twice in scalar memory; f32[K, tile, 2H]; the pool [P, K, C, 2H] in HBM, twice the
    # same memory; [tile, K, 8, 2H]
    del pool
    tile = pl.program_id(0)
    tokens = groups.shape[0]

    def run_of(i: Any) -> _Run:
        first = firsts[tile * tokens + i]
        slot = slots[tile * tokens + first]
        row = pl.multiple_of(slot % block_size // _GROUP * _GROUP, _GROUP)
        in_pool = out.at[slot // block_size, :, pl.ds(row, _GROUP)]
        return _Run(i, first, lengths[tile * tokens + first], slot % _GROUP, in_pool)

    def read(run: _Run) -> Any:
        return pltpu.make_async_copy(run.in_pool, groups.at[run.buffer], semaphores.at[0])

    def write(run: _Run) -> Any:
        return pltpu.make_async_copy(groups.at[run.buffer], run.in_pool, semaphores.at[1])

    def start_read(run: _Run) -> None:
        pl.when(run.length < _GROUP)(lambda: read(run).start())

    def wait_read(run: _Run) -> None:
        pl.when(run.length < _GROUP)(lambda: read(run).wait())

    def place(run: _Run) -> None:
        _place_rows(rows, groups, run)
        write(run).start()

    def wait_write(run: _Run) -> None:
        write(run).wait()

    def each(*acts: Any) -> None:
        def one(i: Any, carry: None) -> None:
            run = run_of(i)
            for act in acts:
                act(run)

        lax.fori_loop(0, counts[tile], one, None)

    @pl.when(shared[tile] == 0)
    def _():
        each(start_read)
        each(wait_read)  # all, before any is placed: reads of one semaphore may end in any order
        each(place)
        each(wait_write)

    @pl.when(shared[tile] != 0)
    def _():
        each(start_read, wait_read, place, wait_write)


def _place_rows(rows: Any, groups: Any, run: _Run) -> None:
    """The run's rows into its group: two groups' worth of tokens around it, rotated, and chosen by row."""
    num_kv_heads, tokens, width = rows.shape
    base = pl.multiple_of(jnp.minimum(run.first // _GROUP * _GROUP, tokens - 2 * _GROUP), _GROUP)
    shift = lax.rem(run.row - (run.first - base) + 2 * _GROUP, 2 * _GROUP)
    row = lax.broadcasted_iota(jnp.int32, (_GROUP, width), 0)
    is_new = (row >= run.row) & (row < run.row + run.length)

    def place_head(head: Any, carry: None) -> None:
        turned = pltpu.roll(rows[head, pl.ds(base, 2 * _GROUP)], shift, 0)[:_GROUP]
        old = groups[run.buffer, head].astype(jnp.float32)
        groups[run.buffer, head] = jnp.where(is_new, turned, old).astype(groups.dtype)

    lax.fori_loop(0, num_kv_heads, place_head, None)
