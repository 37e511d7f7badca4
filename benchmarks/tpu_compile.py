"""Would the models that people serve fit and compile on TPUs, and what does the compiler think of their steps?

    python -m benchmarks.tpu_compile [--quick] [--stacked] [--json FILE] [--only NAME ...] [--decode-only]
        [--compare FILE]

Compiles the engine's own step programs, kernels included, for named topologies with libtpu. No TPU is needed and
nothing runs: memory, collectives and copies are the compiler's, and so are the cycles, which are its estimate of each
instruction once (a loop's body counts once) and good only to compare with an earlier run's. Programs are those of 64
rows that decode and of a mixed step of 2,048 tokens; --quick compiles two layers of each model. A mixed step of a
deep model takes minutes to compile, hence --decode-only, and --stacked, which compiles layers that are stacked and run
in a loop (their collectives and cycles count once a layer). --compare FILE holds memory and cycles to an earlier run's
JSON: the exit status is 1 if a figure has grown by more than a twentieth.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.accelerator_models import MODELS
from benchmarks.report import Report, Row
from jaxserve.config import EngineConfig, ModelConfig

os.environ.setdefault("JAX_PLATFORMS", "cpu")

COMPARED = ("memory a device", "temporary", "estimated cycles", "copies of a layer's cache", "all-reduces a layer")
MAY_GROW = 1.05

QWEN3_0_6B, LLAMA_8B = MODELS["0.6B"], MODELS["8B"]
LLAMA_70B = replace(LLAMA_8B, hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64, layer_windows=())


@dataclass(frozen=True, slots=True)
class Case:
    """A model on a number of a topology's devices."""

    name: str
    model: ModelConfig
    topology: str
    num_devices: int


CASES = (
    Case("Qwen3-0.6B, v5e", QWEN3_0_6B, "v5e:2x2", 1),
    Case("Qwen3-0.6B, v6e", QWEN3_0_6B, "v6e:2x2", 1),
    Case("Qwen3-0.6B, tpu7x", QWEN3_0_6B, "tpu7x:2x2x1", 1),
    Case("Llama-3.1-8B, v6e", LLAMA_8B, "v6e:2x2", 1),
    Case("Llama-3.1-8B, 4 of v5e", LLAMA_8B, "v5e:2x2", 4),
    Case("Llama-3.1-8B, 4 of v6e", LLAMA_8B, "v6e:2x2", 4),
    Case("Llama-3.3-70B, 8 of v6e", LLAMA_70B, "v6e:2x4", 8),
    Case("Llama-3.3-70B, 16 of v5e", LLAMA_70B, "v5e:4x4", 16),
    Case("Llama-3.3-70B, 8 of tpu7x", LLAMA_70B, "tpu7x:2x2x1", 8),
)


def run(report: Report, case: Case, num_layers: int | None, kinds: dict[str, str], *, stacked: bool) -> None:
    """Compiles a case's programs, by what they are called here, and reports what they are."""
    from jaxserve.engine.compile_check import GIB, check_engine

    model = case.model
    if num_layers is not None:
        model = replace(model, num_layers=num_layers, layer_windows=())
    config = EngineConfig(
        tensor_parallel_size=case.num_devices,
        max_model_len=8192,
        max_num_seqs=64,
        block_size=32,
        max_decode_steps=1,
        stacked_layers=stacked,
    )
    check = check_engine(model, config, case.topology, names=tuple(kinds.values()))
    name = case.name if num_layers is None else f"{case.name}, {num_layers} layers"
    name += ", stacked" * stacked
    report.add(f"{name}: KV tokens", check.limits.num_kv_tokens, "")
    for program, kind in zip(check.programs, kinds, strict=True):
        if program.error:
            report.add(f"{name}, {kind}: fits", 0, "", ">= 1")
            continue
        found = dict(program.collectives).get("all-reduce", 0)
        own = 1 if case.num_devices > 1 else 0  # the embedding's
        per_layer = (found - own) / model.num_layers
        wanted = 2 if case.num_devices > 1 else 0
        report.add(f"{name}, {kind}: fits", 1, "", ">= 1")
        report.add(
            f"{name}, {kind}: memory a device", program.peak_bytes / GIB, "GiB", f"<= {check.hbm_bytes / GIB:.2f}"
        )
        report.add(f"{name}, {kind}: temporary", program.temp_bytes / GIB, "GiB")
        report.add(f"{name}, {kind}: copies of a layer's cache", program.cache_copies, "", "<= 0")
        report.add(f"{name}, {kind}: all-reduces a layer", per_layer, "", f"<= {wanted}")
        report.add(f"{name}, {kind}: estimated cycles", program.cycles, "")
        report.add(f"{name}, {kind}: compilation", program.compile_s, "s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps compiled for TPUs that are not there.")
    parser.add_argument("--quick", action="store_true", help="two layers of each model")
    parser.add_argument("--stacked", action="store_true", help="the layers stacked, in a loop")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases whose name has one of these in it")
    parser.add_argument("--decode-only", action="store_true", help="no mixed steps")
    parser.add_argument("--compare", metavar="FILE", help="an earlier run's JSON")
    args = parser.parse_args()
    kinds = {"decode": "step[64]"} | ({} if args.decode_only else {"mixed": "step[2048]"})
    report = Report("tpu_compile")
    for case in CASES:
        if args.only and not any(word in case.name for word in args.only):
            continue
        print(f"{case.name} ...", flush=True)
        run(report, case, 2 if args.quick else None, kinds, stacked=args.stacked)
    report.finish(args.json)
    grown = [] if args.compare is None else growth(report.rows, json.loads(Path(args.compare).read_text())["rows"])
    for line in grown:
        print(line)
    sys.exit(1 if grown else 0)


def growth(rows: Sequence[Row], earlier: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each figure of both runs that has grown by more than `MAY_GROW`: what a change costs, before a chip
    is rented. Seconds are this machine's and do not count.
    """
    before = {row["name"]: row["value"] for row in earlier}
    lines = []
    for row in rows:
        old = before.get(row.name)
        if old is not None and row.name.endswith(COMPARED) and row.value > old * MAY_GROW:
            lines.append(f"{row.name}: {row.value:.4g} {row.unit}, before {old:.4g}")
    return lines


if __name__ == "__main__":
    main()
