"""Stacked layers over several devices: read as they are cut, two all-reduces a layer, the answers of one device."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine import resolve
from jaxserve.engine.engine import EngineCore
from jaxserve.engine.program_text import ProgramText
from jaxserve.models.params import decoder_specs
from jaxserve.parallel.mesh import mesh_for
from jaxserve.parallel.rules import placements_on
from jaxserve_checkpoints.convert import convert
from jaxserve_checkpoints.load import LoadedModel, load_model
from jaxserve_server.engine_start import fingerprint

from .families import TOKENS
from .test_families import SWAPS, logprobs_of, tokens_of

Loaded = Callable[[str, int], LoadedModel]


@pytest.fixture(scope="module")
def stacked(folder_of: Callable[[str], Path]) -> Loaded:
    return functools.cache(lambda family, size: load_model(folder_of(family), mesh=mesh_for(size), stacked_layers=True))


def assert_stacks(params: Any, apart: LoadedModel, size: int) -> None:
    """Whether stacked parameters are those of layers apart, each where the rules have it."""
    specs = decoder_specs(apart.config, size, stacked=True)
    placements = placements_on(mesh_for(size), specs)
    for name, spec in specs["layers"].items():
        array = params["layers"][name]
        assert (array.shape, array.dtype) == (spec.shape, np.dtype(spec.dtype))
        assert array.sharding.is_equivalent_to(placements["layers"][name], array.ndim), name
        layers = jnp.stack([np.asarray(layer[name]) for layer in apart.params["layers"]])
        np.testing.assert_array_equal(array, layers.reshape(spec.shape), err_msg=name)
    for name in params.keys() - {"layers"}:
        np.testing.assert_array_equal(params[name], apart.params[name])


@pytest.mark.parametrize(("family", "size"), [("llama31", 2), ("smollm", 8), ("llama_bias", 4)])
def test_each_device_reads_its_own_part_of_the_stacks(
    folder_of: Callable[[str], Path], loaded: Loaded, stacked: Loaded, tmp_path: Path, family: str, size: int
) -> None:
    """From files of either kind; over more devices than kv heads, too."""
    assert_stacks(stacked(family, size).params, loaded(family, size), size)
    convert(folder_of(family), tmp_path / "converted")
    again = load_model(tmp_path / "converted", mesh=mesh_for(size), stacked_layers=True)
    assert_stacks(again.params, loaded(family, size), size)


def test_answers_programs_and_cache_over_two_devices(
    core_of: Callable, stacked: Loaded, run_all: Callable, requests: list
) -> None:
    size, family = 2, "llama31"
    model = stacked(family, size)
    config = EngineConfig(
        max_num_seqs=4,
        max_num_batched_tokens=TOKENS,
        block_size=4,
        max_model_len=64,
        num_gpu_blocks_override=30,
        compilation_cache_dir=None,
        verify_swaps=True,
        tensor_parallel_size=size,
        stacked_layers=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "token_buckets", lambda max_tokens, *_: (max_tokens,))
        core = EngineCore(model.config, model.params, config)
    plain = core_of(family, 1)
    for engine in (core, plain):
        engine.reset_prefix_cache()
        engine.runner.costs = SWAPS
        engine.scheduler = engine._make_scheduler()
    wanted, found = run_all(plain, requests), run_all(core, requests)
    assert [tokens_of(deltas) for deltas in found] == [tokens_of(deltas) for deltas in wanted]
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(logprobs_of(other), logprobs_of(one), rtol=0, atol=1e-5)
    assert core.scheduler.counters.swap_preemptions > 0

    kv, layers = core.runner._kv, model.config.num_layers
    (array,) = kv.layers
    on_one = array.addressable_shards[0].data.shape
    assert on_one == (layers * 30, 4, model.config.num_kv_heads // size, 2 * model.config.head_dim)
    ((_, step),) = core.runner.compiled.steps
    text = ProgramText(step.as_text(), on_one, layers)
    assert text.has_layer_loop
    assert dict(text.collectives())["all-reduce"] == 2 * layers + 1
    assert text.cache_copies() == 0
    assert len(re.findall(r" all-reduce(?:-start)?\(", step.as_text())) == 2 + 1  # the loop's, and the embedding's
    limits = replace(core.limits, exact=True)
    assert fingerprint(model, limits) != fingerprint(model, replace(limits, stacked_layers=False))
