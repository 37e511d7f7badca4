"""Jobs of `benchmarks.accelerator`: each runs in a process of its own, which may hang or die without the others.

    python -m benchmarks.accelerator_jobs --job JSON --output FILE      # what `run_job` starts

A kernel that never ends, or that writes where it must not, takes its process and the device's context with it. What was
found until then stays: a job writes a line of JSON as soon as it knows something.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PARTS = ("ceilings", "checks", "kernels", "steps", "peers")
AGAIN = "again"  # the fact that asks for another process for what is left
MIN_S = 5.0  # with less left, no process is started
GRACE_S = 15.0  # past its time, for the figure under way; then it is ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One process.

    Attributes:
        name: for notes.
        module: whose `run(sink, **options)` it calls.
        options: JSON.
        environment: variables that must be set before jax is imported.
    """

    name: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """What came of a job.

    Attributes:
        rows: arguments of `Report.add`.
        facts: what later jobs need to know.
        begun, done: names that the job has said it begins and has done.
        error: how it ended, if not well.
    """

    rows: list[tuple[str, float, str, str | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    error: str | None = None


class Sink:
    """Where a job writes what it finds, line by line.

    Args:
        path: appended to; None keeps `outcome` alone.
        budget_s: for the whole job, from now on.
        skipped: names that an earlier process has done, or died of.
    """

    def __init__(self, path: Path | None = None, budget_s: float = float("inf"), skipped: Iterable[str] = ()) -> None:
        self.outcome = Outcome()
        self._path, self._end_s, self._skipped = path, time.monotonic() + budget_s, frozenset(skipped)

    @property
    def left_s(self) -> float:
        return self._end_s - time.monotonic()

    def add(self, name: str, value: float, unit: str, target: str | None = None) -> None:
        self._write("row", [name, float(value), unit, target])

    def note(self, text: str) -> None:
        self._write("note", text)

    def fact(self, name: str, value: Any) -> None:
        self._write("fact", [name, value])

    def begin(self, name: str, needed_s: float = 0.0) -> bool:
        """Whether to go on with `name`: not where it is skipped, or less than `needed_s` is left, which a note says.

        What is under way is written down, so that it is known what a process died of.
        """
        if name in self._skipped:
            return False
        if self.left_s < needed_s:
            self.note(f"{name}: left out, for want of time (--budget)")
            return False
        self._write("begin", name)
        return True

    def end(self, name: str) -> None:
        self._write("end", name)

    def _write(self, kind: str, value: Any) -> None:
        take(self.outcome, kind, value)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps([kind, value]) + "\n")


def take(outcome: Outcome, kind: str, value: Any) -> None:
    """One line of a job's into its outcome."""
    match kind:
        case "row":
            name, number, unit, target = value
            outcome.rows.append((name, number, unit, target))
        case "fact":
            outcome.facts[value[0]] = value[1]
        case _:
            {"note": outcome.notes, "begin": outcome.begun, "end": outcome.done}[kind].append(value)


def fact_of_heads(head_dim: int, group: int) -> str:
    """The fact that the attention kernel passed its check for a model's heads, in bfloat16 with the engine's blocks."""
    return f"attention is right: head_dim {head_dim}, {group} query heads a kv head"


def run_job(job: Job, budget_s: float) -> Outcome:
    """Runs a job to its end, in another process after each that died or asked for it, as long as there is time.

    What a process died of is noted, and left out by the next.
    """
    whole, end_s = Outcome(), time.monotonic() + budget_s
    while True:
        left_s = end_s - time.monotonic()
        found = _run_once(job, left_s, whole.begun)
        died_of = [name for name in found.begun if name not in found.done]
        whole.rows += found.rows
        whole.notes += found.notes
        whole.begun += found.begun
        whole.done += found.done
        again = found.facts.pop(AGAIN, False)
        whole.facts |= found.facts
        whole.notes += [f"{name}: FAILS: its process {found.error}" for name in died_of]
        if found.error and not died_of:
            whole.error = found.error
        if not (died_of or again) or end_s - time.monotonic() < MIN_S:
            return whole


def _run_once(job: Job, budget_s: float, skipped: list[str]) -> Outcome:
    """One process, ended when its time is over."""
    with tempfile.TemporaryDirectory() as name:
        output, errors = Path(name) / "output", Path(name) / "errors"
        output.touch()
        command = [sys.executable, "-m", "benchmarks.accelerator_jobs", "--job", json.dumps(asdict(job))]
        command += ["--output", str(output), "--budget", str(budget_s), "--skip", json.dumps(skipped)]
        with errors.open("wb") as stream:
            # A session of its own: what it starts ends with it.
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, env=os.environ | job.environment, start_new_session=True
            )
            error = _wait(process, budget_s + GRACE_S)
        outcome = _read(output)
        if error is not None:
            said = errors.read_text(errors="replace").strip()[-1500:]
            outcome.error = f"{error}: {said}" if said else error
        return outcome


def _wait(process: subprocess.Popen, seconds: float) -> str | None:
    try:
        code = process.wait(seconds)
        return None if code == 0 else f"ended with {code}"
    except subprocess.TimeoutExpired:
        return f"was ended after {seconds:.0f} s"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        else:
            process.wait()


def _read(path: Path) -> Outcome:
    outcome = Outcome()
    for line in path.read_text().splitlines():
        try:
            kind, value = json.loads(line)
        except ValueError:  # it was ended while it wrote
            break
        take(outcome, kind, value)
    return outcome


def without_command_buffers(environment: Mapping[str, str]) -> dict[str, str]:
    """What switches XLA's command buffers (CUDA graphs) off; read when jax starts."""
    flags = environment.get("XLA_FLAGS", "")
    return {"XLA_FLAGS": f"{flags} --xla_gpu_enable_command_buffer=".strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description="One job of benchmarks.accelerator.")
    parser.add_argument("--job", type=json.loads, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", type=float, required=True, help="seconds")
    parser.add_argument("--skip", type=json.loads, default=[], help="names to leave out")
    args = parser.parse_args()
    job = Job(**args.job)
    importlib.import_module(job.module).run(Sink(args.output, args.budget, args.skip), **job.options)


if __name__ == "__main__":
    main()
