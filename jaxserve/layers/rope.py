"""Rotary position embedding (Su et al., arXiv:2104.09864) and its stretched variants.

Frequencies are computed once on the host, in float32 as the reference implementation does: at position
131,071 the rounding of `position * frequency` moves the angle by up to 0.004, so it is part of the model.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxserve.config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int, max_model_len: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies float32 [head_dim / 2] and the factor on cos and sin.

    Args:
        max_model_len: the length that "dynamic" scaling is fixed at (see `RopeConfig`).
    """
    inv_freq = _inverse_frequencies(rope.theta, head_dim)
    match rope.kind:
        case "default":
            return inv_freq, 1.0
        case "linear":
            return inv_freq / np.float32(rope.factor), 1.0
        case "dynamic":
            return _inverse_frequencies(_dynamic_theta(rope, head_dim, max_model_len), head_dim), 1.0
        case "llama3":
            return _llama3(rope, inv_freq), 1.0
        case "yarn":
            return _yarn(rope, inv_freq, head_dim)


def _inverse_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """float32 1 / theta^(2i/d), each operation rounded once, as the reference's are.

    numpy's own float32 power is up to 1.3 units in the last place off: 7.7e-3 on the cosine at position 131,071.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(np.float64(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / powers


def _dynamic_theta(rope: RopeConfig, head_dim: int, max_model_len: int) -> float:
    """NTK-aware base for a fixed length (transformers, `_compute_dynamic_ntk_parameters`)."""
    original = rope.original_max_position or max_model_len
    length = max(max_model_len, original)
    stretch = rope.factor * length / original - (rope.factor - 1)
    return rope.theta * stretch ** (head_dim / (head_dim - 2))


def _llama3(rope: RopeConfig, inv_freq: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths stretched, short ones kept, a ramp between (Llama 3 herd, §3.4.3)."""
    assert rope.original_max_position
    low = rope.original_max_position / rope.low_freq_factor
    high = rope.original_max_position / rope.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    stretched = np.where(wavelength > low, inv_freq / rope.factor, inv_freq)
    ramp = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = (1 - ramp) * stretched / rope.factor + ramp * stretched
    medium = (wavelength >= high) & (wavelength <= low)
    return np.where(medium, smooth, stretched).astype(np.float32)


def _yarn(rope: RopeConfig, inv_freq: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    """YaRN: interpolation by parts and attention temperature (Peng et al., arXiv:2309.00071 §3.2-3.4)."""
    original = rope.original_max_position
    assert original

    def correction_dim(rotations: float) -> float:
        wavelengths = original / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of width 0 has no slope
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    kept = (1 - ramp).astype(np.float32)
    blended = inv_freq / np.float32(rope.factor) * (1 - kept) + inv_freq * kept
    return blended.astype(np.float32), _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(scale: float, factor: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * factor * math.log(scale) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    return mscale(rope.factor)


def rope_tables(
    positions: Int[Array, " tokens"], rope: RopeConfig, head_dim: int, max_model_len: int
) -> tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]:
    """cos and sin, float32 [T, head_dim / 2], of each position's angles."""
    inv_freq, factor = rope_frequencies(rope, head_dim, max_model_len)
    angles = positions.astype(jnp.float32)[:, None] * inv_freq[None, :]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(
    x: Float[Array, "tokens heads head_dim"], cos: Float[Array, "tokens half"], sin: Float[Array, "tokens half"]
) -> Float[Array, "tokens heads head_dim"]:
    """Rotates the pairs (i, i + head_dim / 2), as Hugging Face checkpoints are laid out."""
    x1, x2 = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
