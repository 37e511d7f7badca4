"""From what the user asked to what is served: every size decided once, before anything is allocated."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import jax

from jaxserve.config import DTYPE_BYTES, DType, EngineConfig, EngineLimits, ModelConfig
from jaxserve.cpu_kernels import layers_skip_padding
from jaxserve.engine.attention import choose_attention
from jaxserve.errors import ConfigError
from jaxserve.models.params import choose_layers
from jaxserve.parallel.rules import check_divides

logger = logging.getLogger(__name__)

GIB = 2**30
KV_TILE = 128  # of 64, 64 rows at context 64 to 256 take a tenth more time, a chunk of 256 at 1,792 two fifths
CPU_KV_BYTES = 4 * GIB  # default pool on a CPU, where "the device's memory" is everybody's
MAX_SLOTS = 2**31 - 1  # of one array of the cache; the number past the last is padding's
MAX_SWAP_BYTES = 64 * 2**20  # one gather to host memory: its copy stands on the device until it has arrived


def resolve_engine_config(
    config: EngineConfig, model: ModelConfig, *, weight_bytes: int, device: Any = None, panels: bool = False
) -> EngineLimits:
    """Decides every size that `config` left open.

    Args:
        weight_bytes: what the parameters take on each device.
        device: one of the jax.Devices; the first one if None.
        panels: whether the weights lie in panels, whose products round alike in every step.

    Raises:
        ConfigError: the sizes asked for contradict each other or do not fit the memory.
    """
    device = jax.devices()[0] if device is None else device
    num_devices = config.tensor_parallel_size
    check_divides(model, num_devices)
    on_cpu = device.platform == "cpu"
    max_num_seqs = config.max_num_seqs or (64 if on_cpu else 256)
    max_tokens = config.max_num_batched_tokens or max(default_token_budget(config, on_cpu=on_cpu), max_num_seqs)
    if max_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens={max_tokens} must be at least max_num_seqs={max_num_seqs}: every running "
            "sequence feeds one token a step. Raise the first or lower the second."
        )
    exact = (on_cpu and (panels or model.dtype != "float32")) if config.exact is None else config.exact
    smallest = smallest_bucket(model.dtype, exact=exact, panels=panels)
    max_tokens = max(max_tokens, smallest)
    max_model_len = _max_model_len(config, model)
    kv_dtype: DType = model.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    num_blocks = _num_blocks(config, model, kv_dtype, max_num_seqs, max_tokens, max_model_len, weight_bytes, device)
    layers = choose_layers(model, config.stacked_layers)
    if layers.stacked:
        _check_slots(model.num_layers, num_blocks, config.block_size)
        logger.info("layers: stacked (%s)", layers.reason)
    max_model_len = _fit_model_len(config, max_model_len, num_blocks)
    block_bytes = num_devices * model.kv_bytes_per_token(kv_dtype, num_devices) * config.block_size  # on the host
    blocks_per_row = -(-max_model_len // config.block_size)
    # Who enters anew finds nobody who gave way before it: no more sequences wait swapped than there are rows.
    num_swap_blocks = min(int(config.swap_space * GIB) // block_bytes, max_num_seqs * blocks_per_row)
    kv_tile = max(KV_TILE if max_model_len <= 16_384 else 2 * KV_TILE, config.block_size)
    max_blocks_per_row = -(-max_model_len // kv_tile) * kv_tile // config.block_size
    attention = choose_attention(config, model, kv_dtype, device, (max_num_seqs, max_blocks_per_row))
    logger.info("attention: %s (%s)", attention.backend, attention.reason)
    skips_padding = panels and attention.backend == "cpu" and layers_skip_padding(model)
    return EngineLimits(
        max_model_len=max_model_len,
        block_size=config.block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        max_num_queued_reqs=config.max_num_queued_reqs,
        num_blocks=num_blocks,
        max_blocks_per_row=max_blocks_per_row,
        kv_dtype=kv_dtype,
        token_buckets=whole_buckets(max_tokens, max_num_seqs)
        if skips_padding
        else token_buckets(max_tokens, max_num_seqs, smallest),
        q_tile=128 if max_model_len <= 16_384 else 256,
        kv_tile=kv_tile,
        num_swap_blocks=num_swap_blocks,
        swap_buckets=swap_buckets(blocks_per_row, block_bytes) if num_swap_blocks else (),
        max_decode_steps=min(config.max_decode_steps, config.block_size),  # so that a row opens one block at most
        exact=exact,
        attention=attention.backend,
        panels=panels,
        skips_padding=skips_padding,
        tensor_parallel_size=num_devices,
        stacked_layers=layers.stacked,
    )


def default_token_budget(config: EngineConfig, *, on_cpu: bool) -> int:
    """Tokens a step where `config` does not say.

    On a CPU 1,024 where nobody reads before the end: 64 requests then take 12 to 17 % less time than in steps of 256,
    long prompts 5 to 11 (SmolLM2-135M's shape, the demo). Who reads along would wait for it four times as long.
    """
    if not on_cpu:
        return 2048
    return 1024 if math.isinf(config.stream_interval_ms) else 256


def smallest_bucket(dtype: DType, *, exact: bool, panels: bool) -> int:
    """Tokens of the smallest program: eight over panels, else one in float32, two in 16-bit types and in exact mode.

    XLA:CPU converts the whole weight of a one-row 16-bit product: 22 ms instead of 2. In float32 one row takes
    a third of the time of two, but is summed in another order; from two rows up all programs give the same bits.
    """
    if panels:
        return 8
    return 1 if dtype == "float32" and not exact else 2


def whole_buckets(max_num_batched_tokens: int, max_num_seqs: int) -> tuple[int, ...]:
    """Token counts to compile where padding costs nothing: one, and the budget where that is larger.

    What is still computed for every token of a program, cos and sin of its position first of all, is little beside a
    step of one token with 1,024 of them, and would not be with 8,192.
    """
    return tuple(sorted({max(min(max_num_batched_tokens, 1024), max_num_seqs), max_num_batched_tokens}))


def token_buckets(max_num_batched_tokens: int, max_num_seqs: int, smallest: int) -> tuple[int, ...]:
    """Token counts to compile: `smallest`, 8, 64, 512 ... up to the rows, then steps of four up to the budget.

    Few, because each costs about 4 s of a core at start. Padding a small step costs little: it reads
    the same weights. The steady states (all rows decoding; a full budget) are met exactly.
    """
    buckets = {max(max_num_seqs, smallest), max_num_batched_tokens}
    buckets |= {size for size in (smallest, 8, 64, 512) if size < max_num_seqs}
    size = 4 * max_num_seqs
    while size < max_num_batched_tokens:
        buckets.add(size)
        size *= 4
    return tuple(sorted(buckets))


def swap_buckets(blocks_per_row: int, block_bytes: int) -> tuple[int, ...]:
    """Block counts to compile copies to and from host memory for: 8, 64, 512 up to one sequence, or 64 MiB."""
    largest = max(min(blocks_per_row, MAX_SWAP_BYTES // block_bytes), 1)
    return (*(size for size in (8, 64, 512) if size < largest), largest)


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is None:
        return model.max_position
    if config.max_model_len > model.max_position:
        raise ConfigError(
            f"max_model_len={config.max_model_len} is more than the model's {model.max_position} positions. "
            "Lower it, or set rope scaling in the model's config.json."
        )
    return config.max_model_len


def _num_blocks(
    config: EngineConfig,
    model: ModelConfig,
    kv_dtype: DType,
    max_num_seqs: int,
    max_tokens: int,
    max_model_len: int,
    weight_bytes: int,
    device: Any,
) -> int:
    block_bytes = model.kv_bytes_per_token(kv_dtype, config.tensor_parallel_size) * config.block_size
    blocks_per_row = -(-max_model_len // config.block_size)
    useful = max_num_seqs * blocks_per_row + 1  # more could never be in use
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    if config.kv_cache_memory_bytes is not None:
        num_bytes, asked = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    else:
        num_bytes, asked = _available_bytes(config, model, max_num_seqs, max_tokens, weight_bytes, device), "memory"
    num_blocks = min(num_bytes // block_bytes, useful)
    if num_blocks < 2:
        raise ConfigError(
            f"No room for a KV cache: {asked} leaves {num_bytes} bytes and one block of {config.block_size} tokens "
            f"takes {block_bytes}. Raise kv_cache_memory_bytes or gpu_memory_utilization."
        )
    return int(num_blocks)


def _check_slots(num_layers: int, num_blocks: int, block_size: int) -> None:
    """Whether an int32 can say where a token of any layer lies."""
    most = MAX_SLOTS // (num_layers * block_size)
    if num_blocks > most:
        raise ConfigError(
            f"{num_blocks} blocks of {block_size} tokens in {num_layers} stacked layers are more places than an int32 "
            f"has numbers for. Set num_gpu_blocks_override to at most {most}, or stacked_layers to False."
        )


def _available_bytes(
    config: EngineConfig,
    model: ModelConfig,
    max_num_seqs: int,
    max_tokens: int,
    weight_bytes: int,
    device: Any,
) -> int:
    """What is left for KV on each device by its own account, or a fixed share of a CPU's memory, which all share."""
    if device.platform == "cpu":
        pages, page_bytes = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        of_all = min(CPU_KV_BYTES, int(config.gpu_memory_utilization * pages * page_bytes))
        return of_all // config.tensor_parallel_size
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    if limit is None:
        raise ConfigError(f"{device.device_kind} does not report its memory. Set kv_cache_memory_bytes.")
    used = max(stats.get("bytes_in_use", 0), weight_bytes)
    activations = _activation_bytes(model, max_num_seqs, max_tokens, config.tensor_parallel_size)
    return int(config.gpu_memory_utilization * limit) - used - activations


def _activation_bytes(model: ModelConfig, max_num_seqs: int, max_tokens: int, num_devices: int) -> int:
    """An upper estimate of a step's temporaries and of `DecodeState` on each device, float32."""
    cut = 4 * model.intermediate_size + 4 * model.num_heads * model.head_dim
    width = 4 * model.hidden_size + -(-cut // num_devices)
    logits = 6 * -(-min(max_num_seqs, max_tokens) // num_devices) * model.vocab_size
    return DTYPE_BYTES["float32"] * (max_tokens * width + logits + 2 * max_num_seqs * model.vocab_size)


def _fit_model_len(config: EngineConfig, max_model_len: int, num_blocks: int) -> int:
    """The context that the pool can hold for one request; an explicit longer one is refused."""
    fits = (num_blocks - 1) * config.block_size
    if fits >= max_model_len:
        return max_model_len
    if config.max_model_len is not None:
        raise ConfigError(
            f"max_model_len={max_model_len} needs more KV than there is: the pool holds {fits} tokens. "
            f"Set max_model_len to at most {fits}, or raise kv_cache_memory_bytes."
        )
    return fits
