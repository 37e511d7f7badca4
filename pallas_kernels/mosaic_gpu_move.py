"""Units of one array to places of another on a GPU, by TMA through shared memory: what all but attention comes to.

The copy engine moves boxes of at most 256 x 256 elements, so a unit (a token's keys and values, a block) is cut into
equal pieces of up to 16 KiB. Each warpgroup has four pieces under way: with two in a CTA 128 KiB an SM, where 33 KB
a microsecond and direction are its share of an H200's 4.3 TB/s.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.mosaic_gpu import divide, divide_up, loop, remainder

NUM_CTAS = 132  # one an SM of an H100 SXM or H200
WARPGROUPS = 2
SLOTS = 4
PIECE_BYTES = 16 * 1024
MAX_BOX = 256  # elements of a TMA box along each axis


class Pieces(NamedTuple):
    """How a unit is cut: [count, rows, columns]."""

    count: int
    rows: int
    columns: int


def cut(num_elements: int, item_bytes: int) -> Pieces:
    """The fewest equal pieces that a copy takes. A unit is a multiple of 128 elements, a key and a value of 64."""
    columns = MAX_BOX if num_elements % MAX_BOX == 0 else MAX_BOX // 2
    rows = num_elements // columns
    most = min(MAX_BOX, PIECE_BYTES // (columns * item_bytes))
    fitting = next(size for size in range(min(rows, most), 0, -1) if rows % size == 0)
    return Pieces(rows // fitting, fitting, columns)


@partial(jax.jit, static_argnames=("interpret", "name", "num_ctas"))
def move(
    target: jax.Array,
    source: jax.Array | None,
    sources: jax.Array,
    targets: jax.Array,
    *,
    interpret: Any,
    name: str,
    num_ctas: int = NUM_CTAS,
) -> jax.Array:
    """`target` with target[targets[i]] = source[sources[i]] for each i, in place.

    Args:
        target: [places, elements of a unit].
        source: [units, elements of a unit]; None to move within `target`.
        sources: i32[n] into `source`; all inside.
        targets: i32[n] places; from the number of places on: nothing is moved. No other occurs twice, and within
            one array none is a source.

    Static: interpret, name, num_ctas. Compiled by itself where the caller is not: references need a program.
    """
    num_places, num_elements = target.shape
    pieces = cut(num_elements, target.dtype.itemsize)
    target_ref = mosaic_gpu.in_place(target.reshape(num_places, *pieces))
    indices = (sources, targets)
    operands = (*indices, target_ref) if source is None else (*indices, target_ref, source.reshape(-1, *pieces))

    def body(sources_ref: Any, targets_ref: Any, target_ref: Any, *rest: Any) -> None:
        *given, buffers, arrived = rest
        source_ref = given[0] if given else target_ref
        refs = _Refs(sources_ref, targets_ref, source_ref, target_ref, buffers, arrived)
        _move_pieces(refs, sources.size, num_places, pieces.count, num_ctas)

    mosaic_gpu.call(
        body,
        operands,
        scratch=(
            plgpu.SMEM((WARPGROUPS * SLOTS, pieces.rows, pieces.columns), target.dtype),
            plgpu.Barrier(num_barriers=WARPGROUPS * SLOTS),
        ),
        num_ctas=num_ctas,
        warpgroups=WARPGROUPS,
        interpret=interpret,
        name=name,
    )
    return jax.freeze(target_ref).reshape(target.shape)


class _Refs(NamedTuple):
    sources: Any
    targets: Any
    source: Any
    target: Any
    buffers: Any
    arrived: Any


def _move_pieces(refs: _Refs, num_units: int, num_places: int, pieces: int, num_ctas: int) -> None:
    """Each warpgroup takes every `workers`-th piece of all units; a slot is refilled once its piece has been read."""
    warpgroup = lax.axis_index("warpgroup")
    worker, workers = warpgroup * num_ctas + lax.axis_index("cta"), WARPGROUPS * num_ctas
    mine = divide_up(lax.max(num_units * pieces - worker, 0), workers)

    def at(nth: Any) -> tuple[Any, Any, Any]:
        """The unit, the piece of it and the slot of the warpgroup's nth piece."""
        number = worker + nth * workers
        return divide(number, pieces), remainder(number, pieces), warpgroup * SLOTS + remainder(nth, SLOTS)

    def fetch(nth: Any, carry: Any) -> Any:
        unit, piece, slot = at(nth)

        @pl.when(refs.targets[unit] < num_places)
        def _() -> None:
            source = refs.source.at[refs.sources[unit], piece]
            plgpu.copy_gmem_to_smem(source, refs.buffers.at[slot], refs.arrived.at[slot])

        return carry

    def forward(nth: Any, carry: Any) -> Any:
        unit, piece, slot = at(nth)
        place = refs.targets[unit]

        @pl.when(place < num_places)
        def _() -> None:
            plgpu.barrier_wait(refs.arrived.at[slot])
            plgpu.copy_smem_to_gmem(refs.buffers.at[slot], refs.target.at[place, piece])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(nth + SLOTS < mine)
        def _() -> None:
            fetch(nth + SLOTS, carry)

        return carry

    loop(0, lax.min(mine, SLOTS), fetch, 0)
    loop(0, mine, forward, 0)
