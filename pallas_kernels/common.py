"""What all kernels share: the pool's shape, the checks of arguments, and what differs between jax 0.10 and 0.12.

Imports no backend: the modules that name `pallas.tpu` or `pallas.mosaic_gpu` are imported when they are asked for.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

Backend = Literal["tpu", "gpu", "cpu", "reference"]
# False: compile. True: the backend's interpreter with its defaults. Else the backend's own parameters
# (`pltpu.InterpretParams`, `plgpu.InterpretGPUParams`), for race detection.
Interpret = Any

BLOCK_SIZES = (16, 32, 64, 128)  # a bfloat16 tile of a TPU has 16 rows; past 128 tokens a block wastes memory
HEAD_DIMS = (64, 128, 256)
MAX_QUERIES_PER_KV_HEAD = 16
FLOAT_DTYPES = ("bfloat16", "float32")
FP8_DTYPES = ("float8_e4m3fn", "float8_e5m2")
MAX_CPU_HEAD_DIM = 512  # kernel_cpu.cc's kMaxHeadDim


class PoolShape(NamedTuple):
    """The sizes of a pool `cache [P, C, K, 2H]`: a head's key lies beside its value.

    Attributes:
        num_blocks: P, the null block 0 among them.
        block_size: C, tokens a block.
        num_kv_heads: K.
        head_dim: H.
    """

    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int


def require(holds: bool, message: str) -> None:
    """Raises ValueError(message) unless `holds`."""
    if not holds:
        raise ValueError(message)


def check_backend(backend: str, *, has_cpu: bool = False) -> None:
    """Raises ValueError for a backend that a kernel does not have."""
    names = [name for name in get_args(Backend) if has_cpu or name != "cpu"]
    require(backend in names, f"backend is {backend!r}: it must be one of {', '.join(names)}")


def uncovered_pool(block_size: int, head_dim: int, kv_dtype: Any, backend: Backend = "reference") -> str | None:
    """Why the kernels cannot work on such a pool, as a sentence; None if they can."""
    if backend == "cpu":
        return _uncovered_on_cpu(head_dim, kv_dtype)
    if block_size not in BLOCK_SIZES:
        return f"block_size is {block_size}: the kernels have {_listed(BLOCK_SIZES)}"
    if head_dim not in HEAD_DIMS:
        return f"head_dim is {head_dim}: the kernels have {_listed(HEAD_DIMS)}"
    if name_of_dtype(kv_dtype) not in FLOAT_DTYPES + FP8_DTYPES:
        names = _listed(FLOAT_DTYPES + FP8_DTYPES)
        return f"the cache holds {name_of_dtype(kv_dtype)}: the kernels have {names}; bitcast integers that hold floats"
    return None


def _uncovered_on_cpu(head_dim: int, kv_dtype: Any) -> str | None:
    """As `uncovered_pool`; blocks of any size will do."""
    if name_of_dtype(kv_dtype) not in FLOAT_DTYPES:
        return f"the cache holds {name_of_dtype(kv_dtype)}: the CPU's kernels have {_listed(FLOAT_DTYPES)}"
    if head_dim % 2 or head_dim > MAX_CPU_HEAD_DIM:
        return f"head_dim is {head_dim}: the CPU's kernels have even ones up to {MAX_CPU_HEAD_DIM}"
    return None


def held_dtype(cache: jax.Array, backend: Backend) -> jnp.dtype:
    """Of a pool's numbers. On a CPU uint16 holds the bits of bfloat16: XLA:CPU scatters those without converting."""
    return jnp.dtype(jnp.bfloat16) if backend == "cpu" and cache.dtype == jnp.uint16 else cache.dtype


def check_pool(cache: jax.Array, backend: Backend = "reference") -> PoolShape:
    """The sizes of a pool.

    Raises:
        ValueError: it is no [P, C, K, 2H], or no kernel works on its sizes or dtype.
    """
    require(cache.ndim == 4, f"cache has shape {cache.shape}: it must be [blocks, tokens, kv_heads, 2 * head_dim]")
    num_blocks, block_size, num_kv_heads, width = cache.shape
    require(num_blocks >= 2, f"cache has {num_blocks} blocks: 2 at least, since block 0 belongs to nobody")
    require(num_kv_heads >= 1, f"cache has shape {cache.shape}: one kv head at least")
    require(width % 2 == 0, f"cache's last axis is {width}: it must be even, a key and a value side by side")
    shape = PoolShape(num_blocks, block_size, num_kv_heads, width // 2)
    reason = uncovered_pool(block_size, shape.head_dim, held_dtype(cache, backend), backend)
    require(reason is None, str(reason))
    return shape


def check_ints(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `array` is int32 of that shape."""
    require(array.dtype == jnp.int32, f"{name} is {array.dtype}: it must be int32; use .astype(jnp.int32)")
    require(array.shape == shape, f"{name} has shape {array.shape}: it must be {shape}")


def check_scales(cache: jax.Array, k_scale: Any, v_scale: Any) -> None:
    """Raises ValueError unless an fp8 pool has both scales, each one number, and another pool has none."""
    given = [name for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)) if scale is not None]
    if is_fp8(cache.dtype):
        require(len(given) == 2, f"the cache holds {cache.dtype} and was given {given}: pass k_scale and v_scale")
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            require(jnp.ndim(scale) == 0, f"{name} has shape {jnp.shape(scale)}: one number for the whole layer")
    else:
        require(not given, f"the cache holds {cache.dtype} and was given {given}: scales are for fp8 only, leave them")


def past_pool_if_outside(ids: jax.Array, num_blocks: int) -> jax.Array:
    """Block ids with every one outside the pool as `num_blocks`: a negative index would count from the end."""
    return jnp.where((ids < 0) | (ids >= num_blocks), num_blocks, ids)


def name_of_dtype(dtype: Any) -> str:
    """'bfloat16' of jnp.bfloat16, of its dtype and of its name."""
    return jnp.dtype(dtype).name


def is_fp8(dtype: Any) -> bool:
    """Whether values of this dtype are stored divided by a scale."""
    return name_of_dtype(dtype) in FP8_DTYPES


def as_scale(scale: Any) -> jax.Array:
    """A scale as f32[1], as kernels read it; 1 for None."""
    return jnp.full((1,), 1.0 if scale is None else scale, jnp.float32)


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(str(value) for value in values)


# --- TPU ---------------------------------------------------------------------------------------------------

# The order in memory, outermost first, of the axes of a pool [P, C, K, 2H] on a TPU: a head's tokens lie one after
# another, so that its part of a block is whole tiles. A program whose pool lies otherwise copies all of it.
TPU_POOL_ORDER = (0, 2, 1, 3)


def tpu_pool_format(sharding: jax.sharding.Sharding) -> Any:
    """What a donated pool must be declared with, as a jit's input and output, for the TPU kernels to work in place."""
    from jax.experimental.layout import Format, Layout

    return Format(Layout(TPU_POOL_ORDER), sharding)


def by_head(cache: jax.Array) -> jax.Array:
    """[P, K, C, 2H] of a pool [P, C, K, 2H], and back. Of a pool in `tpu_pool_format` it moves nothing."""
    return jnp.swapaxes(cache, 1, 2)


def tpu_interpret(interpret: Interpret) -> Any:
    """The value of pallas_call's `interpret` for ours."""
    if interpret is not True:
        return interpret
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams()
