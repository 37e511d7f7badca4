"""Which attention an engine runs: plain XLA, or the kernels for its device. Decided once, with a reason.

Kernels are tried before they serve: on the device at hand, with the model's heads, beside the reference. A driver, a
compiler or a chip that nobody has tried them on costs speed then, and no answer. A CPU's are tried once they are built.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import AttentionBackend, EngineConfig, EngineLimits, ModelConfig
from jaxserve.cpu_kernels import missing_cpu_kernels
from jaxserve.errors import ConfigError
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention, uncovered
from pallas_kernels.ragged_paged_attention.ref import attention_reference

logger = logging.getLogger(__name__)

KERNELS: dict[str, AttentionBackend] = {
    "tpu": "tpu",
    "gpu": "gpu",
    "cuda": "gpu",
    "cpu": "cpu",
}  # by a device's platform
# What an output may be off, as a share of the largest one, which is a value itself where a sequence has one key:
# weights and output are each rounded to the cache's dtype, 2^-8 in bfloat16. In float32 the sums over head_dim and keys
# err by far less than 2^-12; a device that multiplies in bfloat16 for it errs by more.
_TOLERANCE = {"bfloat16": 2.0**-7, "float32": 2.0**-12}


class Choice(NamedTuple):
    """An attention and why."""

    backend: AttentionBackend
    reason: str


def choose_attention(
    config: EngineConfig, model: ModelConfig, kv_dtype: str, device: Any, table_shape: tuple[int, int] = (1, 1)
) -> Choice:
    """What the configuration, the model and the kind of device ask for.

    Args:
        table_shape: of the block tables: rows, and blocks of each.

    Raises:
        ConfigError: kernels were asked for, and there are none for this.
    """
    if config.attention_backend == "xla":
        return Choice("xla", "asked for")
    missing = _uncovered(config, model, kv_dtype, device, table_shape)
    if missing is None:
        return Choice(KERNELS[device.platform], "asked for" if config.attention_backend == "pallas" else "covered")
    if config.attention_backend == "pallas":
        raise ConfigError(f"attention_backend=pallas cannot be had: {missing}. Set attention_backend to auto or xla.")
    return Choice("xla", missing)


def _uncovered(
    config: EngineConfig, model: ModelConfig, kv_dtype: str, device: Any, table_shape: tuple[int, int]
) -> str | None:
    """Why no kernel can be run, as a sentence."""
    kernels = KERNELS.get(device.platform)
    if kernels is None:
        return f"there are no kernels for {device.platform}"
    if kernels == "gpu":
        from pallas_kernels.gpu_generations import uncovered_device  # not needed where there is no GPU

        if (reason := uncovered_device(device)) is not None:
            return reason
    num_devices = config.tensor_parallel_size
    reason = uncovered(
        num_heads=model.num_heads // num_devices,
        num_kv_heads=model.num_kv_heads_over(num_devices) // num_devices,
        head_dim=model.head_dim,
        block_size=config.block_size,
        dtype=kv_dtype,  # queries are rounded to it
        kv_dtype=kv_dtype,
        backend=kernels,  # type: ignore[arg-type]
        table_shape=table_shape,
    )
    if reason is None and kernels == "cpu":
        return missing_cpu_kernels(config)  # builds them, if need be
    return reason


def try_attention(
    limits: EngineLimits, config: EngineConfig, model: ModelConfig, *, interpret: Any = False
) -> EngineLimits:
    """The limits, with plain XLA in the place of kernels whose answers are wrong on this device; says what runs.

    Args:
        interpret: as the kernels take it: for tests.

    Raises:
        ConfigError: kernels were asked for, and they fail.
    """
    if limits.attention in ("xla", "cpu"):  # a CPU's kernels are tried when they have been built
        return limits
    wrong = attention_error(limits, model, interpret=interpret)
    if wrong is None:
        logger.info("attention: Pallas kernels (%s), right beside the reference on this device", limits.attention)
        return limits
    if config.attention_backend == "pallas":
        raise ConfigError(f"attention_backend=pallas: {wrong}. Set attention_backend to auto or xla.")
    logger.warning("attention: xla, because %s", wrong)
    return replace(limits, attention="xla")


def attention_error(limits: EngineLimits, model: ModelConfig, *, interpret: Any = False) -> str | None:
    """What is wrong with the kernels' answer to a small mixed batch, as a sentence; None if it is right."""
    case = _case(limits, model)
    call = jax.jit(ragged_paged_attention, static_argnames=("scale", "backend", "interpret"))
    options: dict[str, Any] = {"scale": model.head_dim**-0.5}
    try:
        found = np.asarray(call(*case, **options, backend=limits.attention, interpret=interpret), np.float32)
    except Exception as error:  # a compiler's or a driver's: whatever it is, the other attention serves
        return f"the kernels fail here: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    wanted = np.asarray(jax.jit(partial(attention_reference, **options))(*case), np.float32)
    bound = _TOLERANCE[limits.kv_dtype] * float(np.abs(wanted).max())
    off = float(np.abs(found - wanted).max())
    return None if off <= bound else f"the kernels are off by {off:.3g} on this device, where {bound:.3g} is allowed"


def _case(limits: EngineLimits, model: ModelConfig) -> tuple[jax.Array, ...]:
    """Two decoding sequences and a chunk, in blocks out of order; NaN wherever nothing may be read."""
    rng, size = np.random.default_rng(0), limits.block_size
    num_kv = model.num_kv_heads_over(limits.tensor_parallel_size) // limits.tensor_parallel_size
    num_heads = model.num_heads // limits.tensor_parallel_size
    lengths, num_queries = (2 * size + 3, 1, 3 * size - 1), (1, 1, size + 5)
    tables = np.zeros((len(lengths), 4), np.int32)
    free = rng.permutation(np.arange(1, 1 + 4 * len(lengths)))
    pool = np.full((1 + len(free), size, num_kv, 2 * model.head_dim), np.nan, np.float32)
    for row, length in enumerate(lengths):
        used = -(-length // size)
        tables[row, :used], free = free[:used], free[used:]
        values = rng.standard_normal((length, *pool.shape[2:]))
        for start in range(0, length, size):
            part = values[start : start + size]
            pool[tables[row, start // size], : len(part)] = part
    q = rng.standard_normal((sum(num_queries), num_heads, model.head_dim))
    ints = (tables, np.array(lengths), np.cumsum([0, *num_queries]), np.array([len(lengths)]), np.array([2]))
    return (
        jnp.asarray(q, limits.kv_dtype),
        jnp.asarray(pool, limits.kv_dtype),
        *(jnp.asarray(values, jnp.int32) for values in ints),
    )
