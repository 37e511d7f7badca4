"""What stands between a layer's first product and its attention, in one pass on a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common import FLOAT_DTYPES, name_of_dtype, require
from pallas_kernels.rms_norm.api import normalised


def rope_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    cache: jax.Array,
    slots: jax.Array,
    num_tokens: jax.Array,
    *,
    dtype: str,
    scale: float,
    eps: float = 0.0,
    bias: jax.Array | None = None,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    backend: str = "cpu",
) -> tuple[jax.Array, jax.Array]:
    """Rotated queries, and the cache with each token's rotated key and its value at its slot.

    Args:
        qkv: float32 [T, K, G + 2, H]: of each kv head its G queries, its key and its value.
        cos, sin: float32 [T, H / 2] of each token's angles; pairs (i, i + H / 2) turn (Su et al., arXiv:2104.09864).
        cache: [P, C, K, 2H] blocks, a key beside its value, of `dtype` or of its bits.
        slots: i32[T] block * C + offset; a token with any other number is written nowhere.
        num_tokens: i32[1] how many of the T, at the beginning, are computed. The others' queries may be anything.
        dtype: what queries, keys and values are rounded to.
        scale: what queries are multiplied by.
        eps, q_norm, k_norm: the norm of each query and key before it turns (Qwen3), with weights [H]; None for none.
        bias: [K, G + 2, H], added first.
        backend: "cpu", after `native.build.load_kernels`, or "reference".

    Returns:
        [T, K, G, H] of `dtype`, and the cache.

    Raises:
        ValueError: the arrays do not fit each other.

    Donates: cache, where the caller does: it is written in place.
    """
    _check(qkv, cos, sin, cache, slots, dtype, backend)
    if backend == "reference":
        heads = qkv if bias is None else qkv + bias.astype(jnp.float32)
        q = _turned(heads[:, :, :-2], cos, sin, q_norm, eps)
        k = _turned(heads[:, :, -2], cos, sin, k_norm, eps)
        kv = jnp.concatenate([k, heads[:, :, -1]], axis=-1).astype(dtype)
        is_written = (jnp.arange(len(slots)) < num_tokens) & (slots >= 0)
        return (q * scale).astype(dtype), _written(cache, kv, jnp.where(is_written, slots, cache.size))
    num_tokens_all, num_kv_heads, num_parts, head_dim = qkv.shape
    shapes = (
        jax.ShapeDtypeStruct((num_tokens_all, num_kv_heads, num_parts - 2, head_dim), dtype),
        jax.ShapeDtypeStruct(cache.shape, cache.dtype),
    )
    none = jnp.zeros((0,), jnp.float32)
    weights = (none if array is None else array for array in (bias, q_norm, k_norm))
    call = jax.ffi.ffi_call("jaxserve_rope_write", shapes, input_output_aliases={8: 1})
    q, cache = call(qkv, cos, sin, slots, *weights, num_tokens, cache, eps=float(eps), scale=float(scale))
    return q, cache


def _check(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, cache: jax.Array, slots: jax.Array, dtype: str, backend: str
) -> None:
    require(backend in ("cpu", "reference"), f"backend is {backend!r}: it must be cpu or reference")
    require(dtype in FLOAT_DTYPES, f"dtype is {dtype}: it must be one of {', '.join(FLOAT_DTYPES)}")
    is_right = qkv.ndim == 4 and qkv.shape[2] >= 3 and qkv.shape[3] % 2 == 0 and qkv.dtype == jnp.float32
    require(is_right, f"qkv is {qkv.dtype}{list(qkv.shape)}: it must be float32 [T, K, G + 2, H], H even")
    num_tokens, num_kv_heads, _, head_dim = qkv.shape
    for name, array in (("cos", cos), ("sin", sin)):
        fits = array.shape == (num_tokens, head_dim // 2) and array.dtype == jnp.float32
        require(fits, f"{name} is {array.dtype}{list(array.shape)}: float32 {[num_tokens, head_dim // 2]} is asked for")
    fits = cache.ndim == 4 and cache.shape[2:] == (num_kv_heads, 2 * head_dim)
    require(fits, f"the cache is {list(cache.shape)}: qkv asks for [P, C, {num_kv_heads}, {2 * head_dim}]")
    kinds = (dtype, "uint16") if dtype == "bfloat16" else (dtype,)
    require(name_of_dtype(cache.dtype) in kinds, f"the cache is {cache.dtype}: {' or '.join(kinds)} is asked for")
    fits = slots.shape == (num_tokens,) and slots.dtype == jnp.int32
    require(fits, f"slots are {slots.dtype}{list(slots.shape)}: int32 {[num_tokens]} are asked for")


def _turned(x: jax.Array, cos: jax.Array, sin: jax.Array, norm: jax.Array | None, eps: float) -> jax.Array:
    if norm is not None:
        x = normalised(x, norm, eps)
    low, high = jnp.split(x, 2, axis=-1)
    c, s = (jnp.expand_dims(part, tuple(range(1, x.ndim - 1))) for part in (cos, sin))
    return jnp.concatenate([low * c - high * s, high * c + low * s], axis=-1)


def _written(cache: jax.Array, kv: jax.Array, slots: jax.Array) -> jax.Array:
    if cache.dtype == jnp.uint16:
        kv = jax.lax.bitcast_convert_type(kv, jnp.uint16)
    return cache.reshape(-1, *cache.shape[2:]).at[slots].set(kv, mode="drop").reshape(cache.shape)
