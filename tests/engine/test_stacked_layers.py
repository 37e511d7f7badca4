"""Layers stacked and run in a loop: the answers of layers one after another, a cache that is never copied, refusals."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine import resolve
from jaxserve.engine.attention import Choice
from jaxserve.engine.engine import EngineCore
from jaxserve.engine.program_text import ProgramText
from jaxserve.engine.programs import engine_programs
from jaxserve.engine.resolve import resolve_engine_config
from jaxserve.errors import ConfigError
from jaxserve.models.params import decoder_specs
from jaxserve.parallel.rules import placements_on
from jaxserve.parallel.specs import abstract_arrays, init_arrays
from jaxserve.scheduler.policy import MemoryCosts
from jaxserve.types import BeamSearchParams, Delta, SamplingParams

# What a family can have beside weights, and a window that all layers share.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_layers": 3},
    "qwen": {
        "num_layers": 3,
        "head_dim": 64,
        "qk_norm": True,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "tied_embeddings": True,
        "layer_windows": (9,) * 3,
    },
}
ATTENTION: dict[str, Any] = {"llama": "xla", "qwen": "reference"}  # the latter is on the interface of the kernels


def stacked(params: Any, model: ModelConfig) -> Any:
    specs = decoder_specs(model, stacked=True)["layers"]
    layers = {
        name: jnp.stack([layer[name] for layer in params["layers"]]).reshape(spec.shape) for name, spec in specs.items()
    }
    return params | {"layers": layers}


@pytest.fixture(scope="module")
def core_of(model: ModelConfig) -> Callable[..., EngineCore]:
    """(family, stacked) -> an engine on the same weights: four rows, 29 blocks of 4 tokens, or 7 of 16."""

    @functools.cache
    def make(family: str, is_stacked: bool) -> EngineCore:
        attention = ATTENTION[family]
        config = replace(model, **{"layer_windows": ()} | FAMILIES[family])
        params = jax.tree.map(lambda x: x * 8, init_arrays(decoder_specs(config), jax.random.key(2)))
        params = params | {"final_norm": params["final_norm"] / 4}  # logits of a few units: 1e-5 is rounding there
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resolve, "token_buckets", lambda max_tokens, *_: (max_tokens,))
            patch.setattr(resolve, "choose_attention", lambda *_: Choice(attention, "the test's"))
            engine = EngineConfig(
                max_num_seqs=4,
                max_num_batched_tokens=12,
                block_size=4 if attention == "xla" else 16,
                num_gpu_blocks_override=30 if attention == "xla" else 8,
                compilation_cache_dir=None,
                stream_interval_ms=float("inf"),
                verify_swaps=True,
                stacked_layers=is_stacked,
            )
            core = EngineCore(config, stacked(params, config) if is_stacked else params, engine)
        core.runner.costs = MemoryCosts(0.0, 0.0, 1.0)  # who gives way is swapped
        core.scheduler = core._make_scheduler()
        return core

    return make


@pytest.fixture(scope="module")
def asked(make_requests: Callable) -> list[tuple[list[int], Any]]:
    """Of every kind and longer than a step; some with a common beginning, n > 1 and beams."""
    begin = np.random.default_rng(7).integers(4, 150, 33).tolist()
    greedy = SamplingParams(temperature=0.0, logprobs=20, max_tokens=20, ignore_eos=True)
    several = replace(greedy, temperature=1.0, n=2, seed=3)
    made = [(prompt, replace(p, max_tokens=20, ignore_eos=True)) for prompt, p in make_requests(9, 3)]
    made += [([*begin, i], several if i % 2 else greedy) for i in range(5, 11)]
    return [*made, (begin[:9], BeamSearchParams(beam_width=3, max_tokens=8))]


def tokens_of(deltas: list[Delta]) -> dict[int, list[int]]:
    return {i: [t for d in deltas if d.index == i for t in d.token_ids] for i in {d.index for d in deltas}}


def logprobs_of(deltas: list[Delta]) -> np.ndarray:
    """Of prompt and output, each token's and those of the likeliest, in order of their size."""
    prompt = [entry for d in deltas for entry in d.prompt_logprobs or () if entry is not None]
    output = [entry for d in deltas for entry in d.logprobs or ()]
    return np.array([x for e in (*prompt, *output) for x in (e.logprob, *sorted(value for _, value in e.top))])


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_layers_one_after_another(
    core_of: Callable, run_all: Callable, asked: list, family: str
) -> None:
    """With prefix hits, chunks, swaps, copies on write, several samples, beams, and loops of decode steps."""
    plain, loop = core_of(family, False), core_of(family, True)
    assert loop.limits.stacked_layers
    assert len(loop.runner._kv.layers) == 1
    wanted, found = run_all(plain, asked), run_all(loop, asked)
    assert [tokens_of(d) for d in found] == [tokens_of(d) for d in wanted]
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(logprobs_of(other), logprobs_of(one), rtol=0, atol=1e-5)
    assert sum(len(logprobs_of(d)) for d in wanted) > 3000
    loop.scheduler.check_integrity()
    counters = loop.scheduler.counters
    assert counters == plain.scheduler.counters
    assert counters.prefix_hits > 0
    assert counters.swap_preemptions > 0
    assert loop.runner.store.back.blocks > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_of_all_layers_is_donated_and_never_copied(core_of: Callable, family: str) -> None:
    core = core_of(family, True)
    compiled, kv, state = core.runner.compiled, core.runner._kv, core.runner._state
    programs = [(step, (kv, state)) for _, step in compiled.steps]
    programs += [(program, (kv, state)) for program in compiled.follow_beams.values()]
    programs += [(program, kv) for program in (*compiled.copy.values(), *compiled.scatter.values())]
    (array,), layers = kv.layers, core.model.num_layers
    assert len(programs) >= 4
    for program, donated in programs:
        text = program.as_text()
        assert f"[{','.join(map(str, array.shape))}]" in text
        flat = (array.shape[0] * array.shape[1], *array.shape[2:])
        assert ProgramText(text, array.shape, layers).cache_copies() == 0
        assert ProgramText(text, flat, layers).cache_copies() == 0
        alias = re.search(r"input_output_alias=\{(.*?)\},? entry", text, re.DOTALL)
        aliased = alias.group(1) if alias else ""
        assert aliased.count("may-alias") + aliased.count("must-alias") == len(jax.tree.leaves(donated))
    assert ProgramText(compiled.steps[0][1].as_text(), array.shape, layers).has_layer_loop


def test_a_copy_of_the_cache_would_be_seen() -> None:
    """The count that the test above trusts, where there must be one: what is donated is read after it is written."""
    cache = jnp.zeros((30, 4, 2, 16))
    add = jax.jit(lambda c: (c.at[3].set(1.0), c.sum(0) * c[3]), donate_argnums=0)
    assert ProgramText(add.lower(cache).compile().as_text(), cache.shape).cache_copies() > 0


def test_a_program_is_no_larger_for_more_layers(core_of: Callable) -> None:
    core = core_of("llama", True)
    sizes = []
    for num_layers in (2, 40):
        model = replace(core.model, num_layers=num_layers, layer_windows=())
        specs = decoder_specs(model, stacked=True)
        params = abstract_arrays(specs, placements_on(None, specs))
        programs = engine_programs(params, model, core.limits)
        sizes.append([programs[name]().as_text().count("\n") for name in ("step[12]", "copy[4]", "scatter[8]")])
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("asked_for", [True, None, False])
def test_layers_with_different_windows_are_not_stacked(model: ModelConfig, asked_for: bool | None) -> None:
    mixed = replace(model, layer_windows=(None, 16))
    config = EngineConfig(stacked_layers=asked_for, num_gpu_blocks_override=20)
    if asked_for:
        with pytest.raises(ConfigError, match=r"attention windows differ \(none, 16\).*Set stacked_layers to False"):
            resolve_engine_config(config, mixed, weight_bytes=0)
    else:
        assert not resolve_engine_config(config, mixed, weight_bytes=0).stacked_layers


def test_parameters_lie_as_the_engine_was_told(model: ModelConfig, params: Any) -> None:
    options = {"compilation_cache_dir": None, "num_gpu_blocks_override": 20}
    for given, told, words in (
        (params, True, r"layers are not stacked and stacked_layers=True.*load_model\(\.\.\., stacked_layers=True\)"),
        (stacked(params, model), False, r"layers are stacked and stacked_layers=False.*stacked_layers=False\)"),
        (stacked(params, model), None, r"layers are stacked and stacked_layers=None"),
    ):
        with pytest.raises(ConfigError, match=words):
            EngineCore(model, given, EngineConfig(stacked_layers=told, **options))


def test_more_places_than_an_int32_counts_are_refused(model: ModelConfig, caplog: pytest.LogCaptureFixture) -> None:
    most = (2**31 - 1) // (2 * 16)
    config = EngineConfig(stacked_layers=True, num_gpu_blocks_override=most, max_num_seqs=1)
    with caplog.at_level(logging.INFO):
        assert resolve_engine_config(config, model, weight_bytes=0).num_blocks == most
    assert "layers: stacked (asked for)" in caplog.text
    with pytest.raises(ConfigError, match=rf"{most + 1} blocks .* num_gpu_blocks_override to at most {most}"):
        resolve_engine_config(replace(config, num_gpu_blocks_override=most + 1), model, weight_bytes=0)
