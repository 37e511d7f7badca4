"""How much of recorded traffic does the prefix cache spare, and how well is KV memory filled?

    python -m benchmarks.replay [--trace NAME] [--quick] [--json FILE]

The real scheduler on a virtual clock: requests come when the trace says, a step takes 10 ms and 20 us a token (a
model of 7 B parameters on one large accelerator, about; 32 times that where the trace's lengths are divided by 32,
so that as many requests run at once), tokens are made up. One step ahead, as in the engine. Host memory for swapping
is as large as the pool.

Prefix hits are prompt tokens that were not computed, of all prompt tokens. They are compared with two ideals, which
see the same requests in the same order:

* no bound: every block that any earlier request had is here;
* LRU: a cache of as many blocks as the pool has, used least recently first out (`ideal_cache`). A request's prompt
  blocks are used when it is admitted; those and the full blocks of its output when it ends. Running requests take no
  room from it, though the scheduler's pool must hold all their blocks, the partial ones too, which cannot be evicted;
* LRU of prompts: the same, but outputs are not cached, and blocks are used on admission only. It differs by what the
  trace cannot reward, outputs that are kept for a next turn; and by whether a block that was held until a moment ago is
  newer than one that was looked up before.

Waste is the share of the token slots in the blocks that running requests hold that have no token, the mean over the
steps of the trace's second half.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.ideal_cache import IdealCache
from benchmarks.report import Report
from benchmarks.traces import TracedRequest, data_folder, read_trace
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.policy import SchedulerLimits
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequences import Request

STEP_S, TOKEN_S = 10e-3, 20e-6
MADE_UP = -2  # no prompt has it, so nothing that is generated is ever hit: the ids tell only of prompts


@dataclass(frozen=True, slots=True)
class TraceKind:
    """A trace and how it is replayed.

    Attributes:
        file: under `traces/mooncake`.
        piece_len: tokens that an id stands for.
        block_size: tokens a block, at most piece_len.
        slowdown: of the model, where lengths have been divided by it.
        pool_sizes: blocks.
    """

    file: str
    piece_len: int
    block_size: int
    slowdown: int
    pool_sizes: tuple[int, ...]


KINDS = {
    "conversation": TraceKind(
        "conversation_first15min_scaled32_block16.jsonl", 16, 16, 32, (1024, 2048, 4096, 8192, 16384, 32768)
    ),
    "short": TraceKind("conversation_first10min_le4096.jsonl", 512, 16, 1, (1024, 4096, 16384, 65536, 131072)),
    "synthetic": TraceKind("synthetic_trace.first5min.jsonl", 512, 512, 1, (1024, 2048, 4096, 8192, 16384)),
}


def block_names(request: TracedRequest, kind: TraceKind) -> list[Hashable]:
    """Names of the prompt's full blocks: its piece, and which block of it."""
    each = kind.piece_len // kind.block_size
    names: list[Hashable] = [(piece, block) for piece in request.piece_ids for block in range(each)]
    return names[: request.num_prompt // kind.block_size]


def hit_tokens(num_hits: int, request: TracedRequest, block_size: int) -> int:
    """Prompt tokens that need not be computed; the last one always is, for its logits."""
    return min(num_hits * block_size, request.num_prompt - 1)


@dataclass(slots=True)
class Replay:
    """One trace on one pool.

    Attributes:
        lru, prompt_lru: the ideal caches.
        lru_hits, prompt_lru_hits: tokens that they would have spared.
        num_fed: tokens in all steps.
        occupied: by step: tokens held, and token slots of the blocks that are held.
    """

    kind: TraceKind
    trace: list[TracedRequest]
    num_blocks: int
    scheduler: Scheduler = field(init=False)
    lru: IdealCache = field(init=False)
    prompt_lru: IdealCache = field(init=False)
    lru_hits: int = 0
    prompt_lru_hits: int = 0
    num_fed: int = 0
    clock_s: float = 0.0
    most_running: int = 0
    occupied: list[tuple[int, int]] = field(default_factory=list)
    max_preemptions: int = 0

    def __post_init__(self) -> None:
        kind = self.kind
        self.scheduler = Scheduler(
            SchedulerLimits(
                num_blocks=1 + self.num_blocks,
                block_size=kind.block_size,
                max_num_seqs=256,
                max_model_len=max(request.num_prompt + request.num_output for request in self.trace),
                max_num_batched_tokens=max(8192 // kind.slowdown, 256),
                max_num_queued_reqs=len(self.trace),
                num_swap_blocks=self.num_blocks,
            )
        )
        self.lru, self.prompt_lru = IdealCache(self.num_blocks), IdealCache(self.num_blocks)

    def run(self) -> None:
        """Serves the whole trace."""
        arrivals = deque(enumerate(self.trace))
        undigested: deque[StepPlan] = deque()
        while arrivals or self.scheduler.has_work:
            while arrivals and arrivals[0][1].arrival_s <= self.clock_s:
                self._add(*arrivals.popleft())
            decision = self.scheduler.plan()
            if not decision.is_empty:
                plan = self.scheduler.commit(decision)
                self._note(plan)
                undigested.append(plan)
            elif not undigested:
                assert not self.scheduler.has_work, "requests wait and nothing is done"
                self.clock_s = arrivals[0][1].arrival_s
            if undigested and (decision.is_empty or len(undigested) > 1):
                self._digest(undigested.popleft())
        self.scheduler.check_integrity()

    def _add(self, index: int, traced: TracedRequest) -> None:
        total = traced.num_prompt + traced.num_output
        self.scheduler.add(Request(str(index), traced.prompt(self.kind.piece_len), total, payload=traced))

    def _note(self, plan: StepPlan) -> None:
        """Moves the clock, and lets the ideal cache see who was admitted."""
        sequences, memory = self.scheduler.sequences, self.scheduler.memory
        self.clock_s += self.kind.slowdown * (STEP_S + TOKEN_S * plan.num_tokens)
        self.num_fed += plan.num_tokens
        self.most_running = max(self.most_running, sequences.num_active)
        for admitted in plan.admitted:
            sequence = sequences.sequences[admitted.row]
            self.max_preemptions = max(self.max_preemptions, sequence.num_preemptions)
            if sequence.num_preemptions == 0:
                traced: TracedRequest = sequence.request.payload
                names = block_names(traced, self.kind)
                self.lru_hits += hit_tokens(self.lru.num_hits(names), traced, self.kind.block_size)
                self.lru.use(names)
                self.prompt_lru_hits += hit_tokens(self.prompt_lru.num_hits(names), traced, self.kind.block_size)
                self.prompt_lru.use(names)
        size = self.kind.block_size
        num_held = int(np.count_nonzero(memory.pool.ref_count)) - 1
        num_empty = int((memory.table.num_blocks * size - sequences.num_computed).sum())
        self.occupied.append((num_held * size - num_empty, num_held * size))

    def _digest(self, plan: StepPlan) -> None:
        events = self.scheduler.digest(plan, np.full(len(plan.sampled_rows), MADE_UP, np.int32))
        for ended in events.finished:
            request = ended.sequence.request
            traced: TracedRequest = request.payload
            names = block_names(traced, self.kind)
            # The last token's KV is never computed: nobody has asked for what follows it.
            num_full = (traced.num_prompt + traced.num_output - 1) // self.kind.block_size
            names += [(request.request_id, index) for index in range(len(names), num_full)]
            self.lru.use(names)

    @property
    def waste(self) -> float:
        """Of the slots of held blocks, the share without a token; mean over the second half of the steps."""
        tail = [(held, slots) for held, slots in self.occupied[len(self.occupied) // 2 :] if slots]
        return 1 - sum(held / slots for held, slots in tail) / len(tail)


def unbounded_hits(trace: list[TracedRequest], kind: TraceKind) -> int:
    """Tokens that a cache without bound spares."""
    cache, hits = IdealCache(), 0
    for request in trace:
        names = block_names(request, kind)
        hits += hit_tokens(cache.num_hits(names), request, kind.block_size)
        cache.use(names)
    return hits


def replay(report: Report, name: str, quick: bool) -> None:
    """Rows of one trace: its ideal, and for each pool size what the scheduler made of it."""
    kind = KINDS[name]
    trace = read_trace(data_folder() / "traces" / "mooncake" / kind.file)
    if quick:
        trace = trace[: len(trace) // 4]
    num_prompt = sum(request.num_prompt for request in trace)
    num_needed = num_prompt + sum(request.num_output - 1 for request in trace)
    unbounded = unbounded_hits(trace, kind)
    typical = None if name == "synthetic" else "> 30"
    report.add(f"{name}: hits without bound", 100 * unbounded / num_prompt, "%", typical)
    everything = sum((request.num_prompt + request.num_output) // kind.block_size + 1 for request in trace)
    for num_blocks in (*(size for size in kind.pool_sizes if size < everything), everything):
        run = Replay(kind, trace, num_blocks)
        run.run()
        counters = run.scheduler.counters
        is_all = num_blocks == everything
        label = f"{name}, {'all' if is_all else f'{num_blocks:,}'} blocks"
        hits = counters.prefix_hits
        report.add(f"{label}: hits", 100 * hits / num_prompt, "%")
        report.add(f"{label}: hits, of the ideal LRU's", hits / run.lru_hits, "", ">= 0.99")
        report.add(f"{label}: hits, of the ideal LRU's of prompts", hits / run.prompt_lru_hits, "")
        if is_all:
            report.add(f"{label}: hits, of those without bound", hits / unbounded, "", ">= 1")
        again = (run.num_fed - (num_needed - hits)) / num_needed
        report.add(f"{label}: tokens computed twice", 100 * again, "%", "<= 1")
        report.add(f"{label}: preemptions by swap", counters.swap_preemptions, "")
        report.add(f"{label}: preemptions by recompute", counters.recompute_preemptions, "")
        report.add(f"{label}: preemptions of a request, most", run.max_preemptions, "", "<= 5")
        report.add(f"{label}: waste in held blocks", 100 * run.waste, "%", "< 5" if kind.block_size == 16 else None)
        report.add(f"{label}: running, most", run.most_running, "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Recorded traffic on the real scheduler and a virtual clock.")
    parser.add_argument("--trace", choices=list(KINDS), help="one of them; all if not given")
    parser.add_argument("--quick", action="store_true", help="the first quarter of each trace")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    folder: Path = data_folder() / "traces" / "mooncake"
    if not folder.is_dir():
        sys.exit(f"Skipped: there are no traces in {folder}. Name the data folder in JAXSERVE_DATA.")
    report = Report("replay")
    for name in [args.trace] if args.trace else KINDS:
        replay(report, name, args.quick)
    report.finish(args.json)


if __name__ == "__main__":
    main()
