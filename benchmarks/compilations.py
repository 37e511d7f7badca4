"""Is anything compiled after ready, whatever is asked for?

    python -m benchmarks.compilations [--model demo] [--quick] [--json FILE]

10,000 random requests (`--quick`: 500) of every kind, mixed: penalties, truncation, biases, allowed ids, bad words,
logprobs of output and prompt, several samples, beam searches, aborts, prompts that share prefixes, in a small KV pool,
so that sequences are swapped, copied on write and computed again. Ends with status 1 if a program was compiled.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.report import Report
from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine.engine import EngineCore
from jaxserve.types import BeamSearchParams, SamplingParams
from jaxserve_checkpoints.load import load_for_engine

Asked = tuple[list[int], SamplingParams | BeamSearchParams]

NUM_REQUESTS, NUM_QUICK = 10_000, 500
MAX_PROMPT, MAX_OUTPUT = 100, 60
BLOCK_SIZE, NUM_BLOCKS = 4, 161  # where 32 rows of 160 tokens would fill 1,280
NUM_OPEN = 96  # requests in the engine at once, running or waiting


def random_requests(model: ModelConfig, count: int, seed: int) -> Iterator[Asked]:
    """Requests of every kind; a third of the prompts begin with one of four prefixes."""
    rng = np.random.default_rng(seed)
    prefixes = [rng.integers(4, model.vocab_size, 64).tolist() for _ in range(4)]
    for _ in range(count):
        prompt = rng.integers(4, model.vocab_size, rng.integers(1, MAX_PROMPT - 64)).tolist()
        if rng.random() < 1 / 3:
            prompt = prefixes[rng.integers(4)] + prompt
        max_tokens = int(rng.integers(1, MAX_OUTPUT + 1))
        if rng.random() < 0.05:
            yield prompt, BeamSearchParams(beam_width=int(rng.integers(1, 5)), max_tokens=max_tokens)
        else:
            yield prompt, random_params(rng, model.vocab_size, max_tokens)


def random_params(rng: np.random.Generator, vocab_size: int, max_tokens: int) -> SamplingParams:
    """Each field that asks for something is set in one request of eight."""
    ids = rng.integers(0, vocab_size, 40).tolist()
    kinds: dict[str, Any] = {
        "n": int(rng.integers(2, 5)),
        "top_k": int(rng.integers(1, 300)),
        "top_p": float(rng.random()),
        "min_p": float(rng.random()),
        "repetition_penalty": 0.5 + float(rng.random()),
        "frequency_penalty": float(rng.random()),
        "presence_penalty": -float(rng.random()),
        "logit_bias": {int(token): float(rng.normal()) for token in ids[:20]},
        "min_tokens": int(rng.integers(0, max_tokens + 1)),
        "stop_token_ids": ids[:4],
        "allowed_token_ids": ids,
        "bad_words_token_ids": [ids[:1], ids[1:4]],
        "logprobs": int(rng.integers(0, 21)),
        "prompt_logprobs": int(rng.integers(0, 21)),
    }
    asked = {name: value for name, value in kinds.items() if rng.random() < 1 / 8}
    temperature = float(rng.choice([0.0, 0.0, 0.7, 1.0, 2.0]))
    return SamplingParams(
        temperature=temperature, max_tokens=max_tokens, seed=int(rng.integers(2**62)), ignore_eos=True, **asked
    )


def serve(core: EngineCore, requests: Iterator[Asked], seed: int) -> int:
    """Serves them all, one in fifty being aborted; returns how many tokens came."""
    rng, num_open, num_tokens, place = np.random.default_rng(seed), 0, 0, 0
    waiting = True
    while waiting or core.has_work:
        while waiting and num_open < NUM_OPEN:
            request = next(requests, None)
            waiting = request is not None
            if request is not None:
                prompt, params = request
                core.add(f"r{place}", core.check(prompt, params), [f"r{place}", params.num_sequences])
                num_open, place = num_open + 1, place + 1
        for owner, delta in core.step():
            num_tokens += len(delta.token_ids)
            owner[1] -= delta.finish_reason is not None
            num_open -= delta.finish_reason is not None and owner[1] == 0
            if owner[1] > 0 and rng.random() < 0.004 and core.abort(owner[0]) is not None:
                owner[1], num_open = 0, num_open - 1
    return num_tokens


def main() -> int:
    parser = argparse.ArgumentParser(description="Is anything compiled after ready?")
    parser.add_argument("--model", default="demo", help="demo, a folder, org/name")
    parser.add_argument("--quick", action="store_true", help=f"{NUM_QUICK} requests")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    count = NUM_QUICK if args.quick else NUM_REQUESTS
    config = EngineConfig(
        max_num_seqs=32,
        max_model_len=MAX_PROMPT + MAX_OUTPUT,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=NUM_BLOCKS,
    )
    model = load_for_engine(args.model, config)
    core = EngineCore(model.config, model.params, config)
    begin = time.perf_counter()
    num_tokens = serve(core, random_requests(model.config, count, seed=0), seed=1)
    counters, metrics, compiled = core.scheduler.counters, core.metrics, core.stats().num_compilations_after_ready
    report = Report("compilations")
    report.add("requests", count, "", None)
    report.add("ended otherwise than by length, stop or abort", metrics.request_success["error"], "", 0)
    report.add("output tokens", num_tokens, "tok", None)
    report.add("time", time.perf_counter() - begin, "s", None)
    report.add("preempted, swapped", counters.swap_preemptions, "", "> 0")
    report.add("preempted, computed again", core.scheduler.num_preemptions - counters.swap_preemptions, "", None)
    report.add("blocks copied on write", counters.copied_blocks, "", "> 0")
    report.add("prompt tokens found in the prefix cache", counters.prefix_hits, "tok", "> 0")
    report.add("compilations after ready", compiled, "", 0)
    report.finish(args.json)
    return 1 if compiled else 0


if __name__ == "__main__":
    sys.exit(main())
