"""`SwapStore`: the bytes of swapped blocks in host memory, one slot a block.

Owns the memory and the transfers into it. Which slot holds what, and for whom, is `cache.swap.HostPool`'s business.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxserve.errors import EngineError
from jaxserve.metrics import SwapTotals

_PINNED = "pinned_host"


def staging_memory(device: Any) -> str | None:
    """The kind of host memory through which the blocks of a jax.Device come, None for its default.

    An accelerator's come through pinned memory where it has that kind: into pageable memory the driver copies while
    the caller waits. On a CPU they lie in host memory already; a pinned copy would add 0.1 to 0.5 ms a MB.
    """
    kinds = {memory.kind for memory in device.addressable_memories()}
    return _PINNED if device.platform != "cpu" and _PINNED in kinds else None


@dataclass(frozen=True, slots=True, eq=False)
class _Transfer:
    """Blocks on their way: the first `len(slots)` of the array, which ends with padding."""

    payload: Any  # a jax.Array; jax's stubs do not tell of `is_ready`
    slots: np.ndarray


class SwapStore:
    """Slots of host memory for blocks of one KV cache.

    Transfers in are asynchronous and land in the order in which they began: a slot that was given to another block
    while its old content was still on the way ends with the new one. Seconds are the caller's, which the loop could not
    spend otherwise; the copies themselves overlap with steps.

    Attributes:
        out, back: blocks, bytes and seconds to the host, and back, since the store was made.
    """

    def __init__(
        self,
        num_slots: int,
        block_shape: tuple[int, ...],
        dtype: np.dtype | type,
        *,
        verify: bool = False,
        staging: str | None = None,
    ) -> None:
        """
        Args:
            block_shape: of one block in all layers, [L, C, K, 2H].
            verify: keep a checksum of each slot, and check it when the slot is read.
            staging: the kind of memory that transfers go through (`staging_memory`).
        """
        # Pages are touched when first written: what nobody swaps takes no memory.
        self._slots = np.empty((num_slots, *block_shape), dtype)
        self._checksums = np.zeros(num_slots, np.uint32) if verify else None
        self._staging = staging
        self._pending: deque[_Transfer] = deque()
        self.out, self.back = SwapTotals(), SwapTotals()

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self._slots[:1].nbytes

    @property
    def num_pending(self) -> int:
        """Transfers that have not landed."""
        return len(self._pending)

    def put(self, payload: Any, slots: np.ndarray) -> None:
        """Begins to bring blocks to their slots; returns at once.

        Args:
            payload: [>= len(slots), L, C, K, 2H], on the device.
            slots: int32[n], distinct.
        """
        begin = time.perf_counter()
        if self._staging is None:
            payload.copy_to_host_async()
        else:
            payload = jax.device_put(payload, payload.sharding.with_memory_kind(self._staging))
        self._pending.append(_Transfer(payload, slots))
        self._count(self.out, len(slots), begin)

    def drain(self) -> None:
        """Takes in the transfers that are done; waits for none.

        Raises:
            Exception: whatever the device failed with on the way.
        """
        begin = time.perf_counter()
        while self._pending and self._pending[0].payload.is_ready():
            self._land()
        self._count(self.out, 0, begin)

    def read(self, slots: np.ndarray, size: int) -> np.ndarray:
        """A copy of the slots' content, after waiting for transfers that are still on the way to one of them.

        Args:
            slots: int32[n].
            size: blocks of the result, at least n; those past n are undefined.

        Raises:
            EngineError: a slot's content is not what was stored (only with `verify`).
            Exception: whatever the device failed with on the way.
        """
        begin = time.perf_counter()
        while any(np.isin(transfer.slots, slots).any() for transfer in self._pending):
            self._land()
        payload = np.empty((size, *self._slots.shape[1:]), self._slots.dtype)
        np.take(self._slots, slots, axis=0, out=payload[: len(slots)], mode="clip")
        if self._checksums is not None:
            self._check(slots, payload)
        self._count(self.back, len(slots), begin)
        return payload

    def lose_pending(self) -> np.ndarray:
        """Gives up what has not landed, after the device failed; returns int32[n] the slots that wait in vain."""
        lost = [transfer.slots for transfer in self._pending]
        self._pending.clear()
        return np.unique(np.concatenate([np.empty(0, np.int32), *lost]))

    def _land(self) -> None:
        """Copies the oldest transfer into its slots; waits for it."""
        transfer = self._pending[0]
        # The array may be the device's own memory, which the next program may get: copied, never kept.
        blocks = np.asarray(transfer.payload)[: len(transfer.slots)]
        if self._checksums is not None:
            self._checksums[transfer.slots] = [checksum(block) for block in blocks]
        self._slots[transfer.slots] = blocks
        del self._pending[0]

    def _check(self, slots: np.ndarray, payload: np.ndarray) -> None:
        assert self._checksums is not None
        for slot, block in zip(slots.tolist(), payload, strict=False):
            if checksum(block) != self._checksums[slot]:
                raise EngineError(
                    f"Slot {slot} of the swap space does not hold what was stored in it: the copy was torn or the "
                    "memory changed. The sequence is computed again."
                )

    def _count(self, totals: SwapTotals, num_blocks: int, begin: float) -> None:
        totals.blocks += num_blocks
        totals.bytes += num_blocks * self.block_bytes
        totals.seconds += time.perf_counter() - begin


def checksum(block: np.ndarray) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(block).view(np.uint8).reshape(-1).data)
