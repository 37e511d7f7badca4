"""Tile sizes of the TPU attention kernel by chip. Static: nothing asks a device, and no run changes them.

A token's bits depend on `kv_tile`, so it is chosen from the model and the chip alone, never from how many tokens,
sequences or blocks a program has. None of these sizes was measured: they follow from the arithmetic below.
"""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.common import require

_MIB = 1 << 20
_LANES = 128
_DEFAULT_CHIP = "v5e"


@dataclass(frozen=True)
class Tiles:
    """How the TPU kernel cuts its work.

    Attributes:
        kv_tile: keys that are fetched and folded at once, a whole number of blocks. Decides bits.
        q_tile: tokens of a chunk that share a fetched tile.
        unrolled_heads: kv heads that are written out one after another, so that the units of the core overlap.
        vmem_limit_mib: what the compiler may use of the core's vector memory.
    """

    kv_tile: int
    q_tile: int
    unrolled_heads: int = 8
    vmem_limit_mib: int = 64

    def check(self, block_size: int) -> None:
        """Raises ValueError for sizes that the kernel cannot work with."""
        fits = self.kv_tile >= block_size and self.kv_tile % block_size == 0
        require(fits, f"kv_tile is {self.kv_tile}: it must be a whole number of blocks of {block_size} tokens")
        fits = self.kv_tile <= _LANES or self.kv_tile % _LANES == 0
        require(fits, f"kv_tile is {self.kv_tile}: past {_LANES} it must be a multiple of {_LANES}, a row of lanes")
        fits = self.q_tile >= 16 and self.q_tile % 16 == 0
        require(fits, f"q_tile is {self.q_tile}: it must be a multiple of 16, the rows of a bfloat16 tile")
        require(self.unrolled_heads >= 1, f"unrolled_heads is {self.unrolled_heads}: 1 at least")
        require(self.vmem_limit_mib >= 1, f"vmem_limit_mib is {self.vmem_limit_mib}: 1 at least")


@dataclass(frozen=True)
class Chip:
    """What the choice of tiles needs to know of a chip's core.

    Attributes:
        fetch_bytes: what one fetch should bring. HBM's latency is about 1 us; a fetch of this size takes a few, so that
            issuing it, and the first fetch of a call, weigh little (v5e 0.8 TB/s, v6e 1.6, tpu7x 3.7 a core).
        chunk_rows: rows (tokens x heads of a group) of a chunk's tile: enough for each key tile's products to take
            longer than its fetch (v5e: 240 operations a byte).
        vmem_limit_mib: half of the core's vector memory (128 MiB, tpu7x 64): XLA wants some for what stands around.
    """

    fetch_bytes: int
    chunk_rows: int
    vmem_limit_mib: int


CHIPS = {
    "v5e": Chip(fetch_bytes=2 * _MIB, chunk_rows=256, vmem_limit_mib=64),
    "v6e": Chip(fetch_bytes=4 * _MIB, chunk_rows=512, vmem_limit_mib=64),
    "tpu7x": Chip(fetch_bytes=4 * _MIB, chunk_rows=512, vmem_limit_mib=32),
}


def tiles_for(
    chip: str | None, *, num_kv_heads: int, group: int, head_dim: int, block_size: int, kv_itemsize: int
) -> Tiles:
    """The tiles of a chip for a model's heads, as one device has them.

    Args:
        chip: a name of `CHIPS`; None for sizes that fit all of them.
        group: query heads of a kv head.
        kv_itemsize: bytes of an element of the pool.
    """
    known = CHIPS.get(_DEFAULT_CHIP if chip is None else chip)
    require(known is not None, f"chip is {chip!r}: it must be one of {', '.join(CHIPS)}")
    assert known is not None
    limit = min(other.vmem_limit_mib for other in CHIPS.values()) if chip is None else known.vmem_limit_mib
    bytes_of_key = num_kv_heads * 2 * head_dim * kv_itemsize
    kv_tile = _power_of_two_below(known.fetch_bytes // bytes_of_key, lowest=max(_LANES, block_size), highest=1024)
    q_tile = _power_of_two_below(known.chunk_rows // group, lowest=16, highest=256)
    return Tiles(kv_tile, q_tile, vmem_limit_mib=limit)


def _power_of_two_below(value: int, lowest: int, highest: int) -> int:
    """The largest power of two up to `value`, within bounds that are powers of two themselves."""
    return min(max(1 << max(value.bit_length() - 1, 0), lowest), highest)
