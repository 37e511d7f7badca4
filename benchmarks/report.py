"""`Report`: what every benchmark prints and writes.

A table on standard output and, where asked, a JSON file:

    {"name", "machine", "commit", "rows": [{"name", "value", "unit", "target"}]}

with "notes", a list of texts, where there are any: what was left out, and why.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `target` is what it should reach, as a number or with a sign in front ("< 100"), or None."""

    name: str
    value: float
    unit: str
    target: float | str | None


class Report:
    """Collects the figures of one benchmark run.

    Args:
        name: the benchmark's.

    Attributes:
        about: facts of the machine beside those that `machine` finds.
    """

    def __init__(self, name: str):
        self.name = name
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.about: dict[str, str | int | float] = {}

    def add(self, name: str, value: float, unit: str, target: float | str | None = None) -> None:
        self.rows.append(Row(name, float(value), unit, target))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self, json_path: str | os.PathLike[str] | None = None) -> None:
        """Prints the table; writes the JSON file if a path is given."""
        about, version = machine() | self.about, commit()
        print(self.table())
        for text in self.notes:
            print(f"\n{text}")
        print(f"\n{', '.join(f'{key} {value}' for key, value in about.items())}; commit {version}")
        if json_path is not None:
            rows = [asdict(row) for row in self.rows]
            document = {"name": self.name, "machine": about, "commit": version, "rows": rows}
            document |= {"notes": self.notes} if self.notes else {}
            Path(json_path).write_text(json.dumps(document, indent=1) + "\n")

    def table(self) -> str:
        """The rows as a markdown table with aligned columns."""
        cells = [(self.name, "value", "unit", "target")]
        cells += [(row.name, _number(row.value), row.unit, _number(row.target)) for row in self.rows]
        widths = [max(len(line[column]) for line in cells) for column in range(4)]
        lines = [
            f"| {name:<{widths[0]}} | {value:>{widths[1]}} | {unit:<{widths[2]}} | {target:>{widths[3]}} |"
            for name, value, unit, target in cells
        ]
        rule = f"|{'-' * (widths[0] + 2)}|{'-' * (widths[1] + 1)}:|{'-' * (widths[2] + 2)}|{'-' * (widths[3] + 1)}:|"
        return "\n".join([lines[0], rule, *lines[1:]])


def _number(value: float | str | None) -> str:
    """Four significant digits, thousands separated; a target's text as it is."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def machine() -> dict[str, str | int | float]:
    """What the figures depend on: processor, memory, versions, accelerators where jax has been imported."""
    about: dict[str, str | int | float] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "jax": metadata.version("jax"),
    }
    if hasattr(os, "sysconf"):
        about["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if "jax" in sys.modules:
        devices = sys.modules["jax"].devices()
        about["devices"] = f"{len(devices)} x {devices[0].device_kind}"
    return about


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The tree's commit, with "-dirty" where tracked files differ from it; "unknown" outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
