"""Tensor parallelism, on eight simulated devices in a process of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

NUM_TESTS = 30  # at least: a process that collects few proves little


def test_on_eight_simulated_devices(repo: Path, eight_devices: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5", "--no-header"]
    command += ["-o", "addopts=--import-mode=importlib --strict-markers", "tests/portability/on_eight_devices"]
    done = subprocess.run(command, cwd=repo, env=eight_devices, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2_000:]
    assert int(passed[1]) >= NUM_TESTS
