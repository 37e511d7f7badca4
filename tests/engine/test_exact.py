"""Exact mode: whatever else ran, and however, a request's tokens and logprobs have the same bits.

Each family and dtype has one engine and a set of requests, whose answers are first taken alone, on a cold cache. Then
come random schedules: any mix, any order of arrival, chunks of any size, cold or warm cache, pools in which sequences
are swapped or computed again, siblings, neighbours that leave. `JAXSERVE_EXACT_SCHEDULES` says how many (default 200).
So it is with the CPU's kernels, and in a tenth of the schedules with plain XLA, which serves where no compiler is.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine.engine import EngineCore
from jaxserve.models.params import decoder_specs, in_panels
from jaxserve.parallel.specs import init_arrays
from jaxserve.scheduler.policy import MemoryCosts
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.types import Delta, SamplingParams
from pallas_kernels.native.build import load_kernels

NUM_SCHEDULES = int(os.environ.get("JAXSERVE_EXACT_SCHEDULES", "200"))
MAX_LEN = 304  # more than two tiles of keys, which `make_cards` asserts
NUM_ROWS, NUM_TOKENS, BLOCK_SIZE = 8, 32, 8
VOCAB_SIZE = 512

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "LlamaForCausalLM", "num_heads": 6, "num_kv_heads": 2, "tied_embeddings": True},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "num_heads": 6, "num_kv_heads": 1, "qkv_bias": True},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "num_heads": 4, "num_kv_heads": 4, "qk_norm": True},
}
HEAD_DIMS = {"llama": 16, "qwen2": 16, "qwen3": 40}
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Card:
    """A request, and what each of its continuations is: tokens and the bits of their logprobs."""

    prompt: list[int]
    params: SamplingParams
    answers: dict[int, list[tuple[int, bytes]]]


def make_engine(family: str, dtype: str, kernels: str) -> EngineCore:
    model = ModelConfig(
        **FAMILIES[family],
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        intermediate_size=160,
        num_layers=2,
        head_dim=HEAD_DIMS[family],
        max_position=MAX_LEN,
        eos_token_ids=(3,),
        dtype=dtype,  # type: ignore[arg-type]
    )
    params = jax.tree.map(lambda x: x * 4, init_arrays(decoder_specs(model), jax.random.key(1)))
    config = EngineConfig(
        max_num_seqs=NUM_ROWS,
        max_num_batched_tokens=NUM_TOKENS,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=NUM_ROWS * MAX_LEN // BLOCK_SIZE + 1,
        compilation_cache_dir=None,
        exact=True,
        attention_backend="pallas" if kernels == "kernels" else "xla",
        verify_swaps=True,
        stream_interval_ms=float("inf"),
    )
    return EngineCore(model, in_panels(params) if kernels == "kernels" else params, config)


def bits(delta: Delta) -> list[tuple[int, bytes]]:
    """Each token of a delta with the bits of its logprob and those of the likeliest."""
    entries = delta.logprobs or ()
    values = [[entry.logprob, *(value for _, value in entry.top)] for entry in entries]
    return [(token, np.array(row).tobytes()) for token, row in zip(delta.token_ids, values, strict=True)]


def make_cards(core: EngineCore) -> list[Card]:
    """Twelve requests, most of which begin alike, and their answers alone on a cold cache."""
    rng = np.random.default_rng(7)
    shared = rng.integers(4, VOCAB_SIZE, 200).tolist()
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "n": 3},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
        {"temperature": 1.2, "min_p": 0.01, "presence_penalty": 0.5, "logit_bias": {9: 2.0}},
        {"temperature": 0.0, "n": 2, "min_tokens": 6},
    ]
    cards = []
    for index in range(12):
        prompt = shared[: int(rng.integers(1, 190))] + rng.integers(4, VOCAB_SIZE, int(rng.integers(1, 60))).tolist()
        kind = kinds[index % len(kinds)]
        params = SamplingParams(**kind, seed=index, max_tokens=int(rng.integers(12, 49)), logprobs=3)
        core.reset_prefix_cache()
        core.add("alone", core.check(prompt, params), index)
        answers: dict[int, list[tuple[int, bytes]]] = {i: [] for i in range(params.n)}
        while core.has_work:
            for _, delta in core.step():
                answers[delta.index] += bits(delta)
        cards.append(Card(prompt, params, answers))
    tiles = {-(-(len(card.prompt) + len(card.answers[0])) // core.limits.kv_tile) for card in cards}
    assert {1, 2} < tiles, f"contexts of {sorted(tiles)} tiles of keys: some must fill one, some two, some more"
    return cards


@pytest.fixture(scope="module", params=product(FAMILIES, DTYPES, ("kernels", "xla")), ids="-".join)
def served(request: pytest.FixtureRequest) -> tuple[EngineCore, list[Card]]:
    if request.param[2] == "kernels" and (missing := load_kernels(None).missing) is not None:
        pytest.skip(missing)
    core = make_engine(*request.param)
    return core, make_cards(core)


def run_schedule(core: EngineCore, cards: list[Card], dice: random.Random) -> tuple[int, int]:
    """One random schedule; returns how many words were compared, and how often somebody gave way."""
    reset(core, dice)
    arrivals = sorted((dice.choice([0, 0, dice.randrange(30)]), i) for i in range(dice.randint(1, 9)))
    chosen = [dice.randrange(len(cards)) for _ in arrivals]
    leaves = {i: dice.randint(1, 40) for _, i in arrivals if dice.random() < 0.2}
    got: dict[tuple[int, int], list[tuple[int, bytes]]] = {}
    step = 0
    while core.has_work or arrivals:
        while arrivals and arrivals[0][0] <= step:
            _, i = arrivals.pop(0)
            card = cards[chosen[i]]
            core.add(f"r{i}", core.check(card.prompt, card.params), i)
        for i, when in leaves.items():
            if when == step:
                core.abort(f"r{i}")
        for i, delta in core.step():
            got.setdefault((i, delta.index), []).extend(bits(delta))
        step += 1
    num_words = 0
    for (i, index), answer in got.items():
        want = cards[chosen[i]].answers[index]
        assert answer == (want[: len(answer)] if i in leaves else want), f"request {chosen[i]} of {chosen}"
        num_words += sum(1 + len(values) // 8 for _, values in answer)
    for i in set(range(len(chosen))) - leaves.keys():
        assert {index for j, index in got if j == i} == set(range(cards[chosen[i]].params.n))
    return num_words, core.scheduler.num_preemptions


def reset(core: EngineCore, dice: random.Random) -> None:
    """Another scheduler for the same programs: chunks, pool, cache (warm or not), means of preemption."""
    warm = dice.random() < 0.5
    longest = -(-MAX_LEN // BLOCK_SIZE)
    limits = replace(
        core.scheduler.limits,
        max_num_seqs=NUM_ROWS,
        max_num_batched_tokens=dice.choice([NUM_ROWS, NUM_ROWS + 1, 13, 20, NUM_TOKENS]),
        num_blocks=1 + dice.choice([longest, longest + 4, longest + 12, core.limits.num_blocks - 1]),
        enable_prefix_caching=dice.random() < 0.8,
        num_swap_blocks=dice.choice([0, core.limits.num_swap_blocks]),
        costs=MemoryCosts(swap_block_s=dice.choice([0.0, 1.0]), prefill_token_s=1e-3),
    )
    if limits != core.scheduler.limits or not warm:
        core.scheduler = Scheduler(limits)
    core.config = replace(
        core.config, async_scheduling=dice.random() < 0.8, stream_interval_ms=dice.choice([0.0, float("inf")])
    )


def test_no_schedule_moves_a_bit(served: tuple[EngineCore, list[Card]]) -> None:
    core, cards = served
    num_words = num_preemptions = 0
    num_schedules = NUM_SCHEDULES if core.limits.panels else -(-NUM_SCHEDULES // 10)
    for seed in range(num_schedules):
        words, preemptions = run_schedule(core, cards, random.Random(seed))
        num_words += words
        num_preemptions += preemptions
    assert num_words > 100 * num_schedules
    assert num_preemptions > num_schedules // 4


def test_all_buckets_agree(served: tuple[EngineCore, list[Card]]) -> None:
    """Else exact mode would be the largest bucket's alone, and cost as much.

    XLA:CPU's bfloat16 products of two rows differ on some processors (tests/device/test_exact_bits.py).
    """
    core, _ = served
    limits, kept = core.limits, [shape.num_tokens for shape, _ in core.runner.compiled.steps]
    is_free = limits.panels or core.model.dtype == "float32"
    assert kept in ([list(limits.token_buckets)] if is_free else [list(limits.token_buckets[n:]) for n in (0, 1)])
    assert min(kept) <= 8 or limits.panels


def digest(cards: list[Card]) -> str:
    return hashlib.sha256(repr([card.answers for card in cards]).encode()).hexdigest()


def test_a_restart_moves_no_bit(served: tuple[EngineCore, list[Card]], request: pytest.FixtureRequest) -> None:
    """Programs compiled anew in another process give the same answers."""
    if request.node.callspec.id != "qwen3-bfloat16-kernels":
        pytest.skip("one family and dtype: another process compiles for seconds")
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (root, root / "server", root / "checkpoints")))
    command = [sys.executable, __file__, "qwen3", "bfloat16", "kernels"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": paths}, timeout=300
    )
    assert done.stdout.split()[-1] == digest(served[1])


if __name__ == "__main__":
    print(digest(make_cards(make_engine(*sys.argv[1:]))))
