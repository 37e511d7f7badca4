"""How many times as fast as transformers and llama.cpp are we, and are the answers the same?

    python -m benchmarks.peers --model FOLDER --peer-python PATH [--dtypes float32,bfloat16] [--rounds 3] [--quick]

PATH is a Python that has torch and transformers 5 (and psutil, which its continuous batching wants on a CPU), and
llama-cpp-python with gguf for llama.cpp, too; without one only we run. Each engine runs in a process of its own on all
cores, one after the other, round by round, on the same folder, token ids and output lengths
(`benchmarks.workload.request_set` says which). A ratio is ours over llama.cpp's, or over the best of transformers'
ways, of the same round; rows are medians of the rounds. Loading and compiling are not counted, of anybody.

In float32 the greedy answers of the batch are compared token by token; where one differs, the place is printed with how
close the two likeliest tokens of that request ever were: under 1e-4 of a unit, rounding decides and neither is wrong.
llama.cpp's are not compared: its cache is float16 whatever the weights are.

`scripts/make_model_folder.py` makes folders. In the shape of SmolLM2-135M, the rows also compare with what engines that
are not run here made of it on another machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.known_peers import add_known, known_peers
from benchmarks.offline_run import our_command, run_elsewhere
from benchmarks.report import ROOT, Report
from benchmarks.workload import REQUEST_SETS, SAMPLE_TEXT, RequestSet, request_set
from jaxserve.text.tokenizer import Tokenizer
from jaxserve_checkpoints.source import resolve

US = "ours"
TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"
FLOORS = {
    (TRANSFORMERS, "batch"): ">= 2",
    (TRANSFORMERS, "long"): ">= 1",
    (LLAMA_CPP, "batch"): ">= 1",
    (LLAMA_CPP, "stream"): ">= 0.6",
}
Answers = dict[str, list[dict[str, Any]]]  # engine -> one answer a round


def modules_of(python: str, names: Sequence[str]) -> set[str]:
    """Which of the modules that Python can find."""
    code = "import importlib.util, sys; print(*(n for n in sys.argv[1:] if importlib.util.find_spec(n)))"
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"--peer-python: {python!r} does not run: {done.stderr.strip()[-500:]}")
    return set(done.stdout.split())


def peer_commands(python: str | None, folder: Path, dtype: str, static_sizes: Sequence[int]) -> dict[str, list[str]]:
    """Name -> command of every peer that can run; says which cannot."""
    if python is None:
        return {}
    found = modules_of(python, ("torch", "transformers", "psutil", "llama_cpp", "gguf", "safetensors"))
    if not {"torch", "transformers"} <= found:
        raise SystemExit(f"--peer-python: {python!r} lacks torch or transformers. Install both there.")
    of = ["--model", str(folder), "--dtype", dtype]
    command = [python, "-P", str(ROOT / "scripts" / "transformers_run.py"), *of]
    static = {size: [*command, "--mode", "static", "--batch-size", str(size)] for size in static_sizes}
    peers = {f"{TRANSFORMERS} static {size}": command for size, command in static.items()}
    if "psutil" in found:
        peers[f"{TRANSFORMERS} continuous"] = [*command, "--mode", "continuous"]
    if {"llama_cpp", "gguf", "safetensors"} <= found:
        peers[LLAMA_CPP] = [python, "-P", str(ROOT / "scripts" / "llama_cpp_run.py"), *of]
    return peers


def run_rounds(commands: Mapping[str, list[str]], sets: Sequence[RequestSet], rounds: int) -> Answers:
    """Every engine in turn, `rounds` times; a peer that fails is reported and left out from then on."""
    answers: Answers = {engine: [] for engine in commands}
    failed: set[str] = set()
    for number in range(rounds):
        for engine, command in commands.items():
            if engine in failed:
                continue
            extra = ["--gaps"] if number == 0 and "float32" in command and "static" in engine else []
            try:
                answers[engine].append(run_elsewhere([*command, *extra], sets))
            except RuntimeError as error:
                if engine == US:
                    raise
                failed.add(engine)
                print(f"{engine}: left out: {error}")
    return {engine: found for engine, found in answers.items() if engine not in failed}


def add_rates(report: Report, dtype: str, requests: RequestSet, answers: Answers) -> float:
    """Rows of one set; returns our tokens a second."""
    name = f"{dtype}, {requests.name}"
    rates = {
        engine: [requests.num_rated_tokens / answer["runs"][requests.name]["seconds"] for answer in found]
        for engine, found in answers.items()
    }
    for engine, values in rates.items():
        report.add(f"{name}: {requests.rate_name}, {engine}", statistics.median(values), "tok/s")
    for family in (TRANSFORMERS, LLAMA_CPP):
        best = [max(values) for values in zip(*(rates[peer] for peer in rates if peer.startswith(family)), strict=True)]
        if best:
            ratio = statistics.median(own / peer for own, peer in zip(rates[US], best, strict=True))
            report.add(f"{name}: ours ÷ {family}'s", ratio, "", FLOORS.get((family, requests.name)))
    return statistics.median(rates[US])


def add_agreement(report: Report, answers: Answers) -> None:
    """How many greedy answers of the batch are the peers', token by token, in the first round."""
    own = answers[US][0]["runs"]["batch"]["token_ids"]
    gaps = next((f[0]["runs"]["batch"]["gaps"] for f in answers.values() if "gaps" in f[0]["runs"]["batch"]), None)
    for peer, found in answers.items():
        if not peer.startswith(TRANSFORMERS):
            continue
        theirs = found[0]["runs"]["batch"]["token_ids"]
        differing = [index for index, pair in enumerate(zip(own, theirs, strict=True)) if pair[0] != pair[1]]
        row = f"float32, batch: greedy answers equal to {peer}'s"
        report.add(row, len(own) - len(differing), f"of {len(own)}", f"{len(own)}")
        for index in differing:
            at = next(i for i, (a, b) in enumerate(zip(own[index], theirs[index], strict=True)) if a != b)
            gap = f"; smallest gap of its two likeliest tokens {gaps[index]:.1e}" if gaps else ""
            print(f"{peer}: request {index} differs from output token {at} on{gap}")
    if gaps:
        report.add("float32, batch: smallest gap of the two likeliest tokens", min(gaps), "logit units")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How many times as fast as transformers and llama.cpp are we?")
    parser.add_argument("--model", required=True, help="a folder in Hugging Face form")
    parser.add_argument("--peer-python", help="a Python that has torch and transformers; without: ours alone")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--workloads", default=",".join(REQUEST_SETS))
    parser.add_argument("--num-requests", type=int, default=64, help="of the batch")
    parser.add_argument("--static-batch", default="16", help="sizes of static batches, each measured: 16,64")
    parser.add_argument("--config", type=json.loads, default={}, help="fields of our EngineConfig, as JSON; for tests")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one round of a few short requests each")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 1
    return args


def fitting_sets(args: argparse.Namespace, folder: Path) -> list[RequestSet]:
    """The sets asked for that the model's context holds; says which it does not."""
    vocabulary = sorted(set(Tokenizer.from_folder(folder).encode(SAMPLE_TEXT, add_special_tokens=False)))
    room = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    sets = []
    for name in args.workloads.split(","):
        requests = request_set(name, vocabulary, seed=args.seed, quick=args.quick, num_requests=args.num_requests)
        if requests.longest <= room:
            sets.append(requests)
        else:
            print(f"{name}: left out: it needs {requests.longest} tokens of context, and the model has {room}")
    return sets


def main() -> None:
    args = parse_args()
    folder = resolve(args.model).folder.absolute()
    sets = fitting_sets(args, folder)
    report = Report("peers")
    for dtype in args.dtypes.split(","):
        commands = {US: our_command(str(folder), dtype, args.config)}
        commands |= peer_commands(args.peer_python, folder, dtype, [int(n) for n in args.static_batch.split(",")])
        answers = run_rounds(commands, sets, args.rounds)
        for requests in sets:
            rate = add_rates(report, dtype, requests, answers)
            known = known_peers(folder, dtype, requests, quick=args.quick)
            known = tuple(peer for peer in known if not any(engine.startswith(peer.engine) for engine in answers))
            add_known(report, f"{dtype}, {requests.name}: {requests.rate_name}", rate, known)
        if dtype == "float32" and "batch" in args.workloads.split(","):
            add_agreement(report, answers)
    if args.peer_python is None:
        print("No --peer-python: no peer was run. Give a Python that has torch and transformers for ratios.")
    elif "psutil" not in modules_of(args.peer_python, ("psutil",)):
        print("Continuous batching was left out: it wants psutil on a CPU. Install it in the peer's Python.")
    report.finish(args.json)


if __name__ == "__main__":
    main()
