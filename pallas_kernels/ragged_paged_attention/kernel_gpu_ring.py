"""The half of the GPU attention kernel that copies: jobs, a CTA's shared memory, and keys and values on their way."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import PIECE, ROWS, divide, divide_up, loop, remainder, tiled
from pallas_kernels.ragged_paged_attention.kernel_gpu_work import (
    END_SPLIT,
    FIRST_SPLIT,
    LENGTH,
    PLACE,
    POSITION,
    QUERIES,
    ROW,
    TOKEN,
    Sizes,
)


class Scratch(NamedTuple):
    """Shared memory and barriers of a CTA, by lane.

    Attributes:
        queries: bf16[lanes, terms, 64, H].
        ring: kv[lanes * ring, kv_tile, columns].
        converted: bf16[lanes, terms, kv_tile, columns], what a slot holds once it can be multiplied.
        state_rows: f32[lanes, 64, 64], rows of a state on their way out.
        out_rows: q[lanes, 64, 64], rows of the output on their way out.
        filled, emptied: barriers of the ring's slots.
    """

    queries: Any
    ring: Any
    state_rows: Any
    out_rows: Any
    filled: Any
    emptied: Any
    converted: Any = None


def scratch_of(sizes: Sizes) -> tuple[Any, ...]:
    tiles = sizes.tiles
    slots = tiles.lanes * tiles.ring
    copies = tiles.kv_tile // min(sizes.block_size, tiles.kv_tile)
    shapes = [
        tiled((tiles.lanes, sizes.q_terms, ROWS, sizes.head_dim), jnp.bfloat16),
        tiled((slots, tiles.kv_tile, sizes.columns), sizes.kv_dtype),
        plgpu.SMEM((tiles.lanes, ROWS, PIECE), jnp.float32),
        plgpu.SMEM((tiles.lanes, ROWS, PIECE), sizes.q_dtype),
        plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
        plgpu.Barrier(num_arrivals=1, num_barriers=slots),
    ]
    if sizes.converts:
        shapes.append(tiled((tiles.lanes, sizes.kv_terms, tiles.kv_tile, sizes.columns), jnp.bfloat16))
    return tuple(shapes)


class Job(NamedTuple):
    """One item of work for one kv head and one part of its values; int32 scalars."""

    row: Any
    token: Any
    queries: Any
    position: Any
    first_split: Any
    end_split: Any
    place: Any
    length: Any
    head: Any
    part: Any

    def tiles_of_split(self, sizes: Sizes, split: Any) -> tuple[Any, Any]:
        """The half-open range of tiles of a split of which some query of the job sees a key."""
        first, end = self._tiles_seen(sizes)
        begin = split * sizes.tiles.tiles_per_split
        return lax.max(first, begin), lax.min(end, begin + sizes.tiles.tiles_per_split)

    def tiles(self, sizes: Sizes) -> tuple[Any, Any]:
        """Those of all its splits, one after another."""
        first, end = self._tiles_seen(sizes)
        per_split = sizes.tiles.tiles_per_split
        return lax.max(first, self.first_split * per_split), lax.min(end, self.end_split * per_split)

    def _tiles_seen(self, sizes: Sizes) -> tuple[Any, Any]:
        end = divide_up(self.position + self.queries, sizes.tiles.kv_tile)
        if sizes.window is None:
            return jnp.int32(0), end
        return divide(lax.max(self.position - (sizes.window - 1), jnp.int32(0)), sizes.tiles.kv_tile), end


def read_job(sizes: Sizes, items: Any, number: Any) -> Job:
    """Job `number`: the parts of a kv head lie beside each other, and heads of an item, which share blocks, next."""
    part = remainder(number, sizes.parts)
    rest = divide(number, sizes.parts)
    head, item = remainder(rest, sizes.num_kv_heads), divide(rest, sizes.num_kv_heads)
    return Job(
        row=items[item, ROW],
        token=items[item, TOKEN],
        queries=items[item, QUERIES],
        position=items[item, POSITION],
        first_split=items[item, FIRST_SPLIT],
        end_split=items[item, END_SPLIT],
        place=items[item, PLACE],
        length=items[item, LENGTH],
        head=head,
        part=part,
    )


def copy_keys_and_values(sizes: Sizes, job: Job, step: Any, lane: Any, tables: Any, pool: Any, scratch: Scratch) -> Any:
    """Fills slot after slot of the lane's ring with the job's keys and values; the next step.

    The block ids of a tile are read while the tile before it is under way: a slot never waits for two reads of
    device memory one after the other.
    """
    tiles = sizes.tiles
    rows = min(sizes.block_size, tiles.kv_tile)
    copies = tiles.kv_tile // rows
    first, end = job.tiles(sizes)

    def block_ids(tile: Any) -> tuple[Any, ...]:
        last = lax.min(divide(job.length - 1, sizes.block_size), jnp.int32(sizes.table_width - 1))
        nth = [divide(tile * tiles.kv_tile + i * rows, sizes.block_size) for i in range(copies)]
        ids = [tables[job.row, lax.min(i, last)] for i in nth]
        return tuple(lax.max(lax.min(i, jnp.int32(sizes.num_blocks - 1)), jnp.int32(0)) for i in ids)

    def fill(tile: Any, ids: tuple[Any, ...], column: Any, step: Any) -> None:
        slot = lane * tiles.ring + remainder(step, tiles.ring)

        @pl.when(step >= tiles.ring)
        def _() -> None:
            plgpu.barrier_wait(scratch.emptied.at[slot])

        for i, block in enumerate(ids):
            begin = block * sizes.block_size + remainder(tile * tiles.kv_tile + i * rows, sizes.block_size)
            source = pool.at[pl.ds(pl.multiple_of(begin, 8), rows), pl.ds(column, sizes.columns)]
            target = scratch.ring.at[slot, pl.ds(i * rows, rows)]
            plgpu.copy_gmem_to_smem(source, target, scratch.filled.at[slot])

    def fill_tile(tile: Any, carry: tuple[Any, tuple[Any, ...]]) -> tuple[Any, tuple[Any, ...]]:
        step, ids = carry
        next_ids = block_ids(tile + 1)
        keys = job.head * (2 * sizes.head_dim)
        for part in range(sizes.parts):
            fill(tile, ids, keys + part * sizes.columns, step + part)
        values = keys + sizes.head_dim + job.part * sizes.columns
        fill(tile, ids, values, step + sizes.parts)
        return step + (sizes.parts + 1), next_ids

    step, _ = loop(first, end, fill_tile, (step, block_ids(first)))
    return step
