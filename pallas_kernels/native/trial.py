"""Whether the CPU's kernels are right on this machine: a compiler, or a processor, that nobody has tried may err."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.common import FLOAT_DTYPES
from pallas_kernels.linear.api import gated_linear, linear, to_panels
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.ref import attention_reference

# Of the largest sum of magnitudes. A float32 chain over 130 numbers errs by 2^-17 of it at most; what is rounded to
# bfloat16, a softmax weight or a result, errs by 2^-8.
_ALLOWED = 2.0**-15
_ALLOWED_ROUNDED = {"float32": 2.0**-15, "bfloat16": 2.0**-7}
_NUM_TOKENS, _NUM_INS, _NUM_OUTS = 14, 130, 64  # groups of rows of several sizes, and several panels
_LENGTHS, _NUM_QUERIES, _NUM_BLOCKS, _BLOCK_SIZE, _HEAD_DIM = (70, 1, 135), (1, 1, 7), 16, 16, 34


def kernels_error() -> str | None:
    """What is wrong with them, as a sentence; None if nothing is. They must be callable.

    Cost: a second, for compiling the references.
    """
    for dtype in FLOAT_DTYPES:
        reason = _products_error(dtype) or _attention_error(dtype)
        if reason is not None:
            return reason
    return None


def _products_error(dtype: str) -> str | None:
    x = _draw(1, (_NUM_TOKENS, _NUM_INS), dtype)
    weight = _draw(2, (2, _NUM_OUTS, _NUM_INS), dtype)
    panels, magnitudes = to_panels(weight), to_panels(jnp.abs(weight))
    largest = linear(jnp.abs(x), magnitudes, backend="reference").max()
    reason = _difference(f"products in {dtype}", linear(x, panels), linear(x, panels, backend="reference"), largest)
    if reason is not None:
        return reason
    wanted = gated_linear(x, panels, backend="reference")
    scale = jnp.abs(wanted.astype(jnp.float32)).max() * (_ALLOWED_ROUNDED[dtype] / _ALLOWED)
    return _difference(f"gated products in {dtype}", gated_linear(x, panels), wanted, scale)


def _attention_error(dtype: str) -> str | None:
    """Two decoding sequences and a chunk, in blocks out of order; NaN in the null block and in those of nobody."""
    order = jax.random.permutation(jax.random.key(3), jnp.arange(1, _NUM_BLOCKS, dtype=jnp.int32))
    needed = [-(-length // _BLOCK_SIZE) for length in _LENGTHS]
    tables = jnp.zeros((len(_LENGTHS), max(needed)), jnp.int32)
    for row, num in enumerate(needed):
        tables = tables.at[row, :num].set(order[sum(needed[:row]) :][:num])
    pool = _draw(4, (_NUM_BLOCKS, _BLOCK_SIZE, 2, 2 * _HEAD_DIM), dtype).at[0].set(jnp.nan)
    begins = [sum(_NUM_QUERIES[:row]) for row in range(len(_LENGTHS) + 1)]
    q = _draw(5, (begins[-1], 6, _HEAD_DIM), dtype)
    ints = (jnp.asarray(values, jnp.int32) for values in (_LENGTHS, begins, [len(_LENGTHS)], [2]))
    case = (q, pool, tables, *ints)
    found = ragged_paged_attention(*case, scale=_HEAD_DIM**-0.5, backend="cpu")
    wanted = jax.jit(partial(attention_reference, scale=_HEAD_DIM**-0.5))(*case)
    largest = jnp.nanmax(jnp.abs(pool.astype(jnp.float32))) * (_ALLOWED_ROUNDED[dtype] / _ALLOWED)
    return _difference(f"attention in {dtype}", found, wanted, largest)


def _draw(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def _difference(name: str, found: jax.Array, wanted: jax.Array, scale: jax.Array) -> str | None:
    worst = float(jnp.abs(found.astype(jnp.float32) - wanted.astype(jnp.float32)).max())
    allowed = _ALLOWED * float(scale)
    return None if worst <= allowed else f"the CPU's {name} are off by {worst:.3g}, where {allowed:.3g} is allowed"
