"""Sums, and functions of few elements, whose bits do not depend on how many rows there are."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# XLA:CPU leaves a reduction of fewer elements to LLVM, which adds in another order than its kernel library
# (jax 0.10 and 0.12; `tests/device/test_exact_bits.py` notices if that changes).
_LIBRARY_ELEMENTS = 4096
_LANES = 16  # jax 0.10: of 3 or 6 elements exp and log are other functions than of a multiple of 4


def stable_sum(x: Float[Array, "... features"]) -> Float[Array, "..."]:
    """The sum over the last axis, float32; a row's bits are the same beside any number of other rows."""
    rows = x.reshape(-1, x.shape[-1])
    return jnp.sum(_enough_rows(rows), axis=-1)[: rows.shape[0]].reshape(x.shape[:-1])


def log_sum_exp(x: Float[Array, "rows features"]) -> Float[Array, " rows"]:
    """log of the sum of exp over the last axis; a row's bits are the same beside any number of other rows.

    x must have a finite largest element in each row, or the row's result is not finite.
    """
    rows = _enough_rows(x)  # before exp, which the library computes otherwise, too (jax 0.10)
    highest = jnp.max(rows, axis=-1)
    total = jnp.sum(jax.lax.optimization_barrier(jnp.exp(rows - highest[:, None])), axis=-1)
    return (highest + stable_map(jnp.log, total))[: x.shape[0]]


def stable_exp(x: Float[Array, "rows features"]) -> Float[Array, "rows features"]:
    """exp(x), whose bits are the same beside any number of other rows."""
    return jax.lax.optimization_barrier(jnp.exp(_enough_rows(x)))[: x.shape[0]]


def _enough_rows(rows: Float[Array, "rows features"]) -> Float[Array, "more features"]:
    """The rows and as many of ones as it takes to have the library compute what is made of them."""
    missing = -(-_LIBRARY_ELEMENTS // rows.shape[1]) - rows.shape[0]
    if missing > 0:  # ones, because padding with zeros is simplified away
        rows = jnp.pad(rows, ((0, missing), (0, 0)), constant_values=1)
    return jax.lax.optimization_barrier(rows)  # what is fused into a reduction is summed as LLVM likes


def stable_map(function: Callable[[jax.Array], jax.Array], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """function(x), elementwise, by whole vectors and fused with nothing, so that each element has the same bits."""
    flat = jnp.pad(x.reshape(-1), (0, -x.size % _LANES))
    mapped = jax.lax.optimization_barrier(function(jax.lax.optimization_barrier(flat)))
    return mapped[: x.size].reshape(x.shape)
