"""`python -m simulation`: histories from seeds until so many operations are done; a failing one is printed small."""

from __future__ import annotations

import argparse
import sys
import time

from .history import make_history, run, seeds
from .shrink import failure_of, shrink


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--operations", type=int, default=100_000, help="stop after so many (default 100,000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--stride", type=int, default=1, help="from seed to seed; workers take turns")
    parser.add_argument("--count", type=int, default=0, help="stop after so many seeds; 0: only operations count")
    parser.add_argument("--no-shrink", action="store_true", help="say which seed fails, and where, and no more")
    args = parser.parse_args()
    begin, num_done, num_seeds, num_tokens, num_preemptions = time.perf_counter(), 0, 0, 0, 0
    for seed in seeds(args.first, args.stride):
        if num_done >= args.operations or (args.count and num_seeds >= args.count):
            break
        history = make_history(seed)
        try:
            sim = run(history)
        except Exception as error:
            print(f"seed {seed} fails: {type(error).__name__}: {error}")
            if not args.no_shrink:
                small = shrink(history)
                print(f"fails in {failure_of(small)} with {len(small.events)} events:\n{small}")
            return 1
        num_done += sim.num_operations
        num_seeds += 1
        num_tokens += sim.num_delivered
        num_preemptions += sim.scheduler.num_preemptions
    elapsed = time.perf_counter() - begin
    print(
        f"{num_done} operations of {num_seeds} seeds in {elapsed:.1f} s ({num_done / elapsed:.0f}/s): "
        f"{num_tokens} tokens delivered, {num_preemptions} preemptions, all outputs right"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
