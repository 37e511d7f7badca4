"""The GPU attention kernel: one worker turns a tile of queries and a range of splits into outputs or a state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import (
    PIECE,
    ROWS,
    Registers,
    Transposed,
    bfloat16_terms,
    divide_up,
    loop,
    power_of_two,
    remainder,
)
from pallas_kernels.mosaic_gpu_copies import Copies
from pallas_kernels.ragged_paged_attention.kernel_gpu_ring import Copier, Job, Scratch, read_job
from pallas_kernels.ragged_paged_attention.kernel_gpu_state import (
    LOG2_E,
    State,
    finished,
    merge,
    no_keys,
    with_sink,
    without_zeros,
)
from pallas_kernels.ragged_paged_attention.kernel_gpu_work import Sizes


class Worker(NamedTuple):
    """The warpgroup of a lane that multiplies.

    Attributes:
        k_scale, v_scale: what stored keys and values are multiplied by, or None.
    """

    sizes: Sizes
    registers: Registers
    copies: Copies
    scratch: Scratch
    lane: Any
    k_scale: Any
    v_scale: Any

    def load_queries(self, q: Any, job: Job) -> None:
        """64 rows from the job's first query on: those past its own belong to others and come to nothing."""
        sizes = self.sizes
        begin = (job.head * sizes.num_tokens + job.token) * sizes.group
        for part in range(sizes.head_dim // PIECE):
            columns = pl.ds(part * PIECE, PIECE)
            rows = self.registers.load(q.at[pl.ds(begin, ROWS), columns])
            for term, array in enumerate(bfloat16_terms(rows, sizes.q_terms)):
                self.registers.store(self.scratch.queries.at[self.lane, term, :, columns], array)
        self.registers.commit()

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
        terms = tuple(bfloat16_terms(weights, self.sizes.q_terms))
        wide = registers.across(scale, PIECE)
        slot = self.slot(step + self.sizes.parts)
        sources = self.filled_values(job, tile, slot)
        values = []
        for i, piece in enumerate(state.values):
            columns = pl.ds(i * PIECE, PIECE)
            factors = [
                (terms[a], sources[b].at[:, columns])
                for a, b in pairs_of_terms(self.sizes.q_terms, self.sizes.kv_terms)
            ]
            values.append(piece * wide + registers.product((ROWS, PIECE), factors))
        if not self.sizes.converts:
            plgpu.barrier_arrive(self.scratch.emptied.at[slot])
        return State(top, total, tuple(values))

    def scores(self, job: Job, tile: Any, step: Any) -> jax.Array:
        """f32[64, kv_tile] scores times log2 e, unmasked.

        Rounded here: no fused multiply-add may take the product and what is subtracted from it later in one.
        """
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
            return lax.optimization_barrier(products * self.scaled(sizes.scale * LOG2_E))
        capped = lax.tanh(products * self.scaled(sizes.scale / sizes.softcap))
        return lax.optimization_barrier(capped * jnp.float32(sizes.softcap * LOG2_E))

    def scaled(self, factor: float) -> jax.Array:
        """What products with stored keys are multiplied by."""
        return jnp.float32(factor) if self.k_scale is None else jnp.float32(factor) * self.k_scale

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
        self.registers.commit()

    def store_output(self, out: Any, job: Job, state: State, sink: Any) -> None:
        """out[TOKEN ... TOKEN + QUERIES - 1, the kv head's query heads, the part's columns]."""
        sizes = self.sizes
        if sink is not None:
            state = with_sink(self.registers, state, sink)
        total = without_zeros(self.registers, state.total)
        for i, piece in enumerate(state.values):
            rows = self.scratch.out_rows.at[self.lane]
            piece = finished(piece, self.registers.across(total, PIECE), self.v_scale)
            self.registers.store(rows, piece.astype(sizes.q_dtype))
            self.registers.commit()
            columns = pl.ds(job.part * sizes.columns + i * PIECE, PIECE)

            def store(query: Any, carry: Any, rows: Any = rows, columns: Any = columns) -> Any:
                begin = (job.token + query) * sizes.num_heads + job.head * sizes.group
                source = rows.at[pl.ds(query * sizes.group, sizes.group)]
                self.copies.send(source, out.at[pl.ds(begin, sizes.group), columns])
                return carry

            loop(0, job.queries, store, jnp.int32(0))
            self.copies.sent()

    def store_state(self, tops: Any, totals: Any, values: Any, job: Job, state: State) -> None:
        """The state of a decoding sequence's split: one query, so the first G rows."""
        sizes = self.sizes
        heads = job.place * sizes.num_heads + job.head * sizes.group
        for i, piece in enumerate(state.values):
            rows = self.scratch.state_rows.at[self.lane]
            self.registers.store(rows, piece)
            self.registers.commit()
            columns = pl.ds(job.part * sizes.columns + i * PIECE, PIECE)
            target = values.at[pl.ds(heads, sizes.group), columns]
            self.copies.send(rows.at[pl.ds(0, sizes.group)], target)
            self.copies.sent()

        @pl.when(job.part == 0)
        def _() -> None:
            group = job.place * sizes.num_kv_heads + job.head
            self.registers.store(tops.at[group], state.top)
            self.registers.store(totals.at[group], state.total)


def pairs_of_terms(left: int, right: int) -> list[tuple[int, int]]:
    """Which terms of two sides to multiply, small products first: what is left out is below float32's last bit."""
    pairs = [(a, b) for a in range(left) for b in range(right) if a + b < 3]
    return sorted(pairs, key=lambda pair: -sum(pair))


def attention_body(sizes: Sizes, registers: Registers, copies: Copies, refs: Any, scratch: Scratch) -> None:
    """What each warpgroup of each CTA does: job after job, `workers` apart."""
    tiles = sizes.tiles
    cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
    lane = remainder(warpgroup, tiles.lanes)
    worker = lane * tiles.num_ctas + cta
    num_jobs = refs.num_items[0] * (sizes.num_kv_heads * sizes.parts)
    jobs = divide_up(lax.max(num_jobs - worker, jnp.int32(0)), tiles.workers)

    @pl.when(warpgroup >= tiles.lanes)
    def _() -> None:
        share_registers(sizes, copies=True)
        copier = Copier(sizes, copies, scratch, lane, refs.tables, refs.pool)

        def copy(nth: Any, step: Any) -> Any:
            return copier.copy_keys_and_values(read_job(sizes, refs.items, worker + nth * tiles.workers), step)

        copier.finish(loop(0, jobs, copy, jnp.int32(0)))

    @pl.when(warpgroup < tiles.lanes)
    def _() -> None:
        share_registers(sizes, copies=False)
        k_scale, v_scale = (refs.scales[0], refs.scales[1]) if sizes.has_scales else (None, None)
        this = Worker(sizes, registers, copies, scratch, lane, k_scale, v_scale)

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


def share_registers(sizes: Sizes, *, copies: bool) -> None:
    """Four warpgroups have 128 registers a thread each: 80 of a copying one's go to one that multiplies, which holds
    64 of merged values, 64 of the split's, 32 of a product and 16 of weights. Two warpgroups have 255 each."""
    if sizes.tiles.lanes == 2 and sizes.generation.has_tma:  # the instruction is as old as the copy engine
        plgpu.set_max_registers(48 if copies else 208, action="decrease" if copies else "increase")


def store(worker: Worker, refs: Any, job: Job, state: State) -> None:
    sizes = worker.sizes

    @pl.when(job.place < 0)
    def _() -> None:
        sink = worker.registers.load(refs.sinks.at[job.head]) if sizes.has_sinks else None
        worker.store_output(refs.out, job, state, sink)

    if sizes.splits_held:

        @pl.when(job.place >= 0)
        def _() -> None:
            worker.store_state(refs.tops, refs.totals, refs.values, job, state)
