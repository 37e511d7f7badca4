"""Tile sizes of the TPU attention kernel by chip. Static: nothing asks a device, and no run changes them.

A token's bits depend on `kv_tile`, so it is chosen from the model and the chip alone, never from how many tokens,
sequences or blocks a program has. None of these sizes was measured: they follow from the arithmetic below.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pallas_kernels.common import require

_MIB = 1 << 20
_LANES = 128
_DEFAULT_CHIP = "v5e"
_TABLE_BYTES = 768 * 1024  # of a core's 1 MiB of scalar memory


@dataclass(frozen=True)
class Tiles:
    """How the TPU kernel cuts its work.

    Attributes:
        kv_tile: keys that are fetched and folded at once, a whole number of blocks. Decides bits.
        q_tile: tokens of a chunk that share a fetched tile.
        decode_heads, chunk_heads: kv heads whose folds are written out one after another (as many as divide the
            number of heads), so that the core's units overlap. Of 8 heads, 512 keys and 8 rows a fold takes 808
            cycles all at once and 990 in pairs; with 256 rows 4,436 and 4,780, and five times as long to compile (the
            compiler's own schedule for v5e).
        vmem_limit_mib: what the compiler may use of the core's vector memory.
    """

    kv_tile: int
    q_tile: int
    decode_heads: int = 8
    chunk_heads: int = 2
    vmem_limit_mib: int = 64

    def check(self, block_size: int) -> None:
        """Raises ValueError for sizes that the kernel cannot work with."""
        fits = self.kv_tile >= block_size and self.kv_tile % block_size == 0
        require(fits, f"kv_tile is {self.kv_tile}: it must be a whole number of blocks of {block_size} tokens")
        fits = self.kv_tile <= _LANES or self.kv_tile % _LANES == 0
        require(fits, f"kv_tile is {self.kv_tile}: past {_LANES} it must be a multiple of {_LANES}, a row of lanes")
        fits = self.q_tile >= 8 and self.q_tile % 8 == 0
        require(fits, f"q_tile is {self.q_tile}: it must be a multiple of 8, the rows of a tile of memory")
        for name in ("decode_heads", "chunk_heads", "vmem_limit_mib"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: 1 at least")


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
    tiles = Tiles(kv_tile, q_tile, vmem_limit_mib=limit)
    sizes = {"num_kv_heads": num_kv_heads, "group": group, "head_dim": head_dim, "kv_itemsize": kv_itemsize}
    while (
        tiles.q_tile > 8 and vmem_bytes(tiles, **sizes) > limit * _MIB * 3 // 4
    ):  # the rest is for intermediate values
        tiles = replace(tiles, q_tile=tiles.q_tile // 2)
    return tiles


def tables_past_scalar_memory(num_rows: int, table_width: int) -> str | None:
    """Why block tables of that shape cannot be handed to the TPU kernel, as a sentence; None if they can."""
    wanted = 4 * num_rows * table_width
    if wanted <= _TABLE_BYTES:
        return None
    found = f"block_tables of {num_rows} x {table_width} take {wanted} bytes of a TPU's scalar memory"
    return f"{found}, where {_TABLE_BYTES} may be used: use larger blocks, fewer rows or shorter contexts"


def vmem_bytes(tiles: Tiles, *, num_kv_heads: int, group: int, head_dim: int, kv_itemsize: int) -> int:
    """What a chunk's call keeps in vector memory, queries and outputs taken as float32."""
    rows = num_kv_heads * tiles.q_tile * group
    columns = max(head_dim, _LANES)
    buffers = 2 * tiles.kv_tile * num_kv_heads * 2 * head_dim * kv_itemsize
    state = 4 * rows * (2 * _LANES + columns)
    queries_and_outputs = 2 * 2 * 4 * rows * columns  # each twice: the next tile's come and the last one's go
    return buffers + state + queries_and_outputs


def _power_of_two_below(value: int, lowest: int, highest: int) -> int:
    """The largest power of two up to `value`, within bounds that are powers of two themselves."""
    return min(max(1 << max(value.bit_length() - 1, 0), lowest), highest)
