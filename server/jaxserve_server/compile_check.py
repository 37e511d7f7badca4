"""`python -m jaxserve.compile_check MODEL --topology v6e:2x4`: would it fit and compile on TPUs that are not there?

Takes the flags of `jaxserve.serve`, so that what is answered for is what would be served.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.errors import JaxserveError
from jaxserve_server.flags import Options, parse_options

if TYPE_CHECKING:
    from jaxserve.config import ModelConfig
    from jaxserve.engine.compile_check import CompileCheck, ProgramCheck

PROG = "python -m jaxserve.compile_check"
ABOUT = (
    "Compile a model's step programs for a TPU topology, without a TPU: does it fit, with how many KV tokens? MODEL "
    "may also be a config.json: no weights are needed. Takes the flags of jaxserve.serve, and of its own: --topology "
    "NAME (such as v5e:2x2, v6e:2x4, tpu7x:2x2x1; required), --programs NAME ... (such as step[64]; default: the steps "
    "of all rows decoding and of the largest budget), --json FILE."
)
GIB = 2**30


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, and prints what came out. Returns the exit code: 0 if it fits, 1 if not or if it cannot be served so.

    Exits with 2 upon a usage error.
    """
    # What jax itself computes here is little, and TPUs that there may be are not to be taken from anybody.
    os.environ["JAX_PLATFORMS"] = "cpu"
    own, rest = own_options(sys.argv[1:] if argv is None else argv)
    try:
        options = parse_options(rest, prog=PROG, about=ABOUT)
        check = run(options, own.topology, tuple(own.programs or ()))
    except JaxserveError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    print(report(check, own.topology))
    if own.json:
        Path(own.json).write_text(json.dumps(as_json(check, own.topology), indent=1) + "\n")
    return 0 if check.fits else 1


def own_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags that only this command has, and the rest of the line."""
    parser = argparse.ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False)
    parser.add_argument("--topology", required=not {"-h", "--help", "--version"} & set(argv))
    parser.add_argument("--programs", nargs="+", metavar="NAME")
    parser.add_argument("--json")
    return parser.parse_known_args(argv)


def run(options: Options, topology: str, names: tuple[str, ...]) -> CompileCheck:
    """Reads the model's configuration and compiles.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it cannot be served as asked, or there is no such topology.
    """
    from jaxserve.engine.compile_check import check_engine

    model = read_model(options)
    print(f"{model.architecture}, {model.num_layers} layers, {model.dtype}, for {topology}", file=sys.stderr)
    return check_engine(model, options.engine, topology, names=names, on_program=show)


def read_model(options: Options) -> ModelConfig:
    from jaxserve_checkpoints.describe import describe_model

    return describe_model(options.model, dtype=options.dtype, revision=options.revision)


def show(program: ProgramCheck) -> None:
    outcome = "does not compile" if program.error else "compiled"
    print(f"{program.name} {outcome} in {program.compile_s:.0f} s", file=sys.stderr, flush=True)


def report(check: CompileCheck, topology: str) -> str:
    """Programs as a table, then what it comes to."""
    limits = check.limits
    titles = f"{'program':<12}{'GiB a device':>14}{'arguments':>12}{'temporary':>12}{'code':>8}{'cache copies':>14}"
    lines = [f"{titles}  collectives"]
    for program in check.programs:
        if program.error:
            lines.append(f"{program.name:<12}  {program.error}")
            continue
        sizes = (program.peak_bytes, program.argument_bytes, program.temp_bytes, program.code_bytes)
        peak, arguments, temporary, code = (f"{size / GIB:.2f}" for size in sizes)
        found = ", ".join(f"{count} {name}" for name, count in program.collectives) or "none"
        copies = program.cache_copies
        lines.append(f"{program.name:<12}{peak:>14}{arguments:>12}{temporary:>12}{code:>8}{copies:>14}  {found}")
    lines += [
        "",
        f"devices        {check.num_devices} of the {check.num_in_topology} of {topology} ({check.device_kind}), "
        f"{check.hbm_bytes / GIB:.2f} GiB usable on each",
        f"attention      {limits.attention}",
        *(["layers         stacked, in one loop"] if limits.stacked_layers else []),
        f"weights        {check.weight_bytes / GIB:.2f} GiB a device",
        f"KV cache       {check.kv_bytes / GIB:.2f} GiB a device: {limits.num_kv_tokens:,} tokens",
        f"concurrency    {limits.max_concurrency:.1f} requests of {limits.max_model_len:,} tokens at once, "
        f"{limits.max_num_seqs} rows",
        f"fits           {verdict(check)}",
    ]
    return "\n".join(lines)


def verdict(check: CompileCheck) -> str:
    if check.fits:
        return f"yes, {check.spare_bytes / GIB:.2f} GiB to spare on each device"
    return (
        "no, for the reason above: of memory, lower --gpu-memory-utilization or --max-num-batched-tokens, or raise "
        "--tensor-parallel-size"
    )


def as_json(check: CompileCheck, topology: str) -> dict[str, Any]:
    document = {"topology": topology, "fits": check.fits, **asdict(check)}
    for fields, program in zip(document["programs"], check.programs, strict=True):
        fields["peak_bytes"] = program.peak_bytes
    return document
