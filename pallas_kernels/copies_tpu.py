"""Many independent copies of blocks by the DMA engines of a TPU, some in flight at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import lax
from jax.experimental import pallas as pl

_IN_FLIGHT = 16  # blocks of 32 KiB and more: far past what HBM's latency of about 1 us asks for


def copy_all(count: int, wanted: Callable[[Any], Any], copy: Callable[[Any], Any]) -> None:
    """Starts and awaits copy(0) ... copy(count - 1), of those that are wanted.

    Args:
        wanted: i -> bool, the same whenever it is asked.
        copy: i -> a copy descriptor; all share a semaphore, and none reads or writes what another writes.
    """

    def each(first: Any, act: Callable[[Any], None]) -> None:
        def one(i: Any, carry: None) -> None:
            pl.when(wanted(i))(lambda: act(copy(i)))

        lax.fori_loop(first, lax.min(first + _IN_FLIGHT, count), one, None)

    def batch(index: Any, carry: None) -> None:
        each(index * _IN_FLIGHT, lambda descriptor: descriptor.start())
        each(index * _IN_FLIGHT, lambda descriptor: descriptor.wait())

    lax.fori_loop(0, pl.cdiv(count, _IN_FLIGHT), batch, None)
