"""How long from the command to the first answer?

    python -m benchmarks.startup [--model demo] [--quick] [--json FILE]

Cold: an empty compilation cache. Warm: the cache that the cold start left. Seconds from starting the
process to `/health` answering 200; medians of three pairs (`--quick`: one).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile

from benchmarks.report import Report
from benchmarks.running_server import running_server


def start_s(model: str, cache: str, flags: list[str]) -> float:
    with running_server(model, ["--compilation-cache-dir", cache, *flags]) as (_, ready_s):
        return ready_s


def main() -> None:
    parser = argparse.ArgumentParser(description="How long from the command to the first answer?")
    parser.add_argument("--model", default="demo", help="what to serve: demo, a folder, org/name")
    parser.add_argument("--server-flags", default="", help="flags for the server, in one string")
    parser.add_argument("--quick", action="store_true", help="one pair of starts")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    cold, warm = [], []
    for _ in range(1 if args.quick else 3):
        with tempfile.TemporaryDirectory() as cache:  # made with mode 0700, as the server demands
            cold.append(start_s(args.model, cache, args.server_flags.split()))
            warm.append(start_s(args.model, cache, args.server_flags.split()))
    report = Report("startup")
    is_demo = args.model == "demo"
    report.add("start to ready, cold", statistics.median(cold), "s", "<= 15" if is_demo else None)
    report.add("start to ready, warm", statistics.median(warm), "s", "<= 6" if is_demo else None)
    report.finish(args.json)


if __name__ == "__main__":
    main()
