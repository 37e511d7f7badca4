"""Tiles on their way from device memory to shared memory, and rows back: by the copy engine, or by threads."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_generations import Generation
from pallas_kernels.mosaic_gpu import PIECE, SWIZZLE_BYTES

_api: Any = plgpu  # what some version lacks


class Copies(NamedTuple):
    """A warpgroup's copies.

    The engine arrives at a barrier for each tile that it has brought. Threads cannot have that done (Mosaic GPU gives
    cp.async no barrier): they wait for all but their newest copies, and arrive then. The interpreter has the engine's
    copies only, so the others it makes at once, by a read and a write.

    Attributes:
        interpreted: whether the interpreter runs them.
        generation: whose instructions they become.
    """

    interpreted: bool
    generation: Generation

    @property
    def by_threads(self) -> bool:
        """Whether tiles are to be reported, once they have come."""
        return not self.generation.has_tma

    def widest_pattern(self, row_bytes: int) -> int:
        """Bytes that a swizzle of the tile may span: a warpgroup's four warps each copy a part of 16 rows or more, 8
        rows high, so without the engine a row is two patterns."""
        return min(SWIZZLE_BYTES, row_bytes // 2) if self.by_threads else SWIZZLE_BYTES

    def fetch(self, source: Any, target: Any, arrived: Any) -> None:
        """Begins to bring rows of device memory to shared memory; `arrived` is told, or see `report`."""
        if self.generation.has_tma:
            plgpu.copy_gmem_to_smem(source, target, arrived)
        elif self.interpreted:
            target[...] = source[...]
        else:
            _api.copy_gmem_to_smem(source, target, oob_mode=_api.OOBFillMode.PROMISE_IN_BOUNDS)

    def report(self, arrived: Any, newer: int) -> None:
        """Tells `arrived` of a tile that threads copy, since which `newer` copies have begun, once it is there."""
        if not self.interpreted:
            _api.wait_gmem_to_smem(newer)
        plgpu.barrier_arrive(arrived)

    def send(self, source: Any, target: Any) -> None:
        """Begins to bring rows of 64 numbers that were committed to device memory."""
        if self.generation.has_tma:
            plgpu.copy_smem_to_gmem(source, target)
        elif self.interpreted:
            target[...] = source[...]
        else:
            _api.store(target, plgpu.layout_cast(_api.load(source, optimized=False), _rows()), optimized=False)

    def sent(self) -> None:
        """Until the engine has read what it sends: its place in shared memory is free."""
        if self.generation.has_tma:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _rows() -> Any:
    """Rows of 64 with two numbers in each lane of a warp; all four warps hold, and store, the same."""
    tiling = _api.Tiling(((1, PIECE), (2,)))
    return _api.Layout.TILED(tiling, warp_dims=(_api.Replicated(4),), lane_dims=(-2,), vector_dim=-1)
