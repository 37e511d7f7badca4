"""What does the host do in a decode step, beside the device?

    python -m benchmarks.host_overhead [--model demo] [--rows 64,256] [--quick] [--json FILE]

`EngineCore` decodes `rows` greedy requests, and every function that is a phase of its step is timed, less the phases
inside it; *rest* is what no phase covers. In steps of one token each, and in loops of 16; and twice:

* *host alone*: the compiled steps are replaced by ones that answer at once with tokens of zero, so that the device
  takes none of the cores and leaves the host's caches warm.
* *with the device*: the steps are real and the host waits for each to end, so that the two do not overlap. The host's
  caches are cold after every step, and dispatching is in it, with what XLA computes in the thread that dispatches.

Figures are microseconds of the loop's thread's processor time, so that neither waiting nor other programs count, for a
token step: over the tokens that a row was given meanwhile, so that a device loop of several decode steps counts as that
many. The device's row is wall time. Medians of windows of steps.

Then the server's share of a token, without sockets: one delta to text, and that to the bytes of a server-sent event.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import jax
import numpy as np

from benchmarks.core_run import make_core
from benchmarks.report import Report
from jaxserve.engine import engine as engine_module
from jaxserve.engine.engine import EngineCore
from jaxserve.engine.pack import StepPacker, empty_step
from jaxserve.text.assembler import Continuations
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import Delta, SamplingParams
from jaxserve_checkpoints.source import resolve
from jaxserve_server.choices import Choice, PromptState, Style, completion_choice
from jaxserve_server.prompts import Prompt
from jaxserve_server.responses import Completion
from jaxserve_server.sse import event

PROMPT = 16  # tokens, at most
DEVICE, WAIT, REST = "device", "wait", "rest"
HOST = ("plan", "commit", "pack", "dispatch", "fetch", "digest", "deltas", REST)
KINDS = {"single steps": 0.0, "loops": float("inf")}  # stream_interval_ms
OBJECTIVE = "< 300"


class Laps:
    """Nanoseconds of this thread's processor time by phase, each without the phases called inside it."""

    def __init__(self) -> None:
        self.spent_ns: Counter[str] = Counter()
        self.device_ns = 0  # wall time of real steps
        self._inner_ns = [0]  # of the phases inside each open one

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._inner_ns.append(0)
            start = time.thread_time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.thread_time_ns() - start
                self.spent_ns[phase] += taken - self._inner_ns.pop()
                self._inner_ns[-1] += taken

        return call

    @contextmanager
    def phases(self, core: EngineCore) -> Iterator[None]:
        """Counts the engine's phases meanwhile."""
        with ExitStack() as stack:
            for owner, name, phase in (
                (core.scheduler, "plan", "plan"),
                (core.scheduler, "commit", "commit"),
                (core.scheduler, "digest", "digest"),
                (core.scheduler, "digest_loop", "digest"),
                (StepPacker, "pack", "pack"),
                (core.runner, "run", "dispatch"),
                (core.runner, "fetch", "fetch"),
                (engine_module, "gains_of", "deltas"),
            ):
                stack.enter_context(patch.object(owner, name, self.timed(phase, getattr(owner, name))))
            yield


class Ready(np.ndarray):
    """A step's answer that is on the host already."""

    def copy_to_host_async(self) -> None:
        pass


def instant(executable: Callable[..., Any], core: EngineCore, shape: Any) -> Callable[..., Any]:
    """A step that answers at once, with zeros in the shapes of the real one's answer."""
    packed, _ = empty_step(shape)
    runner = core.runner
    runner._kv, runner._state, output = executable(runner._params, runner._kv, runner._state, packed)
    answer = jax.tree.map(lambda array: np.zeros(array.shape, array.dtype).view(Ready), output)

    def step(params: Any, kv: Any, state: Any, packed: np.ndarray) -> tuple[Any, Any, Any]:
        return kv, state, answer

    return step


def waited_for(executable: Callable[..., Any], laps: Laps) -> Callable[..., Any]:
    """The step with the host waiting for its end."""
    wait = laps.timed(WAIT, jax.block_until_ready)

    def step(*args: Any) -> Any:
        start = time.perf_counter_ns()
        answer = executable(*args)
        wait(answer[2])
        laps.device_ns += time.perf_counter_ns() - start
        return answer

    return step


@contextmanager
def replaced_steps(core: EngineCore, make: Callable[[Any, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """The runner's step programs replaced by `make(shape, executable)`."""
    runner, compiled = core.runner, core.runner.compiled
    runner.compiled = dataclasses.replace(compiled, steps=tuple((s, make(s, e)) for s, e in compiled.steps))
    try:
        yield
    finally:
        runner.compiled = compiled


def slack(num_rows: int) -> int:
    """Tokens more than are timed: the first rows decode while prompts come in with what they leave of a step."""
    return 16 + num_rows


def decode(core: EngineCore, laps: Laps, num_rows: int, num_steps: int, num_windows: int) -> list[Counter[str]]:
    """Microseconds a token step by phase, of each window of steps in which all rows decode."""
    num_tokens = num_steps * num_windows + slack(num_rows)
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    rng = np.random.default_rng(num_rows)
    ids = [f"host-{row}" for row in range(num_rows)]
    for request_id in ids:
        length = rng.integers(2, PROMPT + 1)  # so that rows open their blocks in different steps
        prompt = rng.integers(4, min(200, core.model.vocab_size), length).tolist()
        core.add(request_id, core.check(prompt, params), request_id)
    started: set[str] = set()
    while len(started) < num_rows:
        started.update(owner for owner, _ in core.step())
    windows = []
    with laps.phases(core):
        for _ in range(num_windows):
            laps.spent_ns.clear()
            laps.device_ns = 0
            gained, start = 0, time.thread_time_ns()
            while gained < num_steps * num_rows:
                assert core.scheduler.num_running == num_rows, "a row ended before its time"
                gained += sum(len(delta.token_ids) for _, delta in core.step())
            laps.spent_ns[REST] = time.thread_time_ns() - start - laps.spent_ns.total()
            laps.spent_ns[DEVICE] = laps.device_ns
            windows.append(Counter({p: ns / 1e3 * num_rows / gained for p, ns in laps.spent_ns.items()}))
    for request_id in ids:
        core.abort(request_id)
    while core.has_work:
        core.step()
    return windows


def add_rows(report: Report, name: str, windows: list[Counter[str]]) -> None:
    for phase in HOST:
        report.add(f"{name}: {phase}", statistics.median(each[phase] for each in windows), "us")
    totals = [sum(each[phase] for phase in HOST) for each in windows]
    report.add(f"{name}: host, a token step", statistics.median(totals), "us", OBJECTIVE if "64 rows" in name else None)
    report.add(f"{name}: host, quickest window", min(totals), "us")
    if any(each[DEVICE] for each in windows):
        report.add(f"{name}: device, a token step", statistics.median(each[DEVICE] for each in windows), "us")


def measure_core(core: EngineCore, num_rows: int, num_steps: int, num_windows: int, report: Report) -> None:
    """The tables of one number of rows."""
    laps, asked = Laps(), core.config
    for who, (kind, interval_ms) in itertools.product(("host alone", "with the device"), KINDS.items()):
        core.config = dataclasses.replace(asked, stream_interval_ms=interval_ms)

        def step(shape: Any, executable: Callable[..., Any], is_real: bool = who != "host alone") -> Callable[..., Any]:
            return waited_for(executable, laps) if is_real else instant(executable, core, shape)

        with replaced_steps(core, step):
            windows = decode(core, laps, num_rows, num_steps, num_windows)
        add_rows(report, f"{who}, {num_rows} rows, {kind}", windows)
        core.reset_prefix_cache()  # nothing was computed of what the host alone remembers
    core.config = asked


def measure_server(tokenizer: Tokenizer, num_tokens: int, report: Report) -> None:
    """What one streamed token costs between the engine and the socket."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens + 1)
    texts = Continuations(tokenizer, params, (4,))
    choice = Choice(0, PromptState(Prompt((4,))), Style())
    laps_ns, size = np.zeros((num_tokens, 2), np.int64), 0
    for index in range(num_tokens):
        delta = Delta((4 + index % 200,))
        t0 = time.perf_counter_ns()
        parts = texts.push(delta)
        t1 = time.perf_counter_ns()
        for part in parts:
            choice.add(part.gain)
            if choice.due:
                answer = [completion_choice(choice, tokenizer)]
                size += len(
                    event(Completion(id="cmpl-0", created=0, model="demo", choices=answer, system_fingerprint="demo"))
                )
                choice.clear()
        laps_ns[index] = t1 - t0, time.perf_counter_ns() - t1
    text_us, event_us = np.median(laps_ns, axis=0) / 1e3
    assert size, "no token had text"
    report.add("server, one token: delta to text", text_us, "us")
    report.add("server, one token: text to event", event_us, "us")
    report.add("server, 64 tokens: both", 64 * (text_us + event_us), "us")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What does the host do in a decode step, beside the device?")
    parser.add_argument("--model", default="demo", help="demo, a folder, org/name")
    parser.add_argument("--rows", default="64,256", help="running requests, one engine each")
    parser.add_argument("--steps", type=int, default=32, help="of a window")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="one engine, few steps")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    args.rows = [int(rows) for rows in args.rows.split(",")]
    if args.quick:
        args.rows, args.windows = args.rows[:1], 4
    return args


def main() -> None:
    args = parse_args()
    report = Report("host_overhead")
    for num_rows in args.rows:
        context = -(-(PROMPT + args.steps * args.windows + slack(num_rows) + 1) // 64) * 64
        core = make_core(args.model, "auto", max_num_seqs=num_rows, max_model_len=context)
        measure_core(core, num_rows, args.steps, args.windows, report)
        del core
    measure_server(Tokenizer.from_folder(resolve(args.model).folder), 20 * args.steps * args.windows, report)
    report.finish(args.json)


if __name__ == "__main__":
    main()
