"""The TPU interpreter with its race detector, which reports to a module of jax's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

# What nobody wrote is NaN, reads out of bounds raise, and a DMA moves only when it is waited for.
CHECKED = pltpu.InterpretParams(detect_races=True)


def run_checked(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of a call of TPU kernels.

    Raises:
        AssertionError: two of its accesses were not ordered by a semaphore (newer jax raises by itself).
    """
    try:
        out = jax.block_until_ready(function(*arguments, **options))
    finally:
        races = interpret_pallas_call.races
        found = races is not None and races.races_found
        pltpu.reset_tpu_interpret_mode_state()
    assert races is not None, "no kernel ran in the interpreter with race detection"
    assert not found, "the kernel has a race: see the interpreter's lines above"
    return out
