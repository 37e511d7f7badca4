"""Sizes of the TPU kv write kernel. They change no bit of what is written. Not measured."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.common import require


@dataclass(frozen=True)
class Tiles:
    """How the TPU kernel cuts its work.

    Attributes:
        token_tile: tokens whose groups of rows are in flight at once. A read and a write of 64 groups of 8 rows, 8
            heads and 256 bfloat16 columns are 2 MiB each way, which hides HBM's latency of about 1 us.
        vmem_limit_mib: what the compiler may use of the core's vector memory.
    """

    token_tile: int = 64
    vmem_limit_mib: int = 32

    def __post_init__(self) -> None:
        fits = self.token_tile >= 16 and self.token_tile % 8 == 0
        require(fits, f"token_tile is {self.token_tile}: it must be a multiple of 8, and 16 at least")
        require(self.vmem_limit_mib >= 1, f"vmem_limit_mib is {self.vmem_limit_mib}: 1 at least")
