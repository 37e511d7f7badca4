"""Every size decided once: from flags, model and memory to limits, or a refusal that names the remedy."""

from __future__ import annotations

import math
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine import compiled
from jaxserve.engine.compiled import use_compilation_cache
from jaxserve.engine.resolve import MAX_SWAP_BYTES, resolve_engine_config, swap_buckets, token_buckets, whole_buckets
from jaxserve.errors import ConfigError

BLOCK_BYTES = 2 * 2 * 2 * 8 * 4 * 16  # k and v, layers, kv heads, head_dim, float32, tokens


def resolve(model: ModelConfig, device: Any = None, **config: Any) -> Any:
    return resolve_engine_config(EngineConfig(**config), model, weight_bytes=0, device=device)


@pytest.mark.parametrize(
    ("max_tokens", "max_seqs", "smallest", "buckets"),
    [
        (256, 64, 2, (2, 8, 64, 256)),
        (256, 64, 1, (1, 8, 64, 256)),
        (2048, 256, 2, (2, 8, 64, 256, 1024, 2048)),
        (8192, 1024, 2, (2, 8, 64, 512, 1024, 4096, 8192)),
        (16, 16, 2, (2, 8, 16)),
        (3, 1, 2, (2, 3)),
        (3, 1, 1, (1, 3)),
        (2, 1, 2, (2,)),
        (1, 1, 1, (1,)),
    ],
)
def test_buckets_are_few_and_meet_both_bounds(
    max_tokens: int, max_seqs: int, smallest: int, buckets: tuple[int, ...]
) -> None:
    assert token_buckets(max_tokens, max_seqs, smallest) == buckets


@pytest.mark.parametrize(
    ("max_tokens", "max_seqs", "buckets"),
    [
        (256, 64, (256,)),
        (1024, 64, (1024,)),
        (2048, 64, (1024, 2048)),
        (2048, 1500, (1500, 2048)),
        (8, 8, (8,)),
        (1, 1, (1,)),
    ],
)
def test_one_program_serves_all_where_padding_costs_nothing(
    max_tokens: int, max_seqs: int, buckets: tuple[int, ...]
) -> None:
    assert whole_buckets(max_tokens, max_seqs) == buckets


def test_steps_are_larger_where_nobody_reads_before_the_end(model: ModelConfig) -> None:
    assert resolve(model).max_num_batched_tokens == 256
    assert resolve(model, stream_interval_ms=math.inf).max_num_batched_tokens == 1024
    assert resolve(model, stream_interval_ms=math.inf, max_num_batched_tokens=300).max_num_batched_tokens == 300
    assert resolve(model, max_num_seqs=300).max_num_batched_tokens == 300


@pytest.mark.parametrize(("dtype", "smallest"), [("float32", 1), ("bfloat16", 2), ("float16", 2)])
def test_one_row_has_a_program_of_its_own_in_float32_alone(dtype: Any, smallest: int, model: ModelConfig) -> None:
    assert resolve(replace(model, dtype=dtype)).token_buckets[0] == smallest


def test_a_pool_in_bytes_becomes_blocks(model: ModelConfig) -> None:
    limits = resolve(model, kv_cache_memory_bytes=10 * BLOCK_BYTES + 1, max_model_len=32)
    assert limits.num_blocks == 10
    assert limits.num_kv_tokens == 9 * 16
    assert limits.max_concurrency == 4.5


def test_a_pool_is_never_larger_than_could_be_used(model: ModelConfig) -> None:
    assert resolve(model, max_num_seqs=3).num_blocks == 3 * 4 + 1


@pytest.mark.parametrize(
    ("blocks_per_row", "block_bytes", "buckets"),
    [
        (64, 2**17, (8, 64)),
        (65, 2**17, (8, 64, 65)),
        (8192, 2**12, (8, 64, 512, 8192)),
        (8192, 2**21, (8, 32)),  # 32 blocks are 64 MiB
        (8192, 2**27, (1,)),
        (8, 2**12, (8,)),
        (1, 2**12, (1,)),
    ],
)
def test_swaps_go_in_few_sizes_of_bounded_bytes(blocks_per_row: int, block_bytes: int, buckets: tuple) -> None:
    assert swap_buckets(blocks_per_row, block_bytes) == buckets
    assert buckets[-1] * block_bytes <= MAX_SWAP_BYTES or buckets == (1,)


def test_swap_space_in_gib_becomes_blocks_no_more_than_could_wait(model: ModelConfig) -> None:
    small = resolve(model, max_num_seqs=8, swap_space=10.5 * BLOCK_BYTES / 2**30)
    assert (small.num_swap_blocks, small.swap_buckets) == (10, (4,))
    assert resolve(model, max_num_seqs=8).num_swap_blocks == 8 * 4
    none = resolve(model, max_num_seqs=8, swap_space=0)
    assert (none.num_swap_blocks, none.swap_buckets) == (0, ())


def test_an_accelerator_gets_what_its_memory_leaves(model: ModelConfig) -> None:
    stats = {"bytes_limit": 2**30, "bytes_in_use": 2**29}
    gpu = SimpleNamespace(platform="gpu", device_kind="a GPU", memory_stats=lambda: stats)
    limits = resolve(model, gpu, gpu_memory_utilization=0.6, max_num_seqs=4096, max_num_batched_tokens=4096)
    assert 0 < limits.num_blocks * BLOCK_BYTES < 0.1 * 2**30
    silent = SimpleNamespace(platform="gpu", device_kind="a GPU", memory_stats=lambda: None)
    with pytest.raises(ConfigError, match=r"a GPU does not report its memory\. Set kv_cache_memory_bytes"):
        resolve(model, silent)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_num_seqs": 8, "max_num_batched_tokens": 4}, "max_num_batched_tokens=4 must be at least max_num_seqs=8"),
        ({"max_model_len": 65}, "max_model_len=65 is more than the model's 64 positions"),
        ({"kv_cache_memory_bytes": BLOCK_BYTES}, "No room for a KV cache"),
        ({"num_gpu_blocks_override": 3, "max_model_len": 64}, "Set max_model_len to at most 32"),
    ],
)
def test_contradictions_are_refused(model: ModelConfig, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(model, **config)


@pytest.mark.parametrize(
    "config",
    [
        {"block_size": 12},
        {"block_size": 0},
        {"max_num_seqs": 0},
        {"max_model_len": -1},
        {"max_num_batched_tokens": True},
        {"gpu_memory_utilization": 0.0},
        {"gpu_memory_utilization": 1.1},
        {"num_gpu_blocks_override": 1},
        {"swap_space": -1.0},
        {"swap_space": float("nan")},
    ],
    ids=str,
)
def test_values_out_of_bounds_are_named(config: dict[str, Any]) -> None:
    (name, value) = next(iter(config.items()))
    with pytest.raises(ConfigError, match=f"{name} must be .*{value}"):
        EngineConfig(**config)


def test_the_compilation_cache_must_be_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: dict[str, Any] = {}
    monkeypatch.setattr("jax.config.update", updates.__setitem__)
    made = use_compilation_cache(str(tmp_path / "a" / "xla"))
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert not updates, "jax's own cache, where ours works"
    monkeypatch.setattr(compiled, "is_supported", lambda: False)
    assert use_compilation_cache(str(made)) == made
    assert updates["jax_compilation_cache_dir"] == str(made)
    made.chmod(0o770)
    with pytest.raises(ConfigError, match="mode 0700"):
        use_compilation_cache(str(made))
    made.chmod(0o700)
    (tmp_path / "link").symlink_to(made)
    with pytest.raises(ConfigError, match="must be a folder that belongs to this user"):
        use_compilation_cache(str(tmp_path / "link"))
