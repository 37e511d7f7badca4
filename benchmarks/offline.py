"""How many tokens a second does LLM.generate make?

    python -m benchmarks.offline [--model demo] [--dtype auto] [--workload all] [--quick] [--json FILE]

Four sets of requests (`benchmarks.workload.request_set` says which), each with an empty prefix cache: a batch, prompts
that share a prefix, one stream alone, and long prompts. Medians of several runs on one engine; loading and compiling
are reported apart. Every size of the engine is at its default.

Where the model has SmolLM2-135M's shape, the rows say how that compares with what other engines made of it on another
machine (`benchmarks.known_peers`).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time

from benchmarks.known_peers import add_known, known_peers
from benchmarks.offline_run import run_set
from benchmarks.report import Report
from benchmarks.workload import REQUEST_SETS, SAMPLE_TEXT, RequestSet, request_set
from jaxserve import LLM
from jaxserve.state import tree_device_bytes
from jaxserve_checkpoints.source import resolve


def measure(llm: LLM, requests: RequestSet, repeats: int, report: Report) -> float:
    """Rows of one set; returns its tokens a second."""
    runs = [run_set(llm, requests) for _ in range(repeats)]
    seconds = statistics.median(run.seconds for run in runs)
    rate, name = requests.num_rated_tokens / seconds, requests.name
    report.add(f"{name}: {requests.rate_name}", rate, "tok/s")
    if repeats > 1:
        spread = max(run.seconds for run in runs) - min(run.seconds for run in runs)
        report.add(f"{name}: spread of {repeats} runs", 100 * spread / seconds, "%")
    computed = requests.num_prompt_tokens - runs[-1].num_cached
    target = f"<= {requests.num_distinct_prompt_tokens:,}" if requests.num_shared else None
    report.add(f"{name}: prompt tokens computed", computed, f"of {requests.num_prompt_tokens:,}", target)
    if name == "batch":
        tokens = requests.num_prompt_tokens + requests.num_output_tokens
        report.add("batch: prompt and output", tokens / seconds, "tok/s")
    if name == "stream":
        first_s = statistics.median(run_set(llm, requests, 1).seconds for _ in range(repeats))
        each_s = (seconds - first_s) / (requests.output_tokens - 1)
        report.add("stream: first token", 1e3 * first_s, "ms")
        report.add("stream: a token", 1e3 * each_s, "ms")
    return rate


def add_memory(llm: LLM, report: Report) -> None:
    """The process's peak against what it must hold."""
    runner = llm._core.runner
    held = tree_device_bytes(runner._params) + runner.kv_bytes
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    report.add("weights and KV cache", held / 2**20, "MiB")
    # The interpreter, jax and the compiler take 0.7 GiB whatever the model: of a small one they are the most.
    report.add("peak memory of the process ÷ these", peak / held, "", "< 2" if held > 2**31 else None)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How many tokens a second does LLM.generate make?")
    parser.add_argument("--model", default="demo", help="demo, a folder, org/name")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--workload", default="all", choices=["all", *REQUEST_SETS])
    parser.add_argument("--num-requests", type=int, default=64, help="of the batch")
    parser.add_argument("--max-num-seqs", type=int, help="rows of the batch; the engine's default if not given")
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one run of a few short requests each")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    if args.quick:
        args.repeats = 1
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
    report.add("load and compile", time.perf_counter() - start, "s")
    vocabulary = sorted(set(llm.get_tokenizer().encode(SAMPLE_TEXT, add_special_tokens=False)))
    folder, dtype, room = resolve(args.model).folder, llm._core.model.dtype, llm._core.limits.max_model_len
    names = REQUEST_SETS if args.workload == "all" else (args.workload,)
    is_warm = False
    for name in names:
        requests = request_set(name, vocabulary, seed=args.seed, quick=args.quick, num_requests=args.num_requests)
        if requests.longest > room:
            print(f"{name}: left out: it needs {requests.longest} tokens of context, and the model has {room}")
            continue
        if not is_warm:
            run_set(llm, requests, output_tokens=2)  # the allocator and the branch predictor get to know the work
            is_warm = True
        rate = measure(llm, requests, args.repeats, report)
        add_known(report, f"{name}: {requests.rate_name}", rate, known_peers(folder, dtype, requests, quick=args.quick))
    add_memory(llm, report)
    report.finish(args.json)


if __name__ == "__main__":
    main()
