"""What a softmax over some keys comes to, and how two of those become one."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import PIECE, ROWS, Registers, power_of_two

LOG2_E = math.log2(math.e)
LOWEST = -(2.0**127)  # the maximum of no keys: a whole number, finite so that differences are numbers


class State(NamedTuple):
    """What a softmax over some keys comes to, for 64 rows.

    Attributes:
        top: f32[64] about the largest score, times log2 e, rounded to a whole number. So whatever rescales a state
            is a power of two: it multiplies without rounding, and no fused multiply-add changes a bit.
        total: f32[64] the sum of 2^(score - top).
        values: f32[64, 64] each: the sum of 2^(score - top) x value, in pieces of 64 columns.
    """

    top: jax.Array
    total: jax.Array
    values: tuple[jax.Array, ...]


def no_keys(registers: Registers, columns: int) -> State:
    """The state of no keys: merging it with another gives that other, bit for bit."""
    values = tuple(registers.full((ROWS, PIECE), 0.0) for _ in range(columns // PIECE))
    return State(registers.full((ROWS,), LOWEST), registers.full((ROWS,), 0.0), values)


def merge(registers: Registers, one: State, other: State) -> State:
    """The state of both states' keys, of 64 rows or, with numbers for `top` and `total`, of one."""
    top = lax.max(one.top, other.top)
    of_one, of_other = power_of_two(one.top - top), power_of_two(other.top - top)
    total = one.total * of_one + other.total * of_other
    if one.top.ndim == 1:
        of_one, of_other = registers.across(of_one, PIECE), registers.across(of_other, PIECE)
    values = tuple(a * of_one + b * of_other for a, b in zip(one.values, other.values, strict=True))
    return State(top, total, values)


def with_sink(registers: Registers, state: State, sink: jax.Array) -> State:
    """The state with one more score, times log2 e, whose value is nothing."""
    top = lax.max(state.top, lax.round(sink, lax.RoundingMethod.TO_NEAREST_EVEN))
    scale = power_of_two(state.top - top)
    total = state.total * scale + lax.exp2(sink - top)
    wide = registers.across(scale, PIECE) if scale.ndim == 1 else scale
    return State(top, total, tuple(piece * wide for piece in state.values))


def without_zeros(registers: Registers, total: jax.Array) -> jax.Array:
    """The totals to divide by: 1 for rows of the stream's padding, which saw no key."""
    one = jnp.full_like(total, 1.0) if total.ndim == 0 else registers.full(total.shape, 1.0)
    return lax.select(total == jnp.float32(0.0), one, total)


def finished(values: jax.Array, total: jax.Array, v_scale: Any) -> jax.Array:
    """Weighted sums to averages, fp8 values to real ones. IEEE division: the same bits wherever it is compiled."""
    average = values / total
    return average if v_scale is None else average * v_scale
