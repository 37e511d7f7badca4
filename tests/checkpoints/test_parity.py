"""Every family, from its folder through the loader and the engine, against the reference implementation.

The goldens are transformers' float32 logits and greedy tokens (`scripts/make_goldens.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import steps
from jaxserve.config import EngineConfig, EngineLimits, ModelConfig
from jaxserve.engine import resolve
from jaxserve.engine.engine import EngineCore
from jaxserve.engine.pack import StepPacker
from jaxserve.engine.programs import step_shape
from jaxserve.models.decoder import logits
from jaxserve.scheduler.policy import SchedulerLimits
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequences import Request
from jaxserve.state import init_decode_state, init_kv_cache, unpack
from jaxserve.types import SamplingParams
from jaxserve_checkpoints.load import load_model

FAMILIES = [
    "llama2", "llama3", "llama31", "llama32", "smollm", "mistral", "qwen2", "qwen2_window", "qwen3", "llama_bias",
    "rope_linear", "rope_dynamic", "rope_yarn", "rope_yarn_mscale", "rope_yarn_factor",
]  # fmt: skip
TOKENS = 16  # a step; prompts of up to 70 tokens take five


@pytest.fixture
def one_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """One compiled step instead of three: what is judged here is numbers, not buckets."""
    monkeypatch.setattr(resolve, "token_buckets", lambda max_tokens, *_: (max_tokens,))


def engine_config(**changes: Any) -> EngineConfig:
    values = {"max_num_seqs": 4, "max_num_batched_tokens": TOKENS, "block_size": 8, "compilation_cache_dir": None}
    return EngineConfig(**values | changes)


def split_prompts(golden: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return np.split(golden["prompts"], np.cumsum(golden["prompt_lens"])[:-1])


def chunked_logits(
    model: ModelConfig, params: Any, limits: EngineLimits, prompts: list[np.ndarray]
) -> list[np.ndarray]:
    """float32 [len, V] of each prompt, all fed together through the scheduler's chunks and the paged cache."""
    shape = step_shape(limits, limits.max_num_batched_tokens)

    def step(params: Any, kv: Any, state: Any, packed: Any) -> Any:
        batch = unpack(packed, shape)
        tables = state.block_tables.at[batch.update_rows, batch.update_cols].set(batch.update_ids, mode="drop")
        state = replace(state, block_tables=tables)
        hidden, kv = steps._forward(params, kv, state, batch, model, shape, limits.max_model_len)
        return kv, state, logits(params, hidden)

    run = jax.jit(step, donate_argnums=(1, 2))
    kv = init_kv_cache(model, limits.num_blocks, limits.block_size, limits.kv_dtype, as_bits=True)
    state = init_decode_state(limits.max_num_seqs, limits.max_blocks_per_row, model.vocab_size)
    fields = ("num_blocks", "block_size", "max_num_seqs", "max_model_len", "max_num_batched_tokens")
    sizes = {name: getattr(limits, name) for name in fields}
    scheduler = Scheduler(SchedulerLimits(**sizes, enable_prefix_caching=False))  # every position's logits are wanted
    packer = StepPacker(np.zeros(limits.max_num_seqs, np.int32))
    found = [np.zeros((len(p), model.vocab_size), np.float32) for p in prompts]
    for i, prompt in enumerate(prompts):
        scheduler.add(Request(str(i), prompt.astype(np.int32), len(prompt) + 1))
    while scheduler.has_work:
        plan = scheduler.commit(scheduler.plan())
        s = scheduler.sequences
        for admitted in plan.admitted:
            tables = state.block_tables.at[admitted.row, : len(admitted.block_ids)].set(admitted.block_ids)
            state = replace(state, block_tables=tables)
        packed = packer.pack(plan, shape, s.token_ids, s.num_prompt)
        kv, state, out = run(params, kv, state, packed)
        offset = 0
        for row, start, length in zip(plan.prefill_rows, plan.prefill_starts, plan.prefill_lens, strict=True):
            found[int(s.at(row).request.request_id)][start : start + length] = np.asarray(out)[offset : offset + length]
            offset += length
        scheduler.digest(plan, np.zeros(len(plan.sampled_rows), np.int32))
    return found


def with_greedy(golden: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Each prompt and the reference's continuation but its last token: teacher forcing."""
    return [np.concatenate([p, g[:-1]]) for p, g in zip(split_prompts(golden), golden["greedy"], strict=True)]


@pytest.mark.usefixtures("one_bucket")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_equal_the_reference(
    family: str, tiny_folder: Callable[[str], Path], golden: Callable[[str], Mapping[str, np.ndarray]]
) -> None:
    want = golden(family)
    loaded = load_model(tiny_folder(family))
    config = engine_config(max_model_len=min(128, loaded.config.max_position))
    limits = resolve.resolve_engine_config(config, loaded.config, weight_bytes=0)
    found = chunked_logits(loaded.config, loaded.params, limits, with_greedy(want))
    lengths = want["prompt_lens"]
    over_prompts = np.concatenate([f[:n] for f, n in zip(found, lengths, strict=True)])
    np.testing.assert_allclose(over_prompts, want["logits"], atol=1e-4, rtol=0)
    # Greedy decoding picks these tokens one by one: each is the argmax after those before it.
    assert [f[n - 1 :].argmax(-1).tolist() for f, n in zip(found, lengths, strict=True)] == want["greedy"].tolist()


@pytest.mark.usefixtures("one_bucket")
@pytest.mark.parametrize("family", ["llama31", "mistral", "qwen3"])
def test_the_engine_generates_the_reference_s_greedy_tokens(
    family: str, tiny_folder: Callable[[str], Path], golden: Callable[[str], Mapping[str, np.ndarray]]
) -> None:
    want = golden(family)
    loaded = load_model(tiny_folder(family))
    core = EngineCore(loaded.config, loaded.params, engine_config(max_model_len=128))
    params = SamplingParams(temperature=0, max_tokens=want["greedy"].shape[1], ignore_eos=True)
    tokens: dict[int, list[int]] = {}
    for i, prompt in enumerate(split_prompts(want)):
        core.add(str(i), core.check(prompt, params), i)
        tokens[i] = []
    while core.has_work:
        for i, delta in core.step():
            tokens[i].extend(delta.token_ids)
    assert list(tokens.values()) == want["greedy"].tolist()


@pytest.mark.usefixtures("one_bucket")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_stay_near_the_reference(
    dtype: str, tiny_folder: Callable[[str], Path], golden: Callable[[str], Mapping[str, np.ndarray]]
) -> None:
    """The yardstick is what rounding the weights alone does to float32 logits.

    Served in 16 bits, the operands of products and the KV are rounded too: for each weight that meets an
    activation, two roundings of the same relative size more. Four times the yardstick bounds the sum.
    """
    want = golden("qwen3")
    prompts = split_prompts(want)

    def rms_error(loaded_dtype: str, params: Any = None) -> float:
        loaded = load_model(tiny_folder("qwen3"), dtype=loaded_dtype)
        limits = resolve.resolve_engine_config(engine_config(max_model_len=128), loaded.config, weight_bytes=0)
        found = chunked_logits(loaded.config, params or loaded.params, limits, prompts)
        return float(np.sqrt(np.mean((np.concatenate(found) - want["logits"]) ** 2)))

    exact = load_model(tiny_folder("qwen3"))
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype("float32"), exact.params)
    yardstick = rms_error("float32", rounded)
    assert 0 < rms_error(dtype) < 4 * yardstick


@pytest.mark.usefixtures("one_bucket")
def test_a_context_of_131072_tokens(
    tiny_folder: Callable[[str], Path], golden: Callable[[str], Mapping[str, np.ndarray]]
) -> None:
    """NFR-12: prefilled in chunks of 4,096; logits at both ends and between, and what follows the end."""
    want = golden("long")
    tokens = np.concatenate([want["prompt"], want["greedy"][:-1]]).astype(np.int32)
    loaded = load_model(tiny_folder("long"))
    config = engine_config(max_num_seqs=1, max_num_batched_tokens=4096, block_size=256)
    limits = resolve.resolve_engine_config(config, loaded.config, weight_bytes=0)
    assert limits.max_model_len == len(want["prompt"]) == 131_072
    # The reference goes on past the context; room for that, and larger tiles, which are faster this far out.
    num_blocks = limits.num_blocks + 4
    limits = replace(
        limits,
        max_model_len=132_096,
        num_blocks=num_blocks,
        max_blocks_per_row=num_blocks - 1,
        q_tile=512,
        kv_tile=1024,
    )
    found = chunked_logits(loaded.config, loaded.params, limits, [tokens])[0]
    np.testing.assert_allclose(found[want["positions"]], want["logits"], atol=1e-4, rtol=0)
    assert found[len(want["prompt"]) - 1 :].argmax(-1).tolist() == want["greedy"].tolist()
