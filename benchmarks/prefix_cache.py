"""What do the prefix cache, parallel samples and beams save, and what does the cache cost where it can save nothing?

    python -m benchmarks.prefix_cache [--model demo] [--dtype auto] [--quick] [--json FILE]

Two engines, one with the prefix cache and one without, take the same batches in turn; every figure is the median over
the rounds, every ratio the median of the rounds' ratios.

* shared: 48 prompts of 416 tokens, the first 384 of which are the same, 32 output tokens each; the cache is emptied
  before each batch.
* distinct: the same sizes, no two prompts alike, and none that came before: nothing can be found, and once the pool is
  full each block that is taken is evicted. Here processor time is compared, of all threads: the machine may be shared.
* samples: 8 prompts with n = 8, against each prompt 8 times with n = 1, both on the engine without the cache.
* beams: searches of width 8 for 8 prompts of 64 tokens, against sampling with n = 8.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.core_run import Batch, make_core, run_batch
from benchmarks.report import Report
from jaxserve.engine.engine import EngineCore
from jaxserve.types import BeamSearchParams, SamplingParams

NUM_REQUESTS, NUM_PROMPT, NUM_SHARED, NUM_OUTPUT = 48, 416, 384, 32
WIDTH = 8


class Prompts:
    """Random prompts; no two begin alike but where that is asked for."""

    def __init__(self, vocab_size: int, seed: int = 0):
        self._rng, self._vocab_size = np.random.default_rng(seed), vocab_size

    def distinct(self, count: int, length: int) -> list[np.ndarray]:
        return list(self._rng.integers(10, self._vocab_size, (count, length)))

    def shared(self, count: int, num_shared: int, length: int) -> list[np.ndarray]:
        start = self.distinct(1, num_shared)[0]
        return [np.concatenate([start, end]) for end in self.distinct(count, length - num_shared)]


def greedy(num_output: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)


def sampling(num_output: int, n: int) -> SamplingParams:
    return SamplingParams(n=n, temperature=1.0, max_tokens=num_output, ignore_eos=True, seed=1)


def in_turn(ways: Sequence[Callable[[], Batch]], num_rounds: int) -> list[list[Batch]]:
    """The batches of each way, after one round that does not count. Every other round goes backwards."""
    batches: list[list[Batch]] = [[] for _ in ways]
    order = list(range(len(ways)))
    for round_ in range(-1, num_rounds):
        for index in order:
            batch = ways[index]()
            if round_ >= 0:
                batches[index].append(batch)
        order.reverse()
    return batches


def ratio(over: list[Batch], under: list[Batch], attribute: str) -> float:
    """Median of the rounds' ratios of one attribute."""
    pairs = zip(over, under, strict=True)
    return float(np.median([getattr(a, attribute) / getattr(b, attribute) for a, b in pairs]))


def shared_prompts(report: Report, cached: EngineCore, plain: EngineCore, num_rounds: int) -> None:
    prompts = Prompts(cached.model.vocab_size, 1).shared(NUM_REQUESTS, NUM_SHARED, NUM_PROMPT)

    def emptied() -> Batch:
        cached.reset_prefix_cache()
        return run_batch(cached, prompts, greedy(NUM_OUTPUT))

    on, off = in_turn([emptied, lambda: run_batch(plain, prompts, greedy(NUM_OUTPUT))], num_rounds)
    hits = on[0].num_cached / (NUM_REQUESTS * NUM_PROMPT)
    for name, batches in (("on", on), ("off", off)):
        rate = np.median([batch.num_output / batch.wall_s for batch in batches])
        first_s = np.median([np.mean(batch.first_s) for batch in batches])
        report.add(f"shared, cache {name}: output", float(rate), "tok/s")
        report.add(f"shared, cache {name}: first token, mean", 1e3 * float(first_s), "ms")
    report.add("shared: prompt tokens found", 100 * hits, "%")
    report.add("shared: throughput, on over off", ratio(off, on, "wall_s"), "")
    alone = prompts[:1]
    warm, cold = in_turn(
        [lambda: run_batch(cached, alone, greedy(1)), lambda: run_batch(plain, alone, greedy(1))], 3 * num_rounds
    )
    for name, batches in (("found", warm), ("not found", cold)):
        first_s = np.median([batch.first_s[0] for batch in batches])
        report.add(f"alone, {NUM_PROMPT} tokens {name}: first token", 1e3 * float(first_s), "ms")


def distinct_prompts(report: Report, cached: EngineCore, plain: EngineCore, num_rounds: int) -> None:
    seen = [Prompts(cached.model.vocab_size, 2) for _ in range(2)]

    def batch(core: EngineCore, prompts: Prompts) -> Batch:
        return run_batch(core, prompts.distinct(NUM_REQUESTS, NUM_PROMPT), greedy(NUM_OUTPUT))

    on, off = in_turn([lambda: batch(cached, seen[0]), lambda: batch(plain, seen[1])], num_rounds)
    assert not any(b.num_cached for b in on), "a prompt was found that nobody had sent"
    cost = [100 * (a.cpu_s / b.cpu_s - 1) for a, b in zip(on, off, strict=True)]
    report.add("distinct: processor time, on over off, less 1", float(np.median(cost)), "%", "<= 1")
    low, high = np.percentile(cost, [25, 75])
    report.add("distinct: the same, quartiles of the rounds apart", float(high - low), "%")
    report.add("distinct: wall time, on over off, less 1", 100 * (ratio(on, off, "wall_s") - 1), "%")


def samples_and_beams(report: Report, plain: EngineCore, num_rounds: int) -> None:
    prompts = Prompts(plain.model.vocab_size, 3)
    heads = prompts.distinct(8, NUM_PROMPT)
    repeated = [prompt for prompt in heads for _ in range(WIDTH)]
    together, one_by_one = in_turn(
        [
            lambda: run_batch(plain, heads, sampling(NUM_OUTPUT, n=WIDTH)),
            lambda: run_batch(plain, repeated, sampling(NUM_OUTPUT, n=1)),
        ],
        num_rounds,
    )
    report.add("n = 8 over 8 requests, cache off: throughput", ratio(one_by_one, together, "wall_s"), "")
    short = prompts.distinct(8, 64)
    search = BeamSearchParams(beam_width=WIDTH, max_tokens=NUM_OUTPUT, ignore_eos=True)
    beams, samples = in_turn(
        [lambda: run_batch(plain, short, search), lambda: run_batch(plain, short, sampling(NUM_OUTPUT, n=WIDTH))],
        num_rounds,
    )
    for name, batches in (("width 8", beams), ("n = 8", samples)):
        rate = np.median([batch.num_output / batch.wall_s for batch in batches])
        report.add(f"beams, {name}: output", float(rate), "tok/s")
    report.add("beams, width 8 over n = 8: throughput", ratio(samples, beams, "wall_s"), "", ">= 0.7")


def main() -> None:
    parser = argparse.ArgumentParser(description="What the prefix cache, parallel samples and beams save and cost.")
    parser.add_argument("--model", default="demo", help="demo, a folder, org/name")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    num_rounds = 2 if args.quick else args.rounds
    cached = make_core(args.model, args.dtype, enable_prefix_caching=True)
    plain = make_core(args.model, args.dtype, enable_prefix_caching=False)
    report = Report("prefix_cache")
    shared_prompts(report, cached, plain, num_rounds)
    distinct_prompts(report, cached, plain, 2 * num_rounds)
    samples_and_beams(report, plain, num_rounds)
    report.finish(args.json)


if __name__ == "__main__":
    main()
