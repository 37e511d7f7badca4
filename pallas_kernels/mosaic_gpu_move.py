"""Units of one array to places of another on a GPU: what all but attention comes to.

By TMA through shared memory: the copy engine moves boxes of at most 256 x 256 elements, so a unit (a token's keys and
values, a block) is cut into equal pieces of up to 16 KiB. Each warpgroup has four pieces under way: with two in a CTA
128 KiB an SM, where 33 KB a microsecond and direction are its share of an H200's 4.3 TB/s. A GPU without the engine
moves pieces of up to 8 KiB through registers, 64 bytes of each in a thread's: four under way of each of four
warpgroups are 128 KiB an SM too.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.gpu_generations import Generation, generation_here
from pallas_kernels.mosaic_gpu import divide, divide_up, loop, remainder

SLOTS = 4
MAX_BOX = 256  # elements of a TMA box along each axis
_api: Any = plgpu  # what some version lacks


class Way(NamedTuple):
    """How pieces are moved.

    Attributes:
        warpgroups: of a CTA.
        piece_bytes: of the largest piece.
    """

    warpgroups: int
    piece_bytes: int


BY_ENGINE = Way(2, 16 * 1024)
BY_THREADS = Way(4, 8 * 1024)


class Pieces(NamedTuple):
    """How a unit is cut: [count, rows, columns]."""

    count: int
    rows: int
    columns: int


def cut(num_elements: int, item_bytes: int, way: Way) -> Pieces:
    """The fewest equal pieces that a copy takes. A unit is a multiple of 128 elements, a key and a value of 64."""
    columns = MAX_BOX if num_elements % MAX_BOX == 0 else MAX_BOX // 2
    rows = num_elements // columns
    most = min(MAX_BOX, way.piece_bytes // (columns * item_bytes))
    fitting = next(size for size in range(min(rows, most), 0, -1) if rows % size == 0)
    return Pieces(rows // fitting, fitting, columns)


def move(
    target: jax.Array,
    source: jax.Array | None,
    sources: jax.Array,
    targets: jax.Array,
    *,
    interpret: Any,
    name: str,
    num_ctas: int | None = None,
    generation: Generation | None = None,
) -> jax.Array:
    """`target` with target[targets[i]] = source[sources[i]] for each i, in place.

    Args:
        target: [places, elements of a unit].
        source: [units, elements of a unit]; None to move within `target`.
        sources: i32[n] into `source`; all inside.
        targets: i32[n] places; from the number of places on: nothing is moved. No other occurs twice, and within
            one array none is a source.
        num_ctas: None: one an SM.
        generation: whose instructions move; None: this process's GPU's.

    Static: interpret, name, num_ctas, generation.
    """
    generation = generation or generation_here(name, interpreted=bool(interpret))
    num_ctas = num_ctas or generation.num_sms
    way = BY_ENGINE if generation.has_tma else BY_THREADS
    return _move(target, source, sources, targets, interpret=interpret, name=name, num_ctas=num_ctas, way=way)


@partial(jax.jit, static_argnames=("interpret", "name", "num_ctas", "way"))
def _move(
    target: jax.Array,
    source: jax.Array | None,
    sources: jax.Array,
    targets: jax.Array,
    *,
    interpret: Any,
    name: str,
    num_ctas: int,
    way: Way,
) -> jax.Array:
    """`move`, compiled by itself where the caller is not: references need a program."""
    num_places, num_elements = target.shape
    pieces = cut(num_elements, target.dtype.itemsize, way)
    target_ref = mosaic_gpu.in_place(target.reshape(num_places, *pieces))
    indices = (sources, targets)
    operands = (*indices, target_ref) if source is None else (*indices, target_ref, source.reshape(-1, *pieces))

    def body(sources_ref: Any, targets_ref: Any, target_ref: Any, *rest: Any) -> None:
        given, scratch = rest[: len(operands) - 3], rest[len(operands) - 3 :]
        source_ref = given[0] if given else target_ref
        mover = _Mover(way, sources_ref, targets_ref, source_ref, target_ref, pieces.count, sources.size, num_ctas)
        if scratch:
            mover.move_by_engine(*scratch)
        else:
            mover.move_by_threads(bool(interpret))

    buffers = plgpu.SMEM((way.warpgroups * SLOTS, pieces.rows, pieces.columns), target.dtype)
    mosaic_gpu.call(
        body,
        operands,
        scratch=(buffers, plgpu.Barrier(num_barriers=way.warpgroups * SLOTS)) if way is BY_ENGINE else (),
        num_ctas=num_ctas,
        warpgroups=way.warpgroups,
        interpret=interpret,
        name=name,
    )
    return jax.freeze(target_ref).reshape(target.shape)


class _Mover(NamedTuple):
    """A warpgroup's part of the work: every `workers`-th piece of all units.

    Attributes:
        sources, targets: i32[units].
        source, target: [units, pieces, rows, columns].
    """

    way: Way
    sources: Any
    targets: Any
    source: Any
    target: Any
    pieces: int
    num_units: int
    num_ctas: int

    def unit_and_piece(self, nth: Any) -> tuple[Any, Any]:
        """Of the warpgroup's nth piece."""
        worker = lax.axis_index("warpgroup") * self.num_ctas + lax.axis_index("cta")
        number = worker + nth * (self.way.warpgroups * self.num_ctas)
        return divide(number, self.pieces), remainder(number, self.pieces)

    @property
    def count(self) -> jax.Array:
        """Of the warpgroup's pieces."""
        worker = lax.axis_index("warpgroup") * self.num_ctas + lax.axis_index("cta")
        return divide_up(lax.max(self.num_units * self.pieces - worker, 0), self.way.warpgroups * self.num_ctas)

    def move_by_engine(self, buffers: Any, arrived: Any) -> None:
        """A slot is refilled once its piece has been read."""
        mine, num_places = self.count, self.target.shape[0]
        first_slot = lax.axis_index("warpgroup") * SLOTS

        def fetch(nth: Any, carry: Any) -> Any:
            (unit, piece), slot = self.unit_and_piece(nth), first_slot + remainder(nth, SLOTS)

            @pl.when(self.targets[unit] < num_places)
            def _() -> None:
                source = self.source.at[self.sources[unit], piece]
                plgpu.copy_gmem_to_smem(source, buffers.at[slot], arrived.at[slot])

            return carry

        def forward(nth: Any, carry: Any) -> Any:
            (unit, piece), slot = self.unit_and_piece(nth), first_slot + remainder(nth, SLOTS)
            place = self.targets[unit]

            @pl.when(place < num_places)
            def _() -> None:
                plgpu.barrier_wait(arrived.at[slot])
                plgpu.copy_smem_to_gmem(buffers.at[slot], self.target.at[place, piece])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(nth + SLOTS < mine)
            def _() -> None:
                fetch(nth + SLOTS, carry)

            return carry

        loop(0, lax.min(mine, SLOTS), fetch, 0)
        loop(0, mine, forward, 0)

    def move_by_threads(self, interpreted: bool) -> None:
        """Four pieces are read before the first of them is written; past its last one a warpgroup reads that again."""
        mine, num_places = self.count, self.target.shape[0]

        def forward(turn: Any, carry: Any) -> Any:
            numbers = [turn * SLOTS + i for i in range(SLOTS)]
            places = [self.unit_and_piece(lax.min(nth, mine - 1)) for nth in numbers]
            contents = [read(self.source.at[self.sources[unit], piece], interpreted) for unit, piece in places]
            for nth, (unit, piece), content in zip(numbers, places, contents, strict=True):
                place = self.targets[unit]

                @pl.when((nth < mine) & (place < num_places))
                def _(target: Any = self.target.at[place, piece], content: Any = content) -> None:
                    write(target, content, interpreted)

            return carry

        loop(0, divide_up(mine, SLOTS), forward, 0)


def read(ref: Any, interpreted: bool) -> Any:
    return ref[...] if interpreted else _api.load(ref)


def write(ref: Any, content: Any, interpreted: bool) -> None:
    """As it was read: registers hold it in whatever order that has given."""
    if interpreted:
        ref[...] = content
    else:
        _api.store(ref, content)
