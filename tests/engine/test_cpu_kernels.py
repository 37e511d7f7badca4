"""Which engines on a CPU have its kernels: what is decided, and that loader, LLM and engine decide alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams, cpu_kernels
from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.cpu_kernels import has_panels, missing_cpu_kernels
from jaxserve.engine import resolve
from jaxserve.engine.engine import EngineCore
from jaxserve.errors import ConfigError
from jaxserve.models.params import are_in_panels, decoder_specs, in_panels
from jaxserve.parallel.specs import init_arrays
from jaxserve.types import Delta
from jaxserve_checkpoints.load import load_for_engine
from pallas_kernels.linear.api import to_matrix
from pallas_kernels.native.build import Loaded, load_kernels

PROMPTS = ["Once upon a time", "The sun is", "Hello! What is a block table?"]

with_kernels = pytest.mark.skipif(load_kernels(None).missing is not None, reason=str(load_kernels(None).missing))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """Folders that kernels were asked for in; there always are some."""
    folders: list[Path | None] = []
    monkeypatch.setattr(cpu_kernels, "load_kernels", lambda folder: folders.append(folder) or Loaded("key", None))
    return folders


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        ({}, {}, True),
        ({}, {"dtype": "bfloat16"}, True),
        ({}, {"dtype": "float16"}, False),
        ({"attention_backend": "pallas"}, {}, True),
        ({"attention_backend": "xla"}, {}, False),
        ({"stacked_layers": True}, {}, False),
        ({"tensor_parallel_size": 2}, {}, False),
        ({}, {"intermediate_size": 47}, True),
        ({}, {"intermediate_size": 47, "dtype": "bfloat16"}, False),
    ],
    ids=str,
)
def test_whose_weights_lie_in_panels(
    config: dict[str, Any], changes: dict[str, Any], expected: bool, model: ModelConfig, built: list[Path | None]
) -> None:
    asked = EngineConfig(compilation_cache_dir=None, **config)
    assert has_panels(asked, replace(model, **changes)) is expected
    assert built == ([None] if expected else []), "compiled for nothing"


def test_they_are_kept_where_programs_are(tmp_path: Path, built: list[Path | None]) -> None:
    folder = tmp_path / "programs"
    assert missing_cpu_kernels(EngineConfig(compilation_cache_dir=str(folder))) is None
    assert built == [folder / "kernels"]
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="must be a folder that belongs to this user with mode 0700"):
        missing_cpu_kernels(EngineConfig(compilation_cache_dir=str(folder)))


@with_kernels
def test_turning_weights_keeps_them_and_frees_the_others(model: ModelConfig) -> None:
    params = init_arrays(decoder_specs(model), jax.random.key(0))
    wanted = jax.tree.map(np.asarray, params)
    turned = in_panels(params)
    assert are_in_panels(turned)
    assert not are_in_panels(wanted)
    for before, after, given in zip(wanted["layers"], turned["layers"], params["layers"], strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            np.testing.assert_array_equal(to_matrix(after[name]), before[name])
            assert given[name].is_deleted(), "two models in memory"
        np.testing.assert_array_equal(after["attn_norm"], before["attn_norm"])
    np.testing.assert_array_equal(to_matrix(turned["embed"]), wanted["embed"])


def prefill_token_s(llm: LLM) -> float:
    """What a token of a prompt takes, at best."""
    prompt, seconds = [{"prompt_token_ids": list(range(5, 505))}], []
    for _ in range(3):
        llm.reset_prefix_cache()
        begin = time.perf_counter()
        llm.generate(prompt, SamplingParams(max_tokens=1), use_tqdm=False)
        seconds.append(time.perf_counter() - begin)
    return min(seconds) / 500


@with_kernels
def test_the_demo_answers_alike_with_and_without_them(caplog: pytest.LogCaptureFixture) -> None:
    """Greedy tokens in float32, whose margins rounding does not reach; exact by default with them."""
    params = SamplingParams(temperature=0.0, max_tokens=40)
    answers = {}
    for backend in ("pallas", "xla"):
        with caplog.at_level(logging.INFO):
            llm = LLM("demo", dtype="float32", attention_backend=backend, max_num_seqs=8, compilation_cache_dir=None)
        limits = llm._core.limits
        with_them = backend == "pallas"
        assert (limits.attention, limits.panels, limits.exact) == ("cpu" if with_them else "xla", with_them, with_them)
        assert are_in_panels(llm._core.runner._params) == with_them
        answers[backend] = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]
        # What gives way is swapped or computed again by this. A step of padding takes kernels a thirtieth of it.
        assert llm._core.runner.costs.prefill_token_s > prefill_token_s(llm) / 8
    assert answers["pallas"] == answers["xla"]
    assert "attention: cpu (asked for)" in caplog.text
    assert "attention: xla (asked for)" in caplog.text


@with_kernels
@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        ("float32", {"qk_norm": True}),
        ("float32", {"qkv_bias": True, "layer_windows": (None, 7)}),
        ("float32", {"o_bias": True, "mlp_bias": True}),
        ("float32", {"activation": "gelu", "intermediate_size": 50, "tied_embeddings": True}),
        ("bfloat16", {}),
    ],
    ids=str,
)
def test_every_family_computes_the_same_with_them(
    dtype: Any, changes: dict[str, Any], model: ModelConfig, run_all: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logprobs of prompts in chunks and of what follows them, beside a plain engine's."""
    model = replace(model, dtype=dtype, **{"intermediate_size": 64, "num_layers": 2} | changes)
    params = jax.tree.map(lambda x: x * 4, init_arrays(decoder_specs(model), jax.random.key(1)))
    sizes: dict[str, Any] = {"max_num_seqs": 12, "max_num_batched_tokens": 16, "max_model_len": 64}
    prompts = [list(range(1, 40)), [5, 9], *([n, n + 1, 2 * n] for n in range(10))]
    ask = SamplingParams(temperature=0.0, max_tokens=9, logprobs=5, prompt_logprobs=0, ignore_eos=True)
    monkeypatch.setattr(resolve, "token_buckets", lambda max_tokens, *_: (max_tokens,))
    found = {}
    for backend in ("pallas", "xla"):
        config = EngineConfig(attention_backend=backend, compilation_cache_dir=None, **sizes)
        arrays = in_panels(jax.tree.map(jnp.copy, params)) if backend == "pallas" else params
        core = EngineCore(model, arrays, config)
        assert core.limits.panels == (backend == "pallas")
        whole = backend == "pallas" and model.activation == "silu" and not model.o_bias
        assert core.limits.skips_padding == whole
        found[backend] = run_all(core, [(prompt, ask) for prompt in prompts])
    for with_them, without in zip(*found.values(), strict=True):
        np.testing.assert_allclose(
            *([*given_logprobs(deltas), *first_logprobs(deltas)] for deltas in (with_them, without)),
            atol=2e-4 if dtype == "float32" else 0.15,
        )
        if dtype == "float32":  # no near ties
            answers = [[token for delta in deltas for token in delta.token_ids] for deltas in (with_them, without)]
            assert answers[0] == answers[1]


def given_logprobs(deltas: list[Delta]) -> list[float]:
    """Of a prompt's tokens."""
    return [entry.logprob for entry in deltas[0].prompt_logprobs or () if entry is not None]


def first_logprobs(deltas: list[Delta]) -> list[float]:
    """Of the five likeliest first answers."""
    first = next(delta for delta in deltas if delta.token_ids)
    assert first.logprobs is not None
    return [logprob for _, logprob in first.logprobs[0].top]


def test_without_a_compiler_xla_serves_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_kernels, "load_kernels", lambda _: Loaded(None, "there is no C++ compiler"))
    config = EngineConfig(compilation_cache_dir=None)
    assert not are_in_panels(load_for_engine("demo", config).params)
    with caplog.at_level(logging.INFO):
        llm = LLM("demo", max_num_seqs=4, max_num_batched_tokens=8, compilation_cache_dir=None)
    assert (llm._core.limits.attention, llm._core.limits.panels) == ("xla", False)
    assert "attention: xla (there is no C++ compiler)" in caplog.text
    assert llm.generate(PROMPTS[:1], SamplingParams(max_tokens=3), use_tqdm=False)[0].outputs[0].token_ids
