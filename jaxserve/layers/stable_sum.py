"""A sum whose order does not depend on how many rows are summed at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# XLA:CPU leaves a reduction of fewer elements to LLVM, which adds in another order than its kernel library
# (jax 0.10 and 0.12; `tests/device/test_exact_bits.py` notices if that changes).
_LIBRARY_ELEMENTS = 4096


def stable_sum(x: Float[Array, "... features"]) -> Float[Array, "..."]:
    """The sum over the last axis, float32; a row's bits are the same beside any number of other rows."""
    rows = x.reshape(-1, x.shape[-1])
    num_rows = rows.shape[0]
    missing = -(-_LIBRARY_ELEMENTS // x.shape[-1]) - num_rows
    if missing > 0:  # ones, because padding with zeros is simplified away
        rows = jnp.pad(rows, ((0, missing), (0, 0)), constant_values=1)
    rows = jax.lax.optimization_barrier(rows)  # what is fused into a reduction is summed as LLVM likes
    return jnp.sum(rows, axis=-1)[:num_rows].reshape(x.shape[:-1])


def log_sum_exp(x: Float[Array, "... features"]) -> Float[Array, "..."]:
    """log of the sum of exp over the last axis; a row's bits are the same beside any number of other rows.

    x must have a finite largest element in each row, or the row's result is not finite.
    """
    highest = jnp.max(x, axis=-1)
    return highest + jnp.log(stable_sum(jnp.exp(x - highest[..., None])))
