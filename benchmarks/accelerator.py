"""How near does this accelerator come to its own ceilings, under our kernels and under whole steps?

    python -m benchmarks.accelerator [--parts ceilings,checks,kernels,steps,peers] [--tune] [--budget 570] [--quick]
        [--json FILE]

One run, under ten minutes on one GPU or TPU:

1. ceilings  copy and read bandwidth and the matrix peak of this very device: every share below is of these
2. checks    every Pallas kernel against its reference, on fresh random batches with poison in what must not be read;
             one that fails, hangs or kills its process is reported, not timed, and the rest goes on
3. kernels   decode and prefill attention, Pallas and XLA, as shares (`--tune`: its tile sizes instead)
4. steps     whole decode steps, loops of them, and prefill, through the engine's own programs, for the shapes of
             Llama-3.1-8B, Llama-3.2-1B and Qwen3-0.6B, with and without command buffers
5. peers     LLM.generate over transformers' continuous batching, where torch and transformers are (--peer-python)

Every job runs in a process of its own (`accelerator_jobs`). Each part has a share of the time; what it leaves is for
the parts after it. What does not fit is named. On a CPU sizes are tiny and kernels interpreted, the TPU's by default
(Mosaic GPU's interpreter takes half a minute a call before jax 0.11): figures mean nothing then, but all of it runs.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from benchmarks.accelerator_jobs import PARTS, Job, Outcome, fact_of_heads, run_job, without_command_buffers
from benchmarks.accelerator_plan import SMALL_PLAN, Plan, settings_of_the_engine
from benchmarks.report import Report

# Of the time that is left when a part begins.
SHARES = {"ceilings": 0.1, "checks": 0.3, "kernels": 0.3, "steps": 0.6, "peers": 1.0}
MODELS = {"8B": (128, 4), "1B": (64, 4), "0.6B": (128, 2)}  # head_dim and query heads a kv head
BACKEND = "attention_backend"


class Run:
    """A whole run: what is known of the device so far, and the report."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.report = args, Report("accelerator")
        self.facts: dict[str, Any] = {}
        self._end_s = time.monotonic() + args.budget

    @property
    def left_s(self) -> float:
        return self._end_s - time.monotonic()

    @property
    def small(self) -> bool:
        return self.args.quick or self.facts["platform"] == "cpu"

    @property
    def ceilings(self) -> dict[str, float]:
        return {name: self.facts[name] for name in ("copy_bytes_s", "flops_s")}

    @property
    def passed(self) -> list[str]:
        return [name.removeprefix("passes ") for name in self.facts if name.startswith("passes ")]

    @property
    def where(self) -> dict[str, Any]:
        return {"platform": self.facts["platform"], "backend": self.args.backend, "small": self.small}

    def run(self, part: str, job: Job, budget_s: float) -> Outcome:
        print(f"{part}: {job.name} ...", file=sys.stderr, flush=True)
        outcome = run_job(job, budget_s)
        self.facts |= outcome.facts
        for row in outcome.rows:
            self.report.add(*row)
        for note in outcome.notes:
            self.report.note(note)
        if outcome.error:
            self.report.note(f"{job.name}: {outcome.error}")
        return outcome

    def run_parts(self) -> None:
        """The ceilings always: they say what the device is, too."""
        parts = [part for part in PARTS if part in self.args.parts or part == "ceilings"]
        for part in parts:
            share = SHARES[part] if part != parts[-1] else 1.0
            end_s = time.monotonic() + share * self.left_s
            for job in getattr(self, f"_{part}")():
                left_s = end_s - time.monotonic()
                if left_s < 5:
                    self.report.note(f"{job.name}: left out, for want of time (--budget)")
                else:
                    self.run(part, job, left_s)
            if part == "ceilings" and "flops_s" not in self.facts:
                raise SystemExit("The ceilings could not be measured:\n" + "\n".join(self.report.notes))

    def _job(self, part: str, name: str, environment: dict[str, str] | None = None, **options: Any) -> Job:
        options["seed"] = self.args.seed
        return Job(name=name, module=f"benchmarks.accelerator_{part}", options=options, environment=environment or {})

    def _ceilings(self) -> Iterator[Job]:
        yield self._job("ceilings", "ceilings", quick=self.args.quick)

    def _checks(self) -> Iterator[Job]:
        yield self._job("checks", "checks", **self.where)

    def _kernels(self) -> Iterator[Job]:
        if self.args.tune:
            yield self._job("tune", "tile sizes", **self.where, ceilings=self.ceilings)
            return
        options = {"whole": self.args.whole, "passed": self.passed, "ceilings": self.ceilings}
        yield self._job("kernels", "kernels", **self.where, **options)

    def _steps(self) -> Iterator[Job]:
        """The engine's own choice of every model first; then without command buffers; then its other settings."""
        models = ("tiny",) if self.small else tuple(MODELS)
        whole, short = (SMALL_PLAN, None) if self.small else (Plan(), Plan(batches=(1, 64), prompt=0))
        for model in models:
            settings = {} if self._may_use_kernels(model) else {BACKEND: "xla"}
            yield self._step_job(model, "as it is", settings, whole, has_targets=True)
        if short is None:
            return
        if self.facts["platform"] == "gpu":
            for model in reversed(models):  # the smallest first: there launches weigh most
                settings = {} if self._may_use_kernels(model) else {BACKEND: "xla"}
                environment = without_command_buffers(os.environ)
                yield self._step_job(model, "without command buffers", settings, short, environment=environment)
        for setting, values in settings_of_the_engine().items():
            for value in values:
                for model in models:
                    if value == "pallas" and not self._may_use_kernels(model):
                        self.report.note(
                            f"steps of {model}, {setting}={value}: not timed, because a check was not passed"
                        )
                        continue
                    settings = {} if self._may_use_kernels(model) else {BACKEND: "xla"}
                    yield self._step_job(model, f"{setting}={value}", settings | {setting: value}, short)

    def _may_use_kernels(self, model: str) -> bool:
        """Whether the attention kernel was right for this model's heads, or nobody asked, or no engine would use it."""
        is_asked = "checks" in self.args.parts and not self.small and BACKEND in settings_of_the_engine()
        return not is_asked or fact_of_heads(*MODELS[model]) in self.facts

    def _step_job(
        self,
        model: str,
        said: str,
        settings: dict[str, Any],
        plan: Any,
        *,
        has_targets: bool = False,
        environment: dict[str, str] | None = None,
    ) -> Job:
        options = {"model": model, "said": said, "settings": settings, "plan": asdict(plan)}
        options |= {"ceilings": self.ceilings, "has_targets": has_targets}
        return self._job("steps", f"steps of {model}, {said}", environment, **options)

    def _peers(self) -> Iterator[Job]:
        options = {"python": self.args.peer_python, "platform": self.facts["platform"], "small": self.small}
        options["rounds"] = 1 if self.small else self.args.rounds
        for model in ("1B",) if self.small else ("1B", "8B"):
            yield self._job("peers", f"transformers, {model}", models=[model], **options)


def parts_of(text: str) -> list[str]:
    parts = text.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose of {', '.join(PARTS)}")
    return parts


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How near does this accelerator come to its own ceilings?")
    parser.add_argument("--parts", type=parts_of, default=list(PARTS), help=f"of {','.join(PARTS)}; the default is all")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds, for everything")
    parser.add_argument("--tune", action="store_true", help="part kernels: time the attention kernel's tile sizes")
    parser.add_argument("--whole", action="store_true", help="part kernels: every case of all heads on both paths")
    parser.add_argument("--backend", choices=("gpu", "tpu"), default="tpu", help="on a CPU: whose kernels to interpret")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="a Python that has torch, transformers and psutil"
    )
    parser.add_argument("--rounds", type=int, default=1, help="part peers: of both engines in turn")
    parser.add_argument("--seed", type=int, help="of all values; a fresh one by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, as on a CPU")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    if args.seed is None:
        args.seed = secrets.randbelow(2**31)
    return args


def main() -> None:
    args = parse_args()
    run = Run(args)
    run.run_parts()
    about = {"devices": f"{run.facts['num_devices']} x {run.facts['kind']}", "client": run.facts["client"]}
    about |= {"memory for us": f"{run.facts['memory_bytes'] / 2**30:.1f} GiB", "seed": args.seed}
    run.report.about |= {**about, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    run.report.finish(args.json)


if __name__ == "__main__":
    main()
