"""Timing work on an accelerator, and random arrays made there.

A round hands the device many calls without waiting and waits once, for the last: a device works off what it was handed
in order, so that the next call's dispatch hides behind this one's work. A figure is the median of the rounds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

MAX_CALLS = 2000


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds a call: the rounds' median, and the slowest less the quickest over it, in percent."""

    seconds: float
    spread: float


def time_calls(call: Callable[[int], Any], *, round_s: float = 0.15, rounds: int = 5) -> Timing:
    """What `call(index)` takes; index counts on, so that calls may take their inputs in turn.

    Args:
        call: dispatches device work and returns an array of its last result. Called thrice before time counts:
            compilation, first touch of the memory, and how many calls a round has.
        round_s: about how long a round shall take.
        rounds: at least 3.
    """
    assert rounds >= 3, rounds
    for index in range(2):
        jax.block_until_ready(call(index))
    begin = time.perf_counter()
    jax.block_until_ready(call(2))
    once_s = time.perf_counter() - begin
    count = max(1, min(MAX_CALLS, math.ceil(round_s / once_s)))
    laps_s, index = [], 3
    for _ in range(rounds):
        begin, out = time.perf_counter(), None
        for _ in range(count):
            out = call(index)
            index += 1
        jax.block_until_ready(out)
        laps_s.append((time.perf_counter() - begin) / count)
    median = statistics.median(laps_s)
    return Timing(median, 100 * (max(laps_s) - min(laps_s)) / median)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _random_values(seed: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    index = jnp.full(shape, seed, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    mixed = (index ^ (index >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    mixed = (mixed ^ (mixed >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    mixed = mixed ^ (mixed >> jnp.uint32(16))
    unit = (mixed >> jnp.uint32(8)).astype(jnp.float32) * jnp.float32(2.0**-23) - jnp.float32(1)
    return (unit * jnp.float32(math.sqrt(3))).astype(dtype)


def random_values(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Values uniform in ±√3, of deviation one, made where they will lie.

    Each is a hash of its place and the seed ("lowbias32", C. Wellons, 2018): one kernel that holds nothing beside its
    result, where `jax.random.normal` of 17 GB of bfloat16 would hold 34 GB of float32. They repeat after 2^32 values.
    """
    return _random_values(jnp.uint32(seed % 2**32), shape, jnp.dtype(dtype).name)


def memory_bytes() -> int:
    """What this process may take of the device's memory; a bound that is safe everywhere where it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", 4 * 2**30))
