"""Root-mean-square normalisation (Zhang & Sennrich, arXiv:1910.07467 §4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.layers.stable_sum import stable_sum


def rms_norm(
    x: Float[Array, "... features"], weight: Float[Array, " features"], eps: float
) -> Float[Array, "... features"]:
    """float32 x / rms(x) * weight over the last axis."""
    x = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(stable_sum(jnp.square(x))[..., None] / x.shape[-1] + eps)
    return x * scale * weight.astype(jnp.float32)
