"""The residual add and the norm after it, in one pass on a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import FLOAT_DTYPES, name_of_dtype, require


def add_rms_norm(
    x: jax.Array,
    delta: jax.Array | None,
    weight: jax.Array,
    num_tokens: jax.Array,
    *,
    eps: float,
    dtype: DTypeLike,
    backend: str = "cpu",
) -> tuple[jax.Array, jax.Array]:
    """x + delta, and that / rms * weight (Zhang & Sennrich, arXiv:1910.07467 §4).

    Args:
        x, delta: float32 [T, D]; None adds nothing.
        weight: [D].
        num_tokens: i32[1] how many of the T, at the beginning, are computed. The others may come back as anything.
        dtype: what the normalised rows are rounded to: the next product's.
        backend: "cpu", after `native.build.load_kernels`, or "reference".

    Returns:
        float32 [T, D], and [T, D] of `dtype`.

    Raises:
        ValueError: the arrays do not fit each other.

    Donates: x, where nothing else reads it.
    """
    require(backend in ("cpu", "reference"), f"backend is {backend!r}: it must be cpu or reference")
    added = x if delta is None else delta
    fits = x.ndim == 2 and added.shape == x.shape and weight.shape == x.shape[1:]
    require(fits, f"x, delta and weight are {x.shape}, {added.shape} and {weight.shape}: [T, D], [T, D] and [D]")
    for name, array in (("x", x), ("delta", added)):
        require(array.dtype == jnp.float32, f"{name} is {array.dtype}: it must be float32")
    for name, found in (("weight", weight.dtype), ("dtype", dtype)):
        require(name_of_dtype(found) in FLOAT_DTYPES, f"{name} is {name_of_dtype(found)}: it must be {FLOAT_DTYPES}")
    if backend == "reference":
        total = x if delta is None else x + delta
        return total, normalised(total, weight, eps).astype(dtype)
    shapes = (jax.ShapeDtypeStruct(x.shape, jnp.float32), jax.ShapeDtypeStruct(x.shape, dtype))
    call = jax.ffi.ffi_call("jaxserve_add_rms_norm", shapes, input_output_aliases={0: 0})
    added = jnp.zeros((0,), jnp.float32) if delta is None else delta
    total, normed = call(x, added, weight, num_tokens, eps=float(eps))
    return total, normed


def normalised(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """The formula, float32 over the last axis."""
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + eps) * weight.astype(jnp.float32)
