"""Tiny models of each family whose heads divide by eight, or are copied, and engines on them over 1 to 8 devices."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine import resolve
from jaxserve.engine.engine import EngineCore
from jaxserve.parallel.mesh import mesh_for
from jaxserve.types import BeamSearchParams, Delta, SamplingParams
from jaxserve_checkpoints.load import LoadedModel, load_model

from .families import FAMILIES, TOKENS

# A quarter, exactly, makes logits about one unit wide: there 1e-5 is 80 units in the last place. Four times as wide,
# sums of 64 to 128 float32 numbers in another order made them differ by up to 1.7e-5 after two layers.
NORM = "model.norm.weight"
Request = tuple[Sequence[int], SamplingParams | BeamSearchParams]


@pytest.fixture(scope="session")
def folder_of(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The Hugging Face folder of a family; not to be written to."""
    spec = importlib.util.spec_from_file_location("make_tiny_models", repo / "scripts" / "make_tiny_models.py")
    assert spec is not None
    assert spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    heads = {"num_attention_heads": 8, "head_dim": 16}
    tiny.FAMILIES = {name: tiny.FAMILIES[name] | heads | dict(changes) for name, changes in FAMILIES.items()}
    made = tiny.weights

    def narrow_weights(family: str) -> dict[str, np.ndarray]:
        weights = made(family)
        return weights | {NORM: weights[NORM] / 4}

    tiny.weights = narrow_weights
    root = tmp_path_factory.mktemp("families")
    return functools.cache(lambda family: tiny.make(family, root / family))


@pytest.fixture(scope="session")
def loaded(folder_of: Callable[[str], Path]) -> Callable[[str, int], LoadedModel]:
    """(family, devices) -> the model, read from its files."""
    return functools.cache(lambda family, size: load_model(folder_of(family), mesh=mesh_for(size)))


@pytest.fixture(scope="session")
def make_core(loaded: Callable[[str, int], LoadedModel]) -> Callable[..., EngineCore]:
    """(family, devices) -> an engine with one bucket of 16 tokens, four rows and 29 blocks of 4 tokens."""

    def make(family: str, size: int, **changes: Any) -> EngineCore:
        values: dict[str, Any] = {
            "max_num_seqs": 4,
            "max_num_batched_tokens": TOKENS,
            "block_size": 4,
            "max_model_len": 64,
            "num_gpu_blocks_override": 30,
            "compilation_cache_dir": None,
            "verify_swaps": True,
            "tensor_parallel_size": size,
        }
        model = loaded(family, size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resolve, "token_buckets", lambda max_tokens, *_: (max_tokens,))
            return EngineCore(model.config, model.params, EngineConfig(**values | changes))

    return make


@pytest.fixture(scope="session")
def core_of(make_core: Callable[..., EngineCore]) -> Callable[[str, int], EngineCore]:
    """(family, devices) -> the engine that all tests of them share."""
    return functools.cache(make_core)


@pytest.fixture(scope="session")
def run_all() -> Callable[[EngineCore, Sequence[Request]], list[list[Delta]]]:
    """Adds all requests at once and steps until idle; the deltas of each."""

    def run(core: EngineCore, requests: Sequence[Request]) -> list[list[Delta]]:
        deltas: list[list[Delta]] = [[] for _ in requests]
        for i, (prompt, params) in enumerate(requests):
            core.add(f"r{i}", core.check(prompt, params), i)
        while core.has_work:
            for i, delta in core.step():
                deltas[i].append(delta)
        core.scheduler.check_integrity()
        return deltas

    return run


@pytest.fixture(scope="session")
def requests() -> list[Request]:
    """Of every kind, longer than a step, some with a common beginning, and more than the blocks can hold."""
    draws = np.random.default_rng(5)
    common = draws.integers(8, 150, 21).tolist()
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 20},
        {"temperature": 0.0, "logprobs": 20, "prompt_logprobs": 20},
        {"temperature": 1.0, "n": 3},
        {"temperature": 0.0, "logprobs": 20, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"temperature": 0.8, "top_k": 10, "top_p": 0.9, "presence_penalty": 0.5},
        {"temperature": 1.2, "min_p": 0.02, "logit_bias": {5: 4.0, 9: -100.0}},
        {"temperature": 0.9, "allowed_token_ids": list(range(20, 90)), "bad_words_token_ids": [[30], [41, 42]]},
    ]
    made: list[Request] = []
    for i in range(11):
        own = draws.integers(8, 150, int(draws.integers(1, 22))).tolist()
        kind = kinds[i % len(kinds)] | {"seed": int(draws.integers(2**62)), "max_tokens": 20, "ignore_eos": True}
        made.append((common + own if i % 3 else own, SamplingParams(**kind)))
    return made
