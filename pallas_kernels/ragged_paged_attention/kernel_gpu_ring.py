"""The half of the GPU attention kernel that copies: jobs, a CTA's shared memory, and keys and values on their way."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import PIECE, ROWS, divide, divide_up, loop, remainder, tiled
from pallas_kernels.mosaic_gpu_copies import Copies
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


def scratch_of(sizes: Sizes, copies: Copies) -> tuple[Any, ...]:
    tiles = sizes.tiles
    slots = tiles.lanes * tiles.ring
    widest = copies.widest_pattern(sizes.columns * jnp.dtype(sizes.kv_dtype).itemsize)
    shapes = [
        tiled((tiles.lanes, sizes.q_terms, ROWS, sizes.head_dim), jnp.bfloat16),
        tiled((slots, tiles.kv_tile, sizes.columns), sizes.kv_dtype, widest),
        plgpu.SMEM((tiles.lanes, ROWS, PIECE), jnp.float32),
        plgpu.SMEM((tiles.lanes, ROWS, PIECE), sizes.q_dtype),
        plgpu.Barrier(num_arrivals=1 if copies.by_threads else sizes.copies_of_slot, num_barriers=slots),
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


class Copier(NamedTuple):
    """The warpgroup of a lane that copies: fills slot after slot of the lane's ring."""

    sizes: Sizes
    copies: Copies
    scratch: Scratch
    lane: Any
    tables: Any
    pool: Any

    def copy_keys_and_values(self, job: Job, step: Any) -> Any:
        """Of a job; the next step.

        The block ids of a tile are read while the tile before it is under way: a slot never waits for two reads of
        device memory one after the other.
        """
        sizes = self.sizes
        first, end = job.tiles(sizes)

        def fill_tile(tile: Any, carry: tuple[Any, tuple[Any, ...]]) -> tuple[Any, tuple[Any, ...]]:
            step, ids = carry
            next_ids = self.block_ids(job, tile + 1)
            keys = job.head * (2 * sizes.head_dim)
            for part in range(sizes.parts):
                self.fill(tile, ids, keys + part * sizes.columns, step + part)
            values = keys + sizes.head_dim + job.part * sizes.columns
            self.fill(tile, ids, values, step + sizes.parts)
            return step + (sizes.parts + 1), next_ids

        step, _ = loop(first, end, fill_tile, (step, self.block_ids(job, first)))
        return step

    def block_ids(self, job: Job, tile: Any) -> tuple[Any, ...]:
        sizes = self.sizes
        last = lax.min(divide(job.length - 1, sizes.block_size), jnp.int32(sizes.table_width - 1))
        begins = [tile * sizes.tiles.kv_tile + i * sizes.rows_of_copy for i in range(sizes.copies_of_slot)]
        ids = [self.tables[job.row, lax.min(divide(begin, sizes.block_size), last)] for begin in begins]
        return tuple(lax.max(lax.min(i, jnp.int32(sizes.num_blocks - 1)), jnp.int32(0)) for i in ids)

    def fill(self, tile: Any, ids: tuple[Any, ...], column: Any, step: Any) -> None:
        sizes, rows, slot = self.sizes, self.sizes.rows_of_copy, self.slot(step)

        @pl.when(step >= sizes.tiles.ring)
        def _() -> None:
            plgpu.barrier_wait(self.scratch.emptied.at[slot])

        for i, block in enumerate(ids):
            begin = block * sizes.block_size + remainder(tile * sizes.tiles.kv_tile + i * rows, sizes.block_size)
            source = self.pool.at[pl.ds(pl.multiple_of(begin, 8), rows), pl.ds(column, sizes.columns)]
            self.copies.fetch(source, self.scratch.ring.at[slot, pl.ds(i * rows, rows)], self.scratch.filled.at[slot])

        if self.copies.by_threads:

            @pl.when(step >= self.under_way)
            def _() -> None:
                self.copies.report(self.filled(step - self.under_way), self.under_way * sizes.copies_of_slot)

    def finish(self, steps: Any) -> None:
        """Sees the last slots filled and emptied: a barrier's last phase is seen before its memory goes away."""

        def report(step: Any, carry: Any) -> Any:
            self.copies.report(self.filled(step), 0)
            return carry

        def drain(step: Any, carry: Any) -> Any:
            plgpu.barrier_wait(self.scratch.emptied.at[self.slot(step)])
            return carry

        if self.copies.by_threads:
            loop(lax.max(steps - self.under_way, jnp.int32(0)), steps, report, jnp.int32(0))
        loop(lax.max(steps - self.sizes.tiles.ring, jnp.int32(0)), steps, drain, jnp.int32(0))

    @property
    def under_way(self) -> int:
        """Slots behind the one that was begun last that may still be unreported. Whoever multiplies gives none of a
        tile's keys back before all parts of them are there: reported later, a full ring would wait for itself."""
        return max(self.sizes.tiles.ring - self.sizes.parts, 0)

    def filled(self, step: Any) -> Any:
        return self.scratch.filled.at[self.slot(step)]

    def slot(self, step: Any) -> Any:
        return self.lane * self.sizes.tiles.ring + remainder(step, self.sizes.tiles.ring)
