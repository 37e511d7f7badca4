"""Sets of requests run through `LLM`, here or in a process of their own.

    python -m benchmarks.offline_run --model M --dtype D --requests FILE --json FILE [--config JSON]

`scripts/transformers_run.py` takes the same files, so that whoever compares engines starts either. The file of requests
is a list of {"name", "prompts", "output_tokens", "num_shared"}; the answer is {"load_s", "runs": {name: {"seconds",
"token_ids", "num_cached"}}}.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.workload import RequestSet
from jaxserve import LLM, SamplingParams


@dataclass(frozen=True, slots=True)
class Run:
    """One set's answer.

    Attributes:
        seconds: from the first request to the last token.
        token_ids: output of each request.
        num_cached: prompt tokens of all requests that the prefix cache had.
    """

    seconds: float
    token_ids: list[list[int]]
    num_cached: int


def run_set(llm: LLM, requests: RequestSet, output_tokens: int | None = None) -> Run:
    """Answers a set with an empty prefix cache.

    Args:
        output_tokens: fewer, or None for the set's own.
    """
    wanted = output_tokens or requests.output_tokens
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0.0, max_tokens=wanted, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate(requests.prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    token_ids = [list(output.outputs[0].token_ids) for output in outputs]
    assert [len(ids) for ids in token_ids] == [wanted] * len(requests.prompts), "an answer is too short"
    return Run(seconds, token_ids, sum(output.num_cached_tokens for output in outputs))


def run_elsewhere(command: Sequence[str], requests: Sequence[RequestSet]) -> dict[str, Any]:
    """The answer of a process that takes `--requests` and `--json`; nothing else of ours runs meanwhile.

    Raises:
        RuntimeError: it failed; the message holds the end of what it said.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "requests.json").write_text(json.dumps([asdict(each) for each in requests]))
        files = ["--requests", str(folder / "requests.json"), "--json", str(folder / "answer.json")]
        done = subprocess.run([*command, *files], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return json.loads((folder / "answer.json").read_text())


def our_command(model: str, dtype: str, config: dict[str, Any] | None = None, *, rehearses: bool = False) -> list[str]:
    """What `run_elsewhere` starts for us.

    Args:
        config: fields of `EngineConfig` that are not at their defaults.
        rehearses: answer the first set once before the one that is timed.
    """
    command = [sys.executable, "-m", "benchmarks.offline_run", "--model", model, "--dtype", dtype]
    return [*command, "--config", json.dumps(config or {}), *(["--rehearse"] if rehearses else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs sets of requests through LLM.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--config", type=json.loads, default={}, help="fields of EngineConfig, as JSON")
    parser.add_argument("--rehearse", action="store_true", help="answer the first set once before")
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    sets = [RequestSet(**each) for each in json.loads(args.requests.read_text())]
    start = time.perf_counter()
    llm = LLM(args.model, dtype=args.dtype, **args.config)
    load_s = time.perf_counter() - start
    run_set(llm, sets[0], None if args.rehearse else 2)  # the allocator and the branch predictor get to know the work
    runs = {each.name: asdict(run_set(llm, each)) for each in sets}
    args.json.write_text(json.dumps({"load_s": load_s, "runs": runs}))


if __name__ == "__main__":
    main()
