"""Whether the CPU's kernels are right on this machine: a compiler, or a processor, that nobody has tried may err."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.common import FLOAT_DTYPES
from pallas_kernels.linear.api import gated_linear, linear, to_panels
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.ref import attention_reference

# Of the largest sum of magnitudes. A float32 chain over 130 numbers errs by 2^-17 of it at most; what is rounded to
# bfloat16, a softmax weight or a result, errs by 2^-8.
_ALLOWED = 2.0**-15
_ALLOWED_ROUNDED = {"float32": _ALLOWED, "bfloat16": 2.0**-7}
_NUM_TOKENS, _NUM_INS, _NUM_OUTS = 14, 130, 64  # groups of rows of several sizes, and several panels
_BLOCK_SIZE, _HEAD_DIM, _NUM_HEADS, _NUM_KV_HEADS = 16, 34, 6, 2
_LENGTHS, _BEGINS = (70, 1, 135), (0, 1, 2, 9)  # of keys, and where queries begin: two decode, one is a chunk
_TABLES = ((7, 3, 12, 1, 9, 0, 0, 0, 0), (4, 0, 0, 0, 0, 0, 0, 0, 0), (15, 2, 11, 5, 14, 6, 8, 13, 10))


def kernels_error() -> str | None:
    """What is wrong with them, as a sentence; None if nothing is. They must be callable.

    Cost: a second, for compiling the references.
    """
    for name, (off, allowed) in jax.jit(lambda: _differences())().items():  # traced at each call
        if not off <= allowed:
            return f"the CPU's {name} are off by {off:.3g}, where {allowed:.3g} is allowed"
    return None


def _differences() -> dict[str, tuple[jax.Array, jax.Array]]:
    """What was tried: how far it is off at most, and how far it may be."""
    found: dict[str, tuple[jax.Array, jax.Array]] = {}
    for dtype in FLOAT_DTYPES:
        x, weight = _values((_NUM_TOKENS, _NUM_INS), dtype), _values((2, _NUM_OUTS, _NUM_INS), dtype)
        panels, rounded = to_panels(weight), _ALLOWED_ROUNDED[dtype]
        largest = linear(jnp.abs(x), to_panels(jnp.abs(weight)), backend="reference").max()
        wanted = linear(x, panels, backend="reference")
        found[f"products in {dtype}"] = _worst(linear(x, panels), wanted), _ALLOWED * largest
        wanted = gated_linear(x, panels, backend="reference")
        off = _worst(gated_linear(x, panels), wanted)
        found[f"gated products in {dtype}"] = off, rounded * jnp.abs(wanted.astype(jnp.float32)).max()
        found[f"attention in {dtype}"] = _attention_difference(dtype), jnp.float32(rounded)  # no value is above 1
    return found


def _attention_difference(dtype: str) -> jax.Array:
    """In blocks out of order; NaN in the null block, which is nobody's."""
    num_blocks = 1 + max(map(max, _TABLES))
    pool = _values((num_blocks, _BLOCK_SIZE, _NUM_KV_HEADS, 2 * _HEAD_DIM), dtype).at[0].set(jnp.nan)
    q = 4 * _values((_BEGINS[-1], _NUM_HEADS, _HEAD_DIM), dtype)
    ints = (jnp.asarray(values, jnp.int32) for values in (_TABLES, _LENGTHS, _BEGINS, [len(_LENGTHS)], [2]))
    case = (q, pool, *ints)
    return _worst(
        ragged_paged_attention(*case, scale=_HEAD_DIM**-0.5, backend="cpu"),
        attention_reference(*case, scale=_HEAD_DIM**-0.5),
    )


def _values(shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Numbers in [-1, 1] without a pattern that a wrong order would keep."""
    return jnp.sin(jnp.arange(math.prod(shape), dtype=jnp.float32) ** 1.5).reshape(shape).astype(dtype)


def _worst(found: jax.Array, wanted: jax.Array) -> jax.Array:
    return jnp.abs(found.astype(jnp.float32) - wanted.astype(jnp.float32)).max()
