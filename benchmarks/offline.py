"""How many tokens a second does LLM.generate make?

    python -m benchmarks.offline [--model demo] [--dtype auto] [--quick] [--json FILE]

64 requests at once with lognormal prompts (median 128, at most 512 tokens) and 64 output tokens each,
then one stream alone. Medians of several runs on one engine; loading and compiling are reported apart.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from benchmarks.report import Report
from benchmarks.workload import SAMPLE_TEXT, Workload
from jaxserve import LLM, SamplingParams

ONE_STREAM_PROMPT = 128
ONE_STREAM_OUTPUT = 128


def timed_run(llm: LLM, prompts: list[list[int]], output_tokens: int) -> float:
    """Seconds to generate exactly `output_tokens` for every prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed = time.perf_counter() - start
    made = [len(output.outputs[0].token_ids) for output in outputs]
    assert made == [output_tokens] * len(prompts), made
    return elapsed


def measure(llm: LLM, work: Workload, repeats: int, report: Report) -> None:
    vocabulary = sorted(set(llm.get_tokenizer().encode(SAMPLE_TEXT, add_special_tokens=False)))
    prompts = work.prompts(vocabulary)
    num_prompt, num_output = sum(map(len, prompts)), work.num_requests * work.output_tokens
    timed_run(llm, prompts[:4], 4)  # the allocator and the branch predictor get to know the work
    seconds = [timed_run(llm, prompts, work.output_tokens) for _ in range(repeats)]
    batch_s = statistics.median(seconds)
    alone = np.random.default_rng(work.seed).choice(np.asarray(vocabulary), ONE_STREAM_PROMPT).tolist()
    alone_s = statistics.median(timed_run(llm, [alone], ONE_STREAM_OUTPUT) for _ in range(repeats))
    first_s = statistics.median(timed_run(llm, [alone], 1) for _ in range(repeats))
    report.add("prompt tokens", num_prompt, "tok", None)
    report.add("output tokens", num_output, "tok", None)
    report.add("batch: output", num_output / batch_s, "tok/s", None)
    report.add("batch: total", (num_prompt + num_output) / batch_s, "tok/s", None)
    report.add("batch: spread of runs", 100 * (max(seconds) - min(seconds)) / batch_s, "%", None)
    report.add("one stream: output", ONE_STREAM_OUTPUT / alone_s, "tok/s", None)
    report.add("one stream: first token", 1e3 * first_s, "ms", None)
    report.add("one stream: a token", 1e3 * (alone_s - first_s) / (ONE_STREAM_OUTPUT - 1), "ms", None)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How many tokens a second does LLM.generate make?")
    parser.add_argument("--model", default="demo", help="demo, a folder, org/name")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--median-prompt", type=int, default=128)
    parser.add_argument("--max-prompt", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, help="rows of the batch; the engine's default if not given")
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one run of 16 requests")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    if args.quick:
        args.num_requests, args.repeats = min(args.num_requests, 16), 1
    return args


def main() -> None:
    args = parse_args()
    report = Report("offline")
    start = time.perf_counter()
    llm = LLM(
        args.model,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    report.add("load and compile", time.perf_counter() - start, "s", None)
    work = Workload(
        num_requests=args.num_requests,
        median_prompt=args.median_prompt,
        max_prompt=args.max_prompt,
        output_tokens=args.output_tokens,
        seed=args.seed,
    )
    measure(llm, work, args.repeats, report)
    report.finish(args.json)


if __name__ == "__main__":
    main()
