"""A tiny random model, an engine on it that tests share, and a dense oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine import resolve
from jaxserve.engine.engine import EngineCore
from jaxserve.models.decoder import forward, logits
from jaxserve.models.params import decoder_specs
from jaxserve.parallel.specs import init_arrays
from jaxserve.types import Delta, SamplingParams

MAX_LEN = 64
EOS = 3
TOKENS = 12


@pytest.fixture(scope="session")
def model() -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=150,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position=MAX_LEN,
        eos_token_ids=(EOS,),
    )


@pytest.fixture(scope="session")
def params(model: ModelConfig) -> Any:
    """Weights wide enough that logits differ by several units and greedy choices are not near ties."""
    return jax.tree.map(lambda x: x * 8, init_arrays(decoder_specs(model), jax.random.key(1)))


@pytest.fixture(scope="session")
def make_core(model: ModelConfig, params: Any) -> Callable[..., EngineCore]:
    """An engine with one bucket of 12 tokens, four rows and 40 blocks of 4 tokens; keywords change that."""

    def make(**changes: Any) -> EngineCore:
        values: dict[str, Any] = {
            "max_num_seqs": 4,
            "max_num_batched_tokens": TOKENS,
            "block_size": 4,
            "num_gpu_blocks_override": 41,
            "compilation_cache_dir": None,
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resolve, "token_buckets", lambda max_tokens, *_: (max_tokens,))
            return EngineCore(model, changes.pop("params", params), EngineConfig(**values | changes))

    return make


@pytest.fixture(scope="session")
def shared_core(make_core: Callable[..., EngineCore]) -> EngineCore:
    return make_core()


@pytest.fixture
def core(shared_core: EngineCore) -> Iterator[EngineCore]:
    """The shared engine, idle before and after."""
    assert not shared_core.has_work
    yield shared_core
    shared_core.scheduler.check_integrity()
    assert not shared_core.has_work
    assert shared_core.scheduler.num_free_blocks == shared_core.limits.num_blocks - 1


@pytest.fixture(scope="session")
def dense_logits(model: ModelConfig, params: Any) -> Callable[[Sequence[int]], np.ndarray]:
    """tokens [T] -> float32 logits [T, V], with no cache and no paging."""

    def attend(layer: int, kv: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        scores = jnp.einsum("tkgh,skh->kgts", q, k)
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
        return jnp.einsum("kgts,skh->tkgh", jax.nn.softmax(scores), v), kv

    @jax.jit
    def run(tokens: jax.Array) -> jax.Array:
        hidden, _ = forward(params, (None,) * model.num_layers, tokens, jnp.arange(MAX_LEN), attend, model)
        return logits(params, hidden)

    def padded(tokens: Sequence[int]) -> np.ndarray:
        return np.asarray(run(jnp.asarray([*tokens, *[0] * (MAX_LEN - len(tokens))])))[: len(tokens)]

    return padded


@pytest.fixture(scope="session")
def greedy(dense_logits: Callable) -> Callable[[Sequence[int], int], list[int]]:
    """(prompt, max_tokens) -> the greedy continuation, by recomputing everything for every token."""

    def continue_(prompt: Sequence[int], max_tokens: int) -> list[int]:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + max_tokens:
            tokens.append(int(dense_logits(tokens)[-1].argmax()))
            if tokens[-1] == EOS:
                break
        return tokens[len(prompt) :]

    return continue_


Requests = Sequence[tuple[Sequence[int], SamplingParams]]


@pytest.fixture(scope="session")
def run_all() -> Callable[[EngineCore, Requests], list[list[Delta]]]:
    """Adds all requests at once and steps until idle; the deltas of each."""

    def run(core: EngineCore, requests: Requests) -> list[list[Delta]]:
        deltas: list[list[Delta]] = [[] for _ in requests]
        for i, (prompt, params) in enumerate(requests):
            core.add(f"r{i}", core.check(prompt, params), i)
        while core.has_work:
            for i, delta in core.step():
                deltas[i].append(delta)
        return deltas

    return run


@pytest.fixture(scope="session")
def make_requests() -> Callable[[int, int], list[tuple[list[int], SamplingParams]]]:
    """(count, seed) -> requests of every kind: greedy, sampled, penalised, biased, stopped …"""

    def make(count: int, seed: int) -> list[tuple[list[int], SamplingParams]]:
        rng = np.random.default_rng(seed)
        kinds: list[dict[str, Any]] = [
            {"temperature": 0.0},
            {"temperature": 1.0},
            {"temperature": 0.8, "top_k": 10, "top_p": 0.9},
            {"temperature": 1.2, "min_p": 0.02, "logprobs": 2},
            {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
            {"temperature": 0.9, "presence_penalty": 1.0, "ignore_eos": True},
            {"temperature": 0.0, "logit_bias": {5: 4.0, 9: -100.0}, "min_tokens": 4},
            {"temperature": 1.0, "allowed_token_ids": list(range(20, 90)), "prompt_logprobs": 1},
            {"temperature": 0.7, "bad_words_token_ids": [[11], [12, 13]], "stop_token_ids": [30, 31]},
        ]
        made = []
        for i in range(count):
            prompt = rng.integers(4, 150, rng.integers(1, 40)).tolist()
            kind = kinds[i % len(kinds)] | {"seed": int(rng.integers(2**62)), "max_tokens": int(rng.integers(1, 24))}
            kind["min_tokens"] = min(kind.get("min_tokens", 0), kind["max_tokens"])
            made.append((prompt, SamplingParams(**kind)))
        return made

    return make
