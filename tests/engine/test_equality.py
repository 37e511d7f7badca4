"""On the demo model: no combination of cache, chunk size, n, pool size and means of preemption changes an answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine import resolve
from jaxserve.engine.engine import EngineCore
from jaxserve.scheduler.policy import MemoryCosts
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import SamplingParams
from jaxserve_checkpoints.load import load_model

SYSTEM = "Mary had a little lamb, its fleece was white as snow, and everywhere that Mary went the lamb was sure to go. "
PROMPTS = [
    SYSTEM + "The moon",
    SYSTEM + "A cat sat",
    SYSTEM + "The moon",
    "The capital of France is",
    SYSTEM + SYSTEM + "Once upon a time",
    "What is the sun? The sun is",
    SYSTEM + "Once there was a fox",
]
NUM_OUTPUT = 32
CHUNKS, POOLS = (16, 48), {"large": 129, "small": 16}  # of 16 tokens: 15 hold three of the longest sequences at most
SMALL_MARGIN = 1e-3  # between the likeliest tokens: ten times what rounding may do
TOLERANCE = 1e-4  # of logprobs, until all steps of a sequence run one program


@pytest.fixture(scope="module")
def demo() -> tuple[Any, list[list[int]]]:
    """The demo model in float32, and the prompts' tokens."""
    loaded = load_model("demo", dtype="float32")
    tokenizer = Tokenizer.from_folder(loaded.folder)
    return loaded, [tokenizer.encode(text) for text in PROMPTS]


@pytest.fixture(scope="module")
def cores(demo: tuple[Any, list[list[int]]]) -> dict[tuple[int, str], EngineCore]:
    """An engine of one bucket for each chunk size and pool."""
    loaded, _ = demo
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "token_buckets", lambda max_tokens, *_: (max_tokens,))
        for chunk, pool in itertools.product(CHUNKS, POOLS):
            config = EngineConfig(
                max_num_seqs=8,
                max_num_batched_tokens=chunk,
                max_model_len=160,
                num_gpu_blocks_override=POOLS[pool],
                compilation_cache_dir=None,
                verify_swaps=True,
            )
            made[chunk, pool] = EngineCore(loaded.config, loaded.params, config)
    return made


def with_memory(core: EngineCore, *, caches: bool, swaps: bool) -> EngineCore:
    """The engine with a scheduler that caches or not, and that swaps or computes again, whatever it costs."""
    costs = MemoryCosts(swap_block_s=0.0, prefill_token_s=1.0)
    num_slots = core.limits.num_swap_blocks if swaps else 0
    limits = replace(
        core.scheduler.limits, enable_prefix_caching=caches, num_swap_blocks=num_slots, costs=costs, max_num_seqs=8
    )
    core.scheduler = Scheduler(limits)
    return core


def run(core: EngineCore, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[tuple[list, list]]]:
    """(token ids, logprobs) of each continuation of each prompt, all prompts in at once."""
    gained: dict[tuple[int, int], tuple[list, list]] = {}
    for index, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        core.add(str(index), core.check(prompt, wanted), index)
    while core.has_work:
        for index, delta in core.step():
            tokens, logprobs = gained.setdefault((index, delta.index), ([], []))
            tokens += delta.token_ids
            logprobs += delta.logprobs or ()
    core.scheduler.check_integrity()
    assert core.scheduler.num_free_blocks == core.limits.num_blocks - 1
    assert core.scheduler.memory.host.num_used == 0
    return [[gained[index, i] for i in range(params[index].n)] for index in range(len(prompts))]


def wanted(index: int, n: int) -> SamplingParams:
    """Greedy for most; the last prompts penalise, so that counts of tokens that were not fed matter."""
    penalty = 1.3 if index >= 5 else 1.0
    return SamplingParams(
        temperature=0.0, max_tokens=NUM_OUTPUT, n=n, logprobs=2, repetition_penalty=penalty, ignore_eos=True
    )


@pytest.fixture(scope="module")
def plain(
    demo: tuple[Any, list[list[int]]], cores: dict[tuple[int, str], EngineCore]
) -> list[tuple[list[int], np.ndarray]]:
    """Each prompt alone, with all memory and no cache."""
    core = with_memory(cores[48, "large"], caches=False, swaps=False)
    results = []
    for index, prompt in enumerate(demo[1]):
        [[(tokens, logprobs)]] = run(core, [prompt], [wanted(index, 1)])
        if index < 5:  # of raw logits: with a penalty they do not say how far the choice is from another
            margins = [entry.top[0][1] - entry.top[1][1] for entry in logprobs]
            assert min(margins) > SMALL_MARGIN, f"prompt {index} has a near tie: {min(margins)}"
        results.append((tokens, np.array([entry.logprob for entry in logprobs])))
    return results


@pytest.mark.parametrize("caches", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("memory", ["large", "swap", "recompute"])
def test_no_combination_changes_an_answer(
    demo: tuple[Any, list[list[int]]],
    cores: dict[tuple[int, str], EngineCore],
    plain: list[tuple[list[int], np.ndarray]],
    caches: bool,
    chunk: int,
    n: int,
    memory: str,
) -> None:
    pool = "large" if memory == "large" else "small"
    core = with_memory(cores[chunk, pool], caches=caches, swaps=memory == "swap")
    params = [wanted(index, n) for index in range(len(PROMPTS))]
    for _ in range(2 if caches else 1):  # the second time everything has been seen before
        for answers, (tokens, logprobs) in zip(run(core, demo[1], params), plain, strict=True):
            for got_tokens, got in answers:
                assert got_tokens == tokens
                worst = np.abs(np.array([entry.logprob for entry in got]) - logprobs).max()
                assert worst <= TOLERANCE
    counters = core.scheduler.counters
    assert (counters.prefix_hits > 0) == caches
    if memory == "large":
        assert core.scheduler.num_preemptions == 0
    elif n == 3 or chunk == 48:  # one after the other, in small chunks, the prompts hardly meet
        assert counters.swap_preemptions if memory == "swap" else counters.recompute_preemptions


def test_sampled_continuations_do_not_depend_on_memory(
    demo: tuple[Any, list[list[int]]], cores: dict[tuple[int, str], EngineCore]
) -> None:
    """Noise is a function of seed and position: a fork, a return from host memory and a cached prompt draw the same."""
    params = [SamplingParams(temperature=0.8, top_p=0.9, seed=7 + i, max_tokens=NUM_OUTPUT, n=3) for i in range(7)]
    tokens: Callable = lambda results: [[answer[0] for answer in answers] for answers in results]  # noqa: E731
    plain = run(with_memory(cores[48, "large"], caches=False, swaps=False), demo[1], params)
    core = with_memory(cores[48, "small"], caches=True, swaps=True)
    assert tokens(run(core, demo[1], params)) == tokens(plain)
    assert tokens(run(core, demo[1], params)) == tokens(plain)
    assert core.scheduler.counters.swap_preemptions > 0
    assert len({tuple(answer[0]) for answer in plain[0]}) > 1
