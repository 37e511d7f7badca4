"""The GPU attention kernel: one worker turns a tile of queries and a range of splits into outputs or a state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import (
    ROWS,
    Registers,
    Transposed,
    bfloat16_terms,
    divide,
    divide_up,
    loop,
    power_of_two,
    remainder,
    tiled,
)
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

LOG2_E = math.log2(math.e)
LOWEST = -(2.0**127)  # the maximum of no keys: a whole number, finite so that differences are numbers
PIECE = 64  # columns of a product with values, and of what goes out at once


class State(NamedTuple):
    """What a softmax over some keys comes to, for 64 rows.

    Attributes:
        top: f32[64] about the largest score, times log2 e, rounded to a whole number. So whatever rescales a state
            is a power of two: it multiplies without rounding, and no fused multiply-add changes a bit.
        total: f32[64] the sum of 2^(score - top).
        values: f32[64, 64] each: the sum of 2^(score - top) x value, in pieces of 64 columns.
    """

    top: jax.Array
    total: jax.Array
    values: tuple[jax.Array, ...]


def no_keys(registers: Registers, columns: int) -> State:
    """The state of no keys: merging it with another gives that other, bit for bit."""
    values = tuple(registers.full((ROWS, PIECE), 0.0) for _ in range(columns // PIECE))
    return State(registers.full((ROWS,), LOWEST), registers.full((ROWS,), 0.0), values)


def merge(registers: Registers, one: State, other: State) -> State:
    """The state of both states' keys, of 64 rows or, with numbers for `top` and `total`, of one."""
    top = lax.max(one.top, other.top)
    of_one, of_other = power_of_two(one.top - top), power_of_two(other.top - top)
    total = one.total * of_one + other.total * of_other
    if one.top.ndim == 1:
        of_one, of_other = registers.across(of_one, PIECE), registers.across(of_other, PIECE)
    values = tuple(a * of_one + b * of_other for a, b in zip(one.values, other.values, strict=True))
    return State(top, total, values)


def with_sink(registers: Registers, state: State, sink: jax.Array) -> State:
    """The state with one more score, times log2 e, whose value is nothing."""
    top = lax.max(state.top, lax.round(sink, lax.RoundingMethod.TO_NEAREST_EVEN))
    scale = power_of_two(state.top - top)
    total = state.total * scale + lax.exp2(sink - top)
    wide = registers.across(scale, PIECE) if scale.ndim == 1 else scale
    return State(top, total, tuple(piece * wide for piece in state.values))


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
    fields = (ROW, TOKEN, QUERIES, POSITION, FIRST_SPLIT, END_SPLIT, PLACE, LENGTH)
    return Job(*(items[item, field] for field in fields), head, part)


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


class Worker(NamedTuple):
    """The warpgroup of a lane that multiplies."""

    sizes: Sizes
    registers: Registers
    scratch: Scratch
    lane: Any

    def load_queries(self, q: Any, job: Job) -> None:
        """64 rows from the job's first query on: those past its own belong to others and come to nothing."""
        sizes = self.sizes
        begin = (job.head * sizes.num_tokens + job.token) * sizes.group
        for part in range(sizes.head_dim // PIECE):
            columns = pl.ds(part * PIECE, PIECE)
            rows = self.registers.load(q.at[pl.ds(begin, ROWS), columns])
            for term, array in enumerate(bfloat16_terms(rows, sizes.q_terms)):
                self.registers.store(self.scratch.queries.at[self.lane, term, :, columns], array)
        plgpu.commit_smem()

    def sum_split(self, job: Job, split: Any, step: Any) -> tuple[Any, State]:
        """The state of a split's keys, from none on; the next step."""
        first, end = job.tiles_of_split(self.sizes, split)

        def fold(tile: Any, carry: tuple[Any, State]) -> tuple[Any, State]:
            step, state = carry
            return step + (self.sizes.parts + 1), self.fold(job, tile, step, state)

        return loop(first, end, fold, (step, no_keys(self.registers, self.sizes.columns)))

    def fold(self, job: Job, tile: Any, step: Any, state: State) -> State:
        """The state with one more tile of keys. A tile of which a row sees no key leaves that row as it was."""
        registers = self.registers
        scores = self.masked(job, tile, self.scores(job, tile, step))
        largest = lax.reduce_max(scores, (1,))
        top = lax.max(state.top, lax.round(largest, lax.RoundingMethod.TO_NEAREST_EVEN))
        scale = power_of_two(state.top - top)
        weights = lax.exp2(scores - registers.across(top, self.sizes.tiles.kv_tile))
        total = state.total * scale + lax.reduce_sum(weights, (1,))
        terms = tuple(bfloat16_terms(weights, self.sizes.kv_terms))
        wide = registers.across(scale, PIECE)
        slot = self.slot(step + self.sizes.parts)
        sources = self.filled_values(job, tile, slot)
        values = []
        for i, piece in enumerate(state.values):
            columns = pl.ds(i * PIECE, PIECE)
            factors = [
                (terms[a], sources[b].at[:, columns])
                for a, b in pairs_of_terms(self.sizes.kv_terms, self.sizes.kv_terms)
            ]
            values.append(piece * wide + registers.product((ROWS, PIECE), factors))
        if not self.sizes.converts:
            plgpu.barrier_arrive(self.scratch.emptied.at[slot])
        return State(top, total, tuple(values))

    def scores(self, job: Job, tile: Any, step: Any) -> jax.Array:
        """f32[64, kv_tile] scores times log2 e, unmasked."""
        sizes = self.sizes
        queries = self.scratch.queries.at[self.lane]

        def factors() -> Iterator[tuple[Any, Any]]:
            for part in range(sizes.parts):
                columns = pl.ds(part * sizes.columns, sizes.columns)
                keys = self.filled(self.slot(step + part), None)
                for a, b in pairs_of_terms(sizes.q_terms, sizes.kv_terms):
                    yield queries.at[a, :, columns], Transposed(keys[b])

        shape = (ROWS, sizes.tiles.kv_tile)
        if sizes.converts:  # one buffer for all parts: each product must end before the next conversion
            parts = [(self.slot(step + part), part) for part in range(sizes.parts)]
            products = self.registers.full(shape, 0.0)
            for slot, part in parts:
                columns = pl.ds(part * sizes.columns, sizes.columns)
                keys = self.filled(slot, None)
                pairs = pairs_of_terms(sizes.q_terms, sizes.kv_terms)
                terms = [(queries.at[a, :, columns], Transposed(keys[b])) for a, b in pairs]
                products = products + self.registers.product(shape, terms)
        else:
            products = self.registers.product(shape, factors())
            for part in range(sizes.parts):
                plgpu.barrier_arrive(self.scratch.emptied.at[self.slot(step + part)])
        if sizes.softcap is None:
            return products * jnp.float32(sizes.scale * LOG2_E)
        capped = lax.tanh(products * jnp.float32(sizes.scale / sizes.softcap))
        return capped * jnp.float32(sizes.softcap * LOG2_E)

    def masked(self, job: Job, tile: Any, scores: jax.Array) -> jax.Array:
        """Scores with -inf where a query does not see a key; query i of the job has rows i G ... i G + G - 1."""
        sizes, shape = self.sizes, (ROWS, self.sizes.tiles.kv_tile)
        begin = tile * sizes.tiles.kv_tile
        cut = begin + (sizes.tiles.kv_tile - 1) > job.position
        if sizes.window is not None:
            cut |= begin <= job.position + job.queries - 1 - sizes.window

        def mask(scores: jax.Array) -> jax.Array:
            row, column = self.registers.iota(shape, 0), self.registers.iota(shape, 1)
            # key <= position + row // G  <=>  (key - position) G <= row, without a division for each element
            distance = column + (begin - job.position)
            seen = distance * sizes.group <= row
            if sizes.window is not None:
                seen &= (distance + sizes.window) * sizes.group > row
            return lax.select(seen, scores, self.registers.full(shape, -jnp.inf))

        return lax.cond(cut, mask, lambda scores: scores, scores)

    def slot(self, step: Any) -> Any:
        return self.lane * self.sizes.tiles.ring + remainder(step, self.sizes.tiles.ring)

    def filled_values(self, job: Job, tile: Any, slot: Any) -> list[Any]:
        """Values ready to be multiplied, 0 in rows past the sequence's end: what lies there may be no number."""
        return self.filled(slot, job.length - tile * self.sizes.tiles.kv_tile)

    def filled(self, slot: Any, num_valid: Any) -> list[Any]:
        """The terms of a slot that has arrived; its rows from `num_valid` on as 0."""
        sizes, ring = self.sizes, self.scratch.ring.at[slot]
        plgpu.barrier_wait(self.scratch.filled.at[slot])
        if not sizes.converts:
            if num_valid is not None:

                @pl.when(num_valid < sizes.tiles.kv_tile)
                def _() -> None:
                    self.rewrite(ring, [ring], num_valid)

            return [ring]
        targets = [self.scratch.converted.at[self.lane, term] for term in range(sizes.kv_terms)]
        self.rewrite(ring, targets, sizes.tiles.kv_tile if num_valid is None else num_valid)
        plgpu.barrier_arrive(self.scratch.emptied.at[slot])
        return targets

    def rewrite(self, source: Any, targets: list[Any], num_valid: Any) -> None:
        """The terms of `source` into `targets`, with zeros for rows from `num_valid` on."""
        shape = (self.sizes.tiles.kv_tile, PIECE)
        for part in range(self.sizes.columns // PIECE):
            columns = pl.ds(part * PIECE, PIECE)
            content = self.registers.load(source.at[:, columns]).astype(jnp.float32)
            valid = self.registers.iota(shape, 0) < num_valid
            content = lax.select(valid, content, self.registers.full(shape, 0.0))
            for target, term in zip(targets, bfloat16_terms(content, len(targets)), strict=True):
                self.registers.store(target.at[:, columns], term)
        plgpu.commit_smem()

    def store_output(self, out: Any, job: Job, state: State, sink: Any, v_scale: Any) -> None:
        """out[TOKEN ... TOKEN + QUERIES - 1, the kv head's query heads, the part's columns]."""
        sizes = self.sizes
        if sink is not None:
            state = with_sink(self.registers, state, sink)
        total = without_zeros(self.registers, state.total)
        for i, piece in enumerate(state.values):
            rows = self.scratch.out_rows.at[self.lane]
            piece = finished(piece, self.registers.across(total, PIECE), v_scale)
            self.registers.store(rows, piece.astype(sizes.q_dtype))
            plgpu.commit_smem()
            columns = pl.ds(job.part * sizes.columns + i * PIECE, PIECE)

            def store(query: Any, carry: Any, rows: Any = rows, columns: Any = columns) -> Any:
                begin = (job.token + query) * sizes.num_heads + job.head * sizes.group
                source = rows.at[pl.ds(query * sizes.group, sizes.group)]
                plgpu.copy_smem_to_gmem(source, out.at[pl.ds(begin, sizes.group), columns])
                return carry

            loop(0, job.queries, store, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    def store_state(self, tops: Any, totals: Any, values: Any, job: Job, state: State) -> None:
        """The state of a decoding sequence's split: one query, so the first G rows."""
        sizes = self.sizes
        heads = job.place * sizes.num_heads + job.head * sizes.group
        for i, piece in enumerate(state.values):
            rows = self.scratch.state_rows.at[self.lane]
            self.registers.store(rows, piece)
            plgpu.commit_smem()
            columns = pl.ds(job.part * sizes.columns + i * PIECE, PIECE)
            target = values.at[pl.ds(heads, sizes.group), columns]
            plgpu.copy_smem_to_gmem(rows.at[pl.ds(0, sizes.group)], target)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(job.part == 0)
        def _() -> None:
            group = job.place * sizes.num_kv_heads + job.head
            self.registers.store(tops.at[group], state.top)
            self.registers.store(totals.at[group], state.total)


def pairs_of_terms(left: int, right: int) -> list[tuple[int, int]]:
    """Which terms of a left and a right side to multiply, small products first: the rest is below float32's last bit."""
    pairs = [(a, b) for a in range(left) for b in range(right) if a + b < 3]
    return sorted(pairs, key=lambda pair: -sum(pair))


def without_zeros(registers: Registers, total: jax.Array) -> jax.Array:
    """The totals to divide by: 1 for rows of the stream's padding, which saw no key."""
    one = jnp.full_like(total, 1.0) if total.ndim == 0 else registers.full(total.shape, 1.0)
    return lax.select(total == jnp.float32(0.0), one, total)


def finished(values: jax.Array, total: jax.Array, v_scale: Any) -> jax.Array:
    """Weighted sums to averages, fp8 values to real ones. IEEE division: the same bits wherever it is compiled."""
    average = values / total
    return average if v_scale is None else average * v_scale


def attention_body(sizes: Sizes, registers: Registers, refs: Any, scratch: Scratch) -> None:
    """What each warpgroup of each CTA does: job after job, `workers` apart."""
    tiles = sizes.tiles
    cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
    lane = remainder(warpgroup, tiles.lanes)
    worker = lane * tiles.num_ctas + cta
    num_jobs = refs.num_items[0] * (sizes.num_kv_heads * sizes.parts)
    jobs = divide_up(lax.max(num_jobs - worker, jnp.int32(0)), tiles.workers)

    @pl.when(warpgroup >= tiles.lanes)
    def _() -> None:
        def copy(nth: Any, step: Any) -> Any:
            job = read_job(sizes, refs.items, worker + nth * tiles.workers)
            return copy_keys_and_values(sizes, job, step, lane, refs.tables, refs.pool, scratch)

        steps = loop(0, jobs, copy, jnp.int32(0))

        def drain(step: Any, carry: Any) -> Any:  # a barrier's last phase is seen before its memory goes away
            plgpu.barrier_wait(scratch.emptied.at[lane * tiles.ring + remainder(step, tiles.ring)])
            return carry

        loop(lax.max(steps - tiles.ring, jnp.int32(0)), steps, drain, jnp.int32(0))

    @pl.when(warpgroup < tiles.lanes)
    def _() -> None:
        this = Worker(sizes, registers, scratch, lane)

        def work(nth: Any, step: Any) -> Any:
            job = read_job(sizes, refs.items, worker + nth * tiles.workers)
            this.load_queries(refs.q, job)

            def add_split(split: Any, carry: tuple[Any, State]) -> tuple[Any, State]:
                step, state = carry
                step, of_split = this.sum_split(job, split, step)
                return step, merge(registers, state, of_split)

            nothing = no_keys(registers, sizes.columns)
            step, state = loop(job.first_split, job.end_split, add_split, (step, nothing))
            store(this, refs, job, state)
            return step

        loop(0, jobs, work, jnp.int32(0))


def store(worker: Worker, refs: Any, job: Job, state: State) -> None:
    sizes = worker.sizes

    @pl.when(job.place < 0)
    def _() -> None:
        sink = worker.registers.load(refs.sinks.at[job.head]) if sizes.has_sinks else None
        v_scale = refs.scales[1] if sizes.has_scales else None
        worker.store_output(refs.out, job, state, sink, v_scale)

    if sizes.splits_held:

        @pl.when(job.place >= 0)
        def _() -> None:
            worker.store_state(refs.tops, refs.totals, refs.values, job, state)
