"""Tile sizes of the GPU attention kernel, and the arithmetic behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pallas_kernels.common import is_fp8, require
from pallas_kernels.gpu_generations import HOPPER, Generation

ROWS = 64  # of a product: queries of a tile times query heads of a kv head


@dataclass(frozen=True)
class Tiles:
    """Static sizes. `kv_tile` and `kv_split` decide the order of sums, so the bits; the others only the speed.

    A CTA has `lanes` independent workers, each two warpgroups: one copies keys and values by TMA into a ring of
    `ring` slots, one multiplies. A slot is [kv_tile, at most 128] of keys or of values: 16 KiB for bfloat16 tiles
    of 64 x 128 or 128 x 64. H200: 4.3 TB/s over 132 SMs are 33 KB/us each; at about 1 us from a request to its
    data 33 KB must be under way. Two lanes of 4 slots, the one being multiplied not counted, are 96 KiB: three
    times that. A slot takes a lane 1 us at that rate and about 0.4 us of tensor core, exponentials and sums.

    Attributes:
        kv_tile: keys multiplied at once; a multiple of 64.
        kv_split: keys, a whole number of tiles, summed from a fresh state before they are merged.
        ring: slots of a lane; 2 at least.
        lanes: workers of a CTA.
        num_ctas: one an SM.
        max_splits_held: pairs of a decoding sequence and a split of it whose states fit the scratch memory, which
            takes N x H x 4 bytes each; when a step has more, no sequence is cut.
        cut_below: decoding sequences are cut into splits when uncut ones would keep each worker busy less than
            this many times.
    """

    kv_tile: int = 64
    kv_split: int = 512
    ring: int = 4
    lanes: int = 2
    num_ctas: int = HOPPER.num_sms
    max_splits_held: int = 1024
    cut_below: int = 4

    def __post_init__(self) -> None:
        found = f"kv_tile is {self.kv_tile}, kv_split {self.kv_split}"
        require(self.kv_tile in (64, 128), f"{found}: a tile has 64 or 128 keys")
        require(self.kv_split >= 1 and self.kv_split % self.kv_tile == 0, f"{found}: a split is whole tiles")
        require(self.ring >= 2, f"ring is {self.ring}: 2 slots at least, one to fill while one is read")
        require(self.lanes in (1, 2), f"lanes is {self.lanes}: a CTA has room for 1 or 2")
        counts = (self.num_ctas, self.max_splits_held)
        require(min(counts) >= 1, f"num_ctas and max_splits_held are {counts}: 1 at least")

    @property
    def tiles_per_split(self) -> int:
        return self.kv_split // self.kv_tile

    @property
    def workers(self) -> int:
        return self.num_ctas * self.lanes


def terms_of(dtype: Any) -> int:
    """How many bfloat16 numbers hold one of this type: three for a float32's 24 bits, one for an fp8's 4."""
    return 3 if jnp.dtype(dtype) == jnp.float32 else 1


def columns_of_slot(head_dim: int, kv_dtype: Any) -> int:
    """How much of a key or a value a slot holds: 128, and 64 of 256 in float32, of which no wider one fits."""
    return min(head_dim, 64 if terms_of(kv_dtype) == 3 and head_dim == 256 else 128)


def shared_bytes(tiles: Tiles, head_dim: int, q_dtype: Any, kv_dtype: Any) -> int:
    """Shared memory of a CTA: queries, ring, what is converted before it is multiplied, rows on their way out."""
    slot = tiles.kv_tile * columns_of_slot(head_dim, kv_dtype)
    queries = ROWS * head_dim * 2 * terms_of(q_dtype)
    ring = tiles.ring * slot * jnp.dtype(kv_dtype).itemsize
    converted = 0 if jnp.dtype(kv_dtype) == jnp.bfloat16 else slot * 2 * terms_of(kv_dtype)
    outgoing = ROWS * 64 * (4 + jnp.dtype(q_dtype).itemsize)
    return tiles.lanes * (queries + ring + converted + outgoing) + 4096  # barriers, alignment, reductions


def default_tiles(head_dim: int, q_dtype: Any, kv_dtype: Any, generation: Generation = HOPPER) -> Tiles:
    """Tiles by what fits the generation's shared memory: as many slots as there is room for, 8 at most.

    Two lanes where a thread that multiplies can be given more registers than one that copies, and both fit.
    """
    wide_tile = 128 if head_dim == 64 and terms_of(kv_dtype) != 3 else 64
    two_lanes = generation.has_tma and terms_of(q_dtype) == 1 and head_dim < 256
    fitting = [
        tiles
        for lanes in ((1, 2) if two_lanes else (1,))
        for ring in range(2, 9)
        if shared_bytes(
            tiles := Tiles(kv_tile=wide_tile, ring=ring, lanes=lanes, num_ctas=generation.num_sms),
            head_dim, q_dtype, kv_dtype,
        ) <= generation.shared_bytes
    ]  # fmt: skip
    found = f"head_dim {head_dim}, {jnp.dtype(q_dtype)}"
    require(bool(fitting), f"no ring fits {generation.shared_bytes} bytes of shared memory at {found}")
    return fitting[-1]


def check_tiles(tiles: Tiles, head_dim: int, q_dtype: Any, kv_dtype: Any, generation: Generation = HOPPER) -> None:
    """Raises ValueError where the tiles do not fit an SM, or the GPU cannot read what is stored."""
    needed, most = shared_bytes(tiles, head_dim, q_dtype, kv_dtype), generation.shared_bytes
    kind = "fp8" if is_fp8(kv_dtype) else str(jnp.dtype(kv_dtype))
    found = f"{tiles.lanes} lanes of {tiles.ring} slots, head_dim {head_dim}, {kind} need {needed} bytes"
    require(needed <= most, f"{found} of shared memory: an SM has {most}; take fewer slots or lanes")
    what = f"the cache holds {jnp.dtype(kv_dtype)}: an {generation.name} GPU has no instruction that reads fp8"
    fits = generation.converts_fp8 or not is_fp8(kv_dtype)
    require(fits, f"{what}; compute capability 8.9 and later have one, and every cache can be kept in bfloat16")
