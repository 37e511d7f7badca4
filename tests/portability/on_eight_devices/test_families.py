"""Every family over 1, 2, 4 and 8 devices: the same tokens, and the same numbers to 1e-5.

An engine costs three seconds to compile, so four families are served over 1 and 8 devices alone, unless
JAXSERVE_TP_ALL=1. Logits are compared over all sizes, always.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxserve.config import ModelConfig
from jaxserve.engine.engine import EngineCore
from jaxserve.models.decoder import forward, logits
from jaxserve.models.params import decoder_specs
from jaxserve.parallel.axis import Axis
from jaxserve.parallel.mesh import mesh_of
from jaxserve.parallel.rules import partition_spec
from jaxserve.parallel.specs import map_specs
from jaxserve.scheduler.policy import MemoryCosts
from jaxserve.types import Delta
from jaxserve_checkpoints.load import LoadedModel

from .families import FAMILIES, TOKENS

SIZES = (2, 4, 8)
FEWER = () if os.environ.get("JAXSERVE_TP_ALL") else ("mistral", "qwen2_window", "qwen3", "llama_bias")
SERVED = [(family, size) for family in FAMILIES for size in SIZES if size == 8 or family not in FEWER]
SWAPS, COMPUTES = MemoryCosts(0.0, 0.0, 1.0), MemoryCosts(1.0, 1.0, 0.0)


def tokens_of(deltas: Sequence[Delta]) -> dict[int, list[int]]:
    """By sequence."""
    return {index: [t for d in deltas if d.index == index for t in d.token_ids] for index in {d.index for d in deltas}}


def logprobs_of(deltas: Sequence[Delta]) -> np.ndarray:
    """Of the prompt and the output, each token's and those of the 20 likeliest in ascending order of their ids."""
    prompt = [entry for d in deltas for entry in d.prompt_logprobs or () if entry is not None]
    output = [entry for d in deltas for entry in d.logprobs or ()]
    return np.array([[entry.logprob, *sorted(value for _, value in entry.top)] for entry in (*prompt, *output)])


@pytest.fixture(scope="module")
def answers(core_of: Callable, run_all: Callable, requests: list) -> Callable[[str, int], tuple[list, list]]:
    """(family, devices) -> the deltas when those who give way swap, and when they compute again."""

    def run(core: EngineCore, costs: MemoryCosts) -> list[list[Delta]]:
        core.runner.costs = costs
        core.scheduler = core._make_scheduler()
        core.metrics.prefix_queries = core.metrics.prefix_hits = 0
        deltas = run_all(core, requests)
        counters = core.scheduler.counters
        assert counters.prefix_hits > 0
        assert (counters.swap_preemptions if costs is SWAPS else counters.recompute_preemptions) > 0
        return deltas

    return functools.cache(lambda family, size: tuple(run(core_of(family, size), costs) for costs in (SWAPS, COMPUTES)))


def test_the_requests_are_what_they_should_be(requests: list) -> None:
    assert max(len(prompt) for prompt, _ in requests) > 2 * TOKENS
    assert any(params.n > 1 for _, params in requests)


@pytest.mark.parametrize(("family", "size"), SERVED)
def test_tokens_and_logprobs_are_those_of_one_device(answers: Callable, family: str, size: int) -> None:
    """With prefix hits, chunks, preemption by both means, and n > 1: greedy and sampled."""
    for wanted, found in zip(answers(family, 1), answers(family, size), strict=True):
        assert [tokens_of(deltas) for deltas in found] == [tokens_of(deltas) for deltas in wanted]
        for one, other in zip(wanted, found, strict=True):
            np.testing.assert_allclose(logprobs_of(other), logprobs_of(one), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_one_device(loaded: Callable[[str, int], LoadedModel], family: str) -> None:
    """Of the whole vocabulary, after a forward pass with no cache and no paging."""
    config = loaded(family, 1).config
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, 24).astype(np.int32)
    wanted = whole_logits(loaded(family, 1).params, config, tokens)
    assert wanted.shape == (24, config.vocab_size)
    assert 2 < np.ptp(wanted) < 10
    for size in SIZES:
        found = whole_logits(loaded(family, size).params, config, tokens)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def whole_logits(params: Any, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    mesh = mesh_of(params)
    axis = Axis(1 if mesh is None else mesh.size)

    def attend(window: int | None, kv: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        scores = jnp.einsum("tkgh,skh->kgts", q, k)
        back = jnp.arange(len(q))[:, None] - jnp.arange(len(k))
        scores = jnp.where((back >= 0) & (back < (window or len(k))), scores, -jnp.inf)
        return jnp.einsum("kgts,skh->tkgh", jax.nn.softmax(scores), v), kv

    def run(params: Any, tokens: jax.Array) -> jax.Array:
        nothing = (None,) * config.num_layers
        hidden, _ = forward(params, nothing, tokens, jnp.arange(len(tokens)), attend, config, axis=axis)
        return axis.gather(axis.own_whole(logits(params, hidden), config.vocab_size), len(tokens))

    if mesh is not None:
        cut = map_specs(partition_spec, decoder_specs(config, mesh.size))
        run = jax.shard_map(run, mesh=mesh, in_specs=(cut, PartitionSpec()), out_specs=PartitionSpec(), check_vma=False)
    return np.asarray(jax.jit(run)(params, tokens))


@pytest.mark.parametrize("size", [2, 8])
def test_bits_depend_on_nobody_else(core_of: Callable, run_all: Callable, requests: list, size: int) -> None:
    """Alone and in company, at any place in the stream: an all-reduce of simulated devices adds in one order."""
    core = core_of("llama31", size)
    together = run_all(core, requests)
    for request, found in zip(requests, together, strict=True):
        core.reset_prefix_cache()
        (alone,) = run_all(core, [request])
        assert tokens_of(alone) == tokens_of(found)
        assert logprobs_of(alone).tobytes() == logprobs_of(found).tobytes()
