"""How long from the command to the first answer?

    python -m benchmarks.startup [--model demo] [--quick] [--json FILE]

Cold: an empty compilation cache. Warm: the cache that the cold start left. Seconds from starting the
process to `/health` answering 200; medians of three pairs (`--quick`: one). Beside them the processor's
seconds, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
from pathlib import Path

from benchmarks.report import Report
from benchmarks.running_server import running_server

# Floors on two cores: cold, warm. "30 layers" is for SmolLM2-135M's shape.
TARGETS = {"demo": ("<= 15", "<= 6"), "30 layers": ("<= 60", "<= 12")}


def start_s(model: str, cache: str, flags: list[str]) -> tuple[float, float]:
    """Seconds to ready, and seconds of processor until the server had ended, which it was told at once."""
    before = children_s()
    with running_server(model, ["--compilation-cache-dir", cache, *flags]) as (_, ready_s):
        pass
    return ready_s, children_s() - before


def children_s() -> float:
    """Seconds of processor of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description="How long from the command to the first answer?")
    parser.add_argument("--model", default="demo", help="what to serve: demo, a folder, org/name")
    parser.add_argument("--target", choices=TARGETS, help="the floors to print (demo's for the demo model)")
    parser.add_argument("--server-flags", default="", help="flags for the server, in one string")
    parser.add_argument("--quick", action="store_true", help="one pair of starts")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    cold, warm, num_bytes = [], [], 0
    for _ in range(1 if args.quick else 3):
        with tempfile.TemporaryDirectory() as cache:  # made with mode 0700, as the server demands
            cold.append(start_s(args.model, cache, args.server_flags.split()))
            warm.append(start_s(args.model, cache, args.server_flags.split()))
            num_bytes = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
    report = Report("startup")
    targets = TARGETS.get(args.target or args.model, (None, None))
    for name, starts, target in (("cold", cold, targets[0]), ("warm", warm, targets[1])):
        report.add(f"start to ready, {name}", statistics.median(ready for ready, _ in starts), "s", target)
        report.add(f"processor, {name}", statistics.median(used for _, used in starts), "s", None)
    report.add("kept programs", num_bytes / 1e6, "MB", None)
    report.finish(args.json)


if __name__ == "__main__":
    main()
