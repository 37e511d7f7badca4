"""How many times as fast as transformers' continuous batching is `LLM.generate`, on the same device in the same run?

Both answer the same prompts greedily, to the same length, on the same folder of random bfloat16 weights, each in a
process of its own, one after the other; a round is one of each, and the ratio is taken round by round. Loading,
compiling and capturing graphs are not counted, of anybody: each answers a set of the same lengths before.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.accelerator_jobs import Sink
from benchmarks.offline_run import our_command, run_elsewhere
from benchmarks.peers import modules_of
from benchmarks.report import ROOT
from benchmarks.workload import RequestSet, Workload

SHAPES = {"1B": "llama-3.2-1b", "8B": "llama-3.1-8b"}
NEEDED_S = {"1B": 100.0, "8B": 200.0}  # to write, load and compile, twice; guessed, not measured
FIRST_ID = 100  # below it, ids may mean something to a model


def run(sink: Sink, *, models: list[str], python: str, platform: str, small: bool, rounds: int, seed: int) -> None:
    found = modules_of(python, ("torch", "transformers", "psutil"))
    missing = sorted({"torch", "transformers", "psutil"} - found)
    if missing:
        sink.note(f"transformers: left out: {python} has no {', '.join(missing)}; give one that has: --peer-python")
        return
    if platform == "gpu" and not _has_cuda(python):
        sink.note(f"transformers: left out: the torch of {python} sees no GPU")
        return
    device = "cuda" if platform == "gpu" else "cpu"
    for model in models:
        if sink.begin(f"transformers, {model}", 20.0 if small else NEEDED_S[model]):
            compare(sink, model, python, device, small, rounds, seed)
            sink.end(f"transformers, {model}")


def _has_cuda(python: str) -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def requests_for(small: bool, seed: int) -> RequestSet:
    """256 prompts of 256 tokens at the median, 128 output tokens each; or a handful of short ones."""
    sizes = (
        {"num_requests": 4, "median_prompt": 12, "max_prompt": 20, "output_tokens": 4}
        if small
        else {"num_requests": 256, "median_prompt": 256, "max_prompt": 1024, "output_tokens": 128}
    )
    work = Workload(**sizes, seed=seed)
    prompts = work.prompts(range(FIRST_ID, 2500))
    return RequestSet(name="batch", prompts=prompts, output_tokens=work.output_tokens)


def compare(sink: Sink, model: str, python: str, device: str, small: bool, rounds: int, seed: int) -> None:
    """Rows of one model."""
    requests = requests_for(small, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        script = ROOT / "scripts" / "make_model_folder.py"
        flags = ["--dtype", "bfloat16", "--seed", str(seed), "--repeat", *(["--tiny"] if small else [])]
        begin = time.perf_counter()
        subprocess.run([sys.executable, script, folder, SHAPES[model], *flags], check=True, stdout=subprocess.DEVNULL)
        sink.note(f"{model}: random weights written in {time.perf_counter() - begin:.0f} s")
        config = {"max_model_len": 2048 if not small else 64, "compilation_cache_dir": None}
        config |= {"max_num_seqs": 4, "max_num_batched_tokens": 32} if small else {}
        commands = {
            "ours": our_command(str(folder), "bfloat16", config, rehearses=True),
            "transformers": [
                *(python, "-P", str(ROOT / "scripts" / "transformers_run.py"), "--model", str(folder)),
                *("--dtype", "bfloat16", "--mode", "continuous", "--device", device),
            ],
        }
        rates: dict[str, list[float]] = {who: [] for who in commands}
        for _ in range(rounds):
            for who, command in commands.items():
                answer = run_elsewhere(command, [requests])
                rates[who].append(requests.num_output_tokens / answer["runs"]["batch"]["seconds"])
    for who, values in rates.items():
        sink.add(f"{model}, {len(requests.prompts)} requests: output, {who}", statistics.median(values), "tok/s")
    ratio = statistics.median(own / peer for own, peer in zip(rates["ours"], rates["transformers"], strict=True))
    sink.add(f"{model}: ours ÷ transformers' continuous batching", ratio, "", ">= 2")
