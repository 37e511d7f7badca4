"""Which attention runs and why; kernels that are wrong on a device do not serve; the engine on their interface."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine import attention, resolve
from jaxserve.engine.attention import Choice, attention_error, choose_attention, try_attention
from jaxserve.engine.engine import EngineCore
from jaxserve.engine.resolve import resolve_engine_config
from jaxserve.errors import ConfigError
from jaxserve.models.params import decoder_specs
from jaxserve.parallel.specs import init_arrays
from jaxserve.types import Delta

TPU = SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
HOPPER = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
AMPERE = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
BLACKWELL = SimpleNamespace(platform="gpu", device_kind="NVIDIA B200", compute_capability="10.0")
TURING = SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
METAL = SimpleNamespace(platform="METAL", device_kind="Metal")


@pytest.fixture(scope="module")
def wide(model: ModelConfig) -> ModelConfig:
    """Heads that kernels have."""
    return replace(model, num_heads=4, num_kv_heads=2, head_dim=64)


def choose(model: ModelConfig, device: Any, asked: str = "auto", dtype: str = "bfloat16", **config: Any) -> Choice:
    return choose_attention(EngineConfig(attention_backend=asked, **config), model, dtype, device)  # type: ignore[arg-type]


def test_kernels_are_for_their_devices(wide: ModelConfig) -> None:
    assert choose(wide, TPU) == ("tpu", "covered")
    assert choose(wide, HOPPER) == ("gpu", "covered")
    assert choose(wide, TPU, "pallas") == ("tpu", "asked for")
    assert choose(wide, TPU, "xla") == ("xla", "asked for")


@pytest.mark.parametrize("device", [AMPERE, BLACKWELL], ids=lambda device: device.device_kind)
def test_gpus_other_than_hopper_have_kernels_where_jax_has_their_instructions(wide: ModelConfig, device: Any) -> None:
    found = choose(wide, device)
    if jax.__version_info__ >= (0, 11):
        assert found == ("gpu", "covered")
    else:
        assert found.backend == "xla"
        assert "need jax 0.11" in found.reason


@pytest.mark.parametrize(
    ("device", "changes", "config", "dtype", "why"),
    [
        (METAL, {}, {}, "bfloat16", "there are no kernels for METAL"),
        (CPU, {}, {"tensor_parallel_size": 2}, "bfloat16", "the CPU's kernels run on one device"),
        (CPU, {}, {}, "float16", "the cache holds float16: the CPU's kernels have bfloat16, float32"),
        (CPU, {"head_dim": 514}, {}, "float32", "head_dim is 514: the CPU's kernels have even ones up to 512"),
        (TURING, {}, {}, "bfloat16", r"compute capability is 7\.5: the kernels have 8\.0, 8\.6"),
        (TPU, {"head_dim": 80}, {}, "bfloat16", "head_dim is 80: the kernels have 64, 128, 256"),
        (TPU, {}, {"block_size": 8}, "bfloat16", "block_size is 8: the kernels have 16, 32, 64, 128"),
        (HOPPER, {}, {}, "float16", "the cache holds float16"),
        (TPU, {"num_heads": 64, "num_kv_heads": 2}, {}, "bfloat16", "32 query heads share a kv head"),
    ],
)
def test_what_kernels_do_not_cover_runs_in_xla_and_is_named(
    wide: ModelConfig, device: Any, changes: dict, config: dict, dtype: str, why: str
) -> None:
    model = replace(wide, **changes)
    found = choose(model, device, dtype=dtype, **config)
    assert found.backend == "xla"
    with pytest.raises(ConfigError, match=rf"attention_backend=pallas cannot be had: .*{why}.*Set attention_backend"):
        choose(model, device, "pallas", dtype, **config)


def test_a_cpu_has_kernels_where_there_is_a_compiler(wide: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "missing_cpu_kernels", lambda _: None)
    assert choose(wide, CPU) == ("cpu", "covered")
    assert choose(replace(wide, head_dim=80, num_heads=34), CPU, dtype="float32", block_size=4) == ("cpu", "covered")
    assert choose(wide, CPU, "xla") == ("xla", "asked for")
    monkeypatch.setattr(attention, "missing_cpu_kernels", lambda _: "there is no C++ compiler")
    assert choose(wide, CPU) == ("xla", "there is no C++ compiler")
    with pytest.raises(ConfigError, match="attention_backend=pallas cannot be had: there is no C"):
        choose(wide, CPU, "pallas")


def test_tables_past_a_tpu_s_scalar_memory_run_in_xla(wide: ModelConfig) -> None:
    long = EngineConfig(max_num_seqs=256, max_model_len=131_072, num_gpu_blocks_override=9_000)
    model = replace(wide, max_position=131_072, dtype="bfloat16")
    assert resolve_engine_config(long, model, weight_bytes=0, device=TPU).attention == "xla"
    larger = replace(long, block_size=128, num_gpu_blocks_override=1_100, max_num_seqs=64)
    assert resolve_engine_config(larger, model, weight_bytes=0, device=TPU).attention == "tpu"


def test_the_heads_that_count_are_one_device_s(wide: ModelConfig) -> None:
    model = replace(wide, num_heads=64, num_kv_heads=2)
    assert choose(model, TPU, tensor_parallel_size=4).backend == "tpu"  # a copy of a kv head, 16 query heads on each


@pytest.fixture
def limits(wide: ModelConfig) -> Any:
    config = EngineConfig(block_size=16, num_gpu_blocks_override=20)
    return replace(resolve_engine_config(config, wide, weight_bytes=0), attention="tpu")


def test_kernels_that_are_right_serve(wide: ModelConfig, limits: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert try_attention(limits, EngineConfig(), wide, interpret=True).attention == "tpu"
    assert "right beside the reference" in caplog.text


def broken(how: str) -> Callable[..., jax.Array]:
    right = attention.ragged_paged_attention

    def call(q: jax.Array, *arrays: Any, backend: str, **options: Any) -> jax.Array:
        out = right(q, *arrays, backend="reference", **(options | {"interpret": False}))
        if backend == "reference":
            return out
        if how == "raises":
            raise NotImplementedError("no such instruction\non this chip")
        return out.at[-1, 0].multiply({"a hundredth off": 1.01, "not a number": np.nan}[how])

    return call


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("a hundredth off", "the kernels are off by"),
        ("not a number", "the kernels are off by nan"),
        ("raises", "the kernels fail here: NotImplementedError: no such instruction$"),
    ],
)
def test_kernels_that_are_wrong_here_do_not_serve(
    how: str,
    why: str,
    wide: ModelConfig,
    limits: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(attention, "ragged_paged_attention", broken(how))
    assert try_attention(limits, EngineConfig(), wide).attention == "xla"
    assert "attention: xla, because" in caplog.text
    with pytest.raises(ConfigError, match=why.removesuffix("$")):
        try_attention(limits, EngineConfig(attention_backend="pallas"), wide)


def test_the_trial_sees_a_tenth_of_a_percent_of_float32(wide: ModelConfig, limits: Any) -> None:
    assert attention_error(replace(limits, attention="reference"), wide) is None
    with pytest.MonkeyPatch.context() as patch:
        right = attention.ragged_paged_attention
        patch.setattr(
            attention,
            "ragged_paged_attention",
            lambda *a, backend, **o: right(*a, backend="reference", **o) * (1.0 if backend == "reference" else 1.001),
        )
        assert attention_error(limits, wide) is not None


@pytest.fixture(scope="module")
def engines(wide: ModelConfig) -> Iterator[Callable[[str], EngineCore]]:
    params = jax.tree.map(lambda x: x * 8, init_arrays(decoder_specs(wide), jax.random.key(1)))
    with pytest.MonkeyPatch.context() as patch:

        def make(backend: str) -> EngineCore:
            patch.setattr(resolve, "choose_attention", lambda *_: Choice(backend, "the test's"))  # type: ignore[arg-type]
            patch.setattr(resolve, "KV_TILE", 16)
            config = EngineConfig(
                max_num_seqs=4,
                max_num_batched_tokens=12,
                num_gpu_blocks_override=21,
                compilation_cache_dir=None,
                stream_interval_ms=float("inf"),
            )
            return EngineCore(wide, params, config)

        yield make


def test_an_engine_on_the_kernels_interface_gives_the_same_tokens(
    engines: Callable[[str], EngineCore], run_all: Callable, make_requests: Callable
) -> None:
    """Chunks, prefix hits, several samples of a prompt, rows that end inside a loop of decode steps: on the reference
    that the kernels are held to, beside plain XLA."""
    requests = make_requests(20, seed=3)

    def tokens(deltas: list[Delta]) -> list[int]:
        return [token for delta in deltas for token in delta.token_ids]

    plain, kernels = engines("xla"), engines("reference")
    assert kernels.limits.attention == "reference"
    want, got = run_all(plain, requests), run_all(kernels, requests)
    assert [tokens(deltas) for deltas in got] == [tokens(deltas) for deltas in want]
    assert sum(len(tokens(deltas)) for deltas in want) > 100
