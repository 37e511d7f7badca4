"""How fast is a running server for its users?

    python -m benchmarks.serve [--model demo] [--rates 1,2,4] [--streams 64] [--offline-rounds 3] [--quick]

Open loop: requests arrive by a Poisson process whether or not earlier ones are answered, once for each
rate. Closed loop: a fixed number of clients, each sending its next request when the last is answered.
The server is started here, unless --url names one; it and the clients share the machine.

Goodput counts the requests a second that met both objectives: TTFT and the request's mean inter-token
latency (the definition of DistServe, arXiv:2401.09670 §2).

Last, what serving costs: the closed loop's requests once through `LLM` in a process of its own with the server's
flags, and once through the server, all streams at once; --offline-rounds times, with other prompts each. The row is
the median of the rounds' ratios of output tokens a second. The server idles while the other runs.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import time
import urllib.request
from contextlib import nullcontext

import jax
import numpy as np
import uvloop

from benchmarks.offline_run import our_command, run_elsewhere
from benchmarks.report import Report
from benchmarks.running_server import running_server
from benchmarks.stream_client import StreamClient, StreamResult
from benchmarks.workload import SAMPLE_TEXT, RequestSet, Workload
from jaxserve.config import EngineConfig
from jaxserve.engine.resolve import default_token_budget
from jaxserve_server.flags import parse_options

TTFT_OBJECTIVE_S = 0.200
ITL_OBJECTIVE_S = 0.050
TARGETS = {
    "TTFT p50": "< 100",
    "TTFT p99": "< 200",
    "ITL p50": "< 20",
    "ITL p99": "< 50",
    "tokens per request p50": "> 50",
    "success": "> 99.9",
}


async def open_loop(client: StreamClient, prompts: list[list[int]], arrivals_s: np.ndarray) -> list[StreamResult]:
    """Every prompt at its arrival time; returns when all are answered."""
    start = time.perf_counter()
    tasks = []
    for prompt, arrival in zip(prompts, arrivals_s.tolist(), strict=True):
        await asyncio.sleep(max(start + arrival - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(client.complete(prompt, start + arrival)))
    return await asyncio.gather(*tasks)


async def closed_loop(client: StreamClient, prompts: list[list[int]], num_streams: int) -> list[StreamResult]:
    """`num_streams` clients that share the prompts among them."""
    waiting = iter(prompts)

    async def one_client() -> list[StreamResult]:
        return [await client.complete(prompt, time.perf_counter()) for prompt in waiting]

    return [
        result for results in await asyncio.gather(*(one_client() for _ in range(num_streams))) for result in results
    ]


def offline_command(model: str, flags: list[str]) -> list[str]:
    """`LLM` in a process of its own, with what the server's flags say of the engine, and its steps no larger."""
    options = parse_options([model, *flags])
    default = EngineConfig()
    config = {f.name: getattr(options.engine, f.name) for f in dataclasses.fields(EngineConfig)}
    changed = {name: value for name, value in config.items() if value != getattr(default, name)}
    on_cpu = jax.default_backend() == "cpu"
    budget = max(default_token_budget(options.engine, on_cpu=on_cpu), options.engine.max_num_seqs or 0)
    changed.setdefault("max_num_batched_tokens", budget)
    return our_command(options.model, options.dtype, changed, rehearses=True)  # the server has answered before, too


async def against_offline(client: StreamClient, command: list[str], rounds: list[RequestSet], report: Report) -> None:
    """Rows of the same requests through the server and through `command`, in turn."""
    served, offline = [], []
    for requests in rounds:
        answer = await asyncio.to_thread(run_elsewhere, command, [requests])
        offline.append(requests.num_output_tokens / answer["runs"][requests.name]["seconds"])
        results = await closed_loop(client, requests.prompts, len(requests.prompts))
        failures = [result.error for result in results if result.error]
        if failures:
            raise SystemExit(f"{len(failures)} of {len(results)} streams failed: {failures[0]}")
        assert sum(result.num_tokens for result in results) == requests.num_output_tokens, "an answer is too short"
        served.append(summarise(results)["output"][0])
    streams = len(rounds[0].prompts)
    ratios = [over / under for over, under in zip(served, offline, strict=True)]
    report.add(f"{streams} streams at once: server, output", statistics.median(served), "tok/s")
    report.add(f"{streams} streams at once: offline, output", statistics.median(offline), "tok/s")
    report.add(f"{streams} streams at once: server ÷ offline", statistics.median(ratios), "", ">= 0.85")


def summarise(results: list[StreamResult]) -> dict[str, tuple[float, str]]:
    """name -> (value, unit). Latencies are of the requests that succeeded."""
    good = [result for result in results if result.error is None]
    values = {"requests": (float(len(results)), ""), "success": (100.0 * len(good) / len(results), "%")}
    if not good:
        return values
    span_s = max(r.event_s[-1] for r in good) - min(r.due_s for r in results)
    ttft_ms = 1e3 * np.asarray([r.ttft_s for r in good])
    gaps_ms = 1e3 * np.asarray([gap for r in good for gap in r.gaps_s] or [0.0])
    met = sum(r.ttft_s <= TTFT_OBJECTIVE_S and r.mean_itl_s <= ITL_OBJECTIVE_S for r in good)
    return values | {
        "TTFT p50": (float(np.percentile(ttft_ms, 50)), "ms"),
        "TTFT p99": (float(np.percentile(ttft_ms, 99)), "ms"),
        "ITL p50": (float(np.percentile(gaps_ms, 50)), "ms"),
        "ITL p99": (float(np.percentile(gaps_ms, 99)), "ms"),
        "tokens per request p50": (float(np.median([r.tokens_per_s for r in good])), "tok/s"),
        "output": (sum(r.num_tokens for r in good) / span_s, "tok/s"),
        "goodput": (met / span_s, "req/s"),
        "within objectives": (100.0 * met / len(results), "%"),
    }


def vocabulary_of(url: str, model: str, api_key: str | None) -> list[int]:
    """Ids that stand for ordinary text, asked of the server: prompts are made of these."""
    body = json.dumps({"model": model, "prompt": SAMPLE_TEXT, "add_special_tokens": False}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    with urllib.request.urlopen(urllib.request.Request(f"{url}/tokenize", body, headers)) as answer:
        return sorted(set(json.load(answer)["tokens"]))


def served_model(url: str, api_key: str | None) -> str:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/models", headers=headers)) as answer:
        return json.load(answer)["data"][0]["id"]


async def measure(url: str, args: argparse.Namespace, report: Report) -> None:
    """Warms up, then every rate, then the closed loop; rows go into the report."""
    model = served_model(url, args.api_key)
    vocabulary = vocabulary_of(url, model, args.api_key)
    client = StreamClient(url=url, model=model, output_tokens=args.output_tokens, api_key=args.api_key)

    def workload(num_requests: int, seed: int) -> Workload:
        return Workload(
            num_requests=num_requests,
            median_prompt=args.median_prompt,
            max_prompt=args.max_prompt,
            output_tokens=args.output_tokens,
            seed=args.seed + seed,
        )

    await closed_loop(client, workload(8, 1000).prompts(vocabulary), 4)
    for index, rate in enumerate(args.rates):
        work = workload(max(int(rate * args.duration), 8), index)
        results = await open_loop(client, work.prompts(vocabulary), work.arrivals_s(rate))
        add_rows(report, f"{rate:g} req/s", results)
    if args.streams:
        work = workload(args.streams * args.rounds, 500)
        results = await closed_loop(client, work.prompts(vocabulary), args.streams)
        add_rows(report, f"{args.streams} streams", results)
    if args.streams and args.offline_rounds and not args.url:
        works = [workload(args.streams, 600 + number) for number in range(args.offline_rounds)]
        rounds = [
            RequestSet(name="batch", prompts=work.prompts(vocabulary), output_tokens=work.output_tokens)
            for work in works
        ]
        command = offline_command(args.model, args.server_flags.split())
        await against_offline(client, command, rounds, report)


def add_rows(report: Report, load: str, results: list[StreamResult]) -> None:
    for name, (value, unit) in summarise(results).items():
        report.add(f"{load}: {name}", value, unit, TARGETS.get(name))
    failures = sorted({result.error for result in results if result.error})
    for failure in failures[:3]:
        print(f"{load}: failed: {failure}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast is a running server for its users?")
    parser.add_argument("--model", default="demo", help="what to serve: demo, a folder, org/name")
    parser.add_argument("--url", help="measure this server instead of starting one")
    parser.add_argument("--api-key")
    parser.add_argument("--server-flags", default="", help="flags for the server, in one string")
    parser.add_argument("--rates", default="1,2,4,8", help="requests a second, one run each")
    parser.add_argument("--duration", type=float, default=30.0, help="seconds of arrivals for each rate")
    parser.add_argument("--streams", type=int, default=64, help="clients of the closed loop; 0: none")
    parser.add_argument("--rounds", type=int, default=4, help="requests a client in the closed loop")
    parser.add_argument("--offline-rounds", type=int, default=3, help="rounds of server against LLM; 0: none")
    parser.add_argument("--median-prompt", type=int, default=128)
    parser.add_argument("--max-prompt", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a minute at most: two rates, few requests")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    args.rates = [float(rate) for rate in args.rates.split(",") if rate]
    if args.quick:
        args.rates, args.duration, args.rounds = args.rates[:2], min(args.duration, 8.0), 1
        args.streams, args.offline_rounds = min(args.streams, 16), min(args.offline_rounds, 1)
    return args


def main() -> None:
    args = parse_args()
    report = Report("serve")
    server = nullcontext((args.url, None)) if args.url else running_server(args.model, args.server_flags.split())
    with server as (url, ready_s):
        if ready_s is not None:
            report.add("start to ready", ready_s, "s", None)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(measure(url, args, report))
    report.finish(args.json)


if __name__ == "__main__":
    main()
