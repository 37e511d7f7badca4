"""What does a sequence cost the others that is swapped out and in again?

    python -m benchmarks.swap [--model demo] [--dtype auto] [--quick] [--json FILE]

Eight sequences decode, and one of 952 to 1,024 tokens. That one is made to give way: its 60 to 63 blocks go to host
memory, and come back in the step after, for there is room. The prefix cache is off, or the blocks would still be found
on the device and nothing would have to come back.

The others' gap is the time between two tokens of theirs. Added: the longest gap of the round's eight, from the step of
the swap on, less the median gap of the eight before them; beside it the same where nothing was swapped.

Bytes a second are those of the engine's own programs, gather and scatter, on a cache of their own and with nothing else
running, the copy into host memory and out of it included.
"""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np

from benchmarks.core_run import make_core
from benchmarks.report import Report
from jaxserve.engine.engine import EngineCore
from jaxserve.engine.swap_store import SwapStore
from jaxserve.scheduler.decision import Decision, Victim
from jaxserve.state import init_kv_cache
from jaxserve.types import SamplingParams

NUM_OTHERS, NUM_TOKENS, GAPS = 8, 1024, 8
NUM_LEFT = 9 * GAPS  # tokens that the long sequence has yet to make, enough for a round
LONG = "long"


class Rounds:
    """An engine with eight short sequences and a long one, that is stepped and timed.

    Args:
        core: with the prefix cache off and host memory for the long sequence.
    """

    def __init__(self, core: EngineCore):
        self.core = core
        self._rng = np.random.default_rng(0)
        self._forced = False
        self._plan = core.scheduler.plan
        core.scheduler.plan = self._plan_or_force  # type: ignore[method-assign]

    def start(self) -> None:
        """Adds the sequences and steps until all decode."""
        for index in range(NUM_OTHERS):
            self._add(f"other{index}", 64)
        self._add(LONG, NUM_TOKENS - NUM_LEFT)
        while len(self.core.scheduler.sequences.decode_rows()) < NUM_OTHERS + 1:
            self.core.step()

    def stop(self) -> None:
        for name in (LONG, *(f"other{index}" for index in range(NUM_OTHERS))):
            self.core.abort(name)
        while self.core.has_work:
            self.core.step()

    def _add(self, name: str, num_prompt: int) -> None:
        prompt = self._rng.integers(10, self.core.model.vocab_size, num_prompt).tolist()
        num_output = min(NUM_TOKENS - num_prompt, 256)
        params = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        self.core.add(name, self.core.check(prompt, params), name)

    def _plan_or_force(self) -> Decision:
        """The scheduler's decision; once where it is forced, with the long sequence as the victim."""
        decision = self._plan()
        sequences = self.core.scheduler.sequences
        row = next((s.row for s in sequences.sequences if s is not None and s.request.request_id == LONG), -1)
        if not self._forced or row not in decision.decode_rows:
            return decision
        self._forced = False
        assert not decision.chunks
        stay = decision.decode_rows != row
        return decision._replace(
            decodes=decision.decodes.subset(stay),
            decode_positions=decision.decode_positions[stay],
            opens_block=decision.opens_block[stay],
            victims=(Victim(row, swaps=True, host_full=False),),
        )

    def added_s(self, swaps: bool) -> float:
        """The longest gap of eight, less the median gap of the eight before."""
        before = [self._gap_s() for _ in range(GAPS)]
        self._forced = swaps
        after = [self._gap_s() for _ in range(GAPS)]
        assert not self._forced
        return max(after) - float(np.median(before))

    def _gap_s(self) -> float:
        """Steps until the others have their next token; they have it all at once."""
        start = time.perf_counter()
        while True:
            deltas = self.core.step()
            if sum(owner != LONG for owner, _ in deltas) == NUM_OTHERS:
                return time.perf_counter() - start


def disturbance(report: Report, core: EngineCore, num_rounds: int) -> None:
    rounds = Rounds(core)
    added_s: dict[bool, list[float]] = {True: [], False: []}
    for index in range(-1, num_rounds):  # the first one touches the pages of host memory
        rounds.start()
        for swaps in (False, True, True, False):
            lap_s = rounds.added_s(swaps)
            if index >= 0:
                added_s[swaps].append(lap_s)
        rounds.stop()
    counters, store = core.scheduler.counters, core.runner.store
    assert counters.swap_preemptions == 2 * (num_rounds + 1)
    num_blocks = (NUM_TOKENS - NUM_LEFT) // core.limits.block_size
    assert min(store.out.blocks, store.back.blocks) >= num_blocks * counters.swap_preemptions, "not all came back"
    for swaps, name in ((True, "swapped out and in"), (False, "no swap")):
        laps_ms = 1e3 * np.array(added_s[swaps])
        target = "< 10" if swaps else None
        report.add(f"{name}: added to a step of others, p50", float(np.median(laps_ms)), "ms", target)
        report.add(f"{name}: added to a step of others, p90", float(np.percentile(laps_ms, 90)), "ms", target)
        report.add(f"{name}: added to a step of others, most", float(laps_ms.max()), "ms", target)


def bandwidth(report: Report, core: EngineCore, num_rounds: int) -> None:
    """Seconds and bytes a second of the programs that move blocks."""
    limits, compiled, store = core.limits, core.runner.compiled, core.runner.store
    kv = init_kv_cache(
        core.model, limits.num_blocks, limits.block_size, limits.kv_dtype, as_bits=jax.default_backend() == "cpu"
    )
    num_blocks = NUM_TOKENS // limits.block_size
    size = min((s for s in compiled.gather if s >= num_blocks), default=max(compiled.gather))
    ids = np.arange(1, size + 1, dtype=np.int32)
    layer = kv.layers[0]
    own = SwapStore(size, kv.block_shape, layer.dtype)
    laps_s = []
    for _ in range(num_rounds + 1):
        t0 = time.perf_counter()
        own.put(compiled.gather[size](kv, ids), ids - 1)
        while own.num_pending:
            own.drain()
        t1 = time.perf_counter()
        kv = compiled.scatter[size](kv, own.read(ids - 1, size), ids)
        jax.block_until_ready(kv)
        laps_s.append((t1 - t0, time.perf_counter() - t1))
    out_s, back_s = np.median(np.array(laps_s[1:]), axis=0)
    report.add(f"out: {size} blocks", 1e3 * float(out_s), "ms")
    report.add("out: bandwidth", size * store.block_bytes / float(out_s) / 1e9, "GB/s")
    report.add(f"in: {size} blocks", 1e3 * float(back_s), "ms")
    report.add("in: bandwidth", size * store.block_bytes / float(back_s) / 1e9, "GB/s")


def recompute(report: Report, core: EngineCore, num_rounds: int) -> None:
    """What the means cost, as the engine has measured them at its start; and a prefill, measured here."""
    costs, num_blocks = core.runner.costs, NUM_TOKENS // core.limits.block_size
    rng = np.random.default_rng(1)
    laps_s = []
    for index in range(num_rounds):
        prompt = rng.integers(10, core.model.vocab_size, NUM_TOKENS - 1).tolist()
        admitted = core.check(prompt, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
        start = time.perf_counter()
        core.add(f"prefill{index}", admitted, None)
        while core.has_work:
            core.step()
        laps_s.append(time.perf_counter() - start)
    report.add(f"recompute: {NUM_TOKENS - 1} tokens alone", 1e3 * float(np.median(laps_s)), "ms")
    swap_s = costs.swap_fixed_s + num_blocks * costs.swap_block_s
    report.add(f"the engine's price of a swap of {NUM_TOKENS} tokens", 1e3 * swap_s, "ms")
    report.add(f"the engine's price of computing {NUM_TOKENS} tokens", 1e3 * NUM_TOKENS * costs.prefill_token_s, "ms")


def main() -> None:
    parser = argparse.ArgumentParser(description="What a sequence costs the others that is swapped out and in again.")
    parser.add_argument("--model", default="demo", help="demo, a folder, org/name")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 50")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    num_rounds = 5 if args.quick else 50
    core = make_core(args.model, args.dtype, enable_prefix_caching=False)
    report = Report("swap")
    disturbance(report, core, num_rounds)
    bandwidth(report, core, num_rounds)
    recompute(report, core, min(num_rounds, 20))
    report.finish(args.json)


if __name__ == "__main__":
    main()
