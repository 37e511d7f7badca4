"""The second GPU attention kernel: the states of a decoding sequence's splits become its output."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_gpu import Registers, divide, divide_up, loop, remainder
from pallas_kernels.ragged_paged_attention.kernel_gpu_state import (
    LOWEST,
    State,
    finished,
    merge,
    with_sink,
    without_zeros,
)
from pallas_kernels.ragged_paged_attention.kernel_gpu_work import Sizes

WARPGROUPS = 4  # of a CTA, each with rows of its own
AT_ONCE = 8  # splits whose states are read together: one round trip to memory (0.7 us) for eight, not for each


class MergeRefs(NamedTuple):
    """Device memory of the merge.

    Attributes:
        cut, num_decode: see `kernel_gpu_work.Work`.
        values: f32[places * N, H].
        tops, totals: f32[places * K, 64], the first G of the 64.
        scales: f32[2]; sinks: f32[K, 64].
        out: q[T * N, H], written in place: only rows of sequences that were cut.
    """

    cut: Any
    num_decode: Any
    values: Any
    tops: Any
    totals: Any
    scales: Any
    sinks: Any
    out: Any


def merge_body(sizes: Sizes, registers: Registers, refs: MergeRefs) -> None:
    """Head after head of the decoding sequences. A decoding sequence's row is also its place in the stream."""
    worker = lax.axis_index("cta") * WARPGROUPS + lax.axis_index("warpgroup")
    workers = sizes.tiles.num_ctas * WARPGROUPS
    heads = refs.num_decode[0] * sizes.num_heads

    def work(nth: Any, carry: Any) -> Any:
        number = worker + nth * workers
        row, head = divide(number, sizes.num_heads), remainder(number, sizes.num_heads)
        splits = refs.cut[0, row]

        @pl.when(splits > 0)
        def _() -> None:
            _merge_head(sizes, registers, refs, row, head, splits)

        return carry

    loop(0, divide_up(lax.max(heads - worker, jnp.int32(0)), workers), work, jnp.int32(0))


def _merge_head(sizes: Sizes, registers: Registers, refs: MergeRefs, row: Any, head: Any, splits: Any) -> None:
    group, nth = divide(head, sizes.group), remainder(head, sizes.group)
    place = refs.cut[1, row]

    def read(split: Any) -> State:
        at = place + lax.min(split, splits - 1)
        at_group = at * sizes.num_kv_heads + group
        top = lax.select(split < splits, refs.tops[at_group, nth], jnp.float32(LOWEST))
        total = lax.select(split < splits, refs.totals[at_group, nth], jnp.float32(0.0))
        return State(top, total, (registers.load(refs.values.at[at * sizes.num_heads + head]),))

    def add(number: Any, state: State) -> State:
        states = [read(number * AT_ONCE + i) for i in range(AT_ONCE)]
        for other in states:
            state = merge(registers, state, other)
        return state

    nothing = State(jnp.float32(LOWEST), jnp.float32(0.0), (registers.full((sizes.head_dim,), 0.0),))
    state = loop(0, divide_up(splits, AT_ONCE), add, nothing)
    if sizes.has_sinks:
        state = with_sink(registers, state, refs.sinks[group, nth])
    v_scale = refs.scales[1] if sizes.has_scales else None
    values = finished(state.values[0], without_zeros(registers, state.total), v_scale)
    registers.store(refs.out.at[row * sizes.num_heads + head], values.astype(sizes.q_dtype))
