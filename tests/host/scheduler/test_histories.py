"""A million operations of random histories with faults, in two processes.

JAXSERVE_SIM_OPERATIONS asks for another number, JAXSERVE_SIM_FIRST for another first seed.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

NUM_WORKERS = 2
NUM_OPERATIONS = int(os.environ.get("JAXSERVE_SIM_OPERATIONS", 1_000_000))
FIRST = int(os.environ.get("JAXSERVE_SIM_FIRST", 0))


def test_a_million_operations(repo: Path) -> None:
    paths = os.pathsep.join([str(repo), str(repo / "tests" / "host")])
    environment = os.environ | {"PYTHONPATH": paths}
    workers = []
    for worker in range(NUM_WORKERS):
        share = ["--operations", str(NUM_OPERATIONS // NUM_WORKERS)]
        seeds = ["--first", str(FIRST + worker), "--stride", str(NUM_WORKERS)]
        command = [sys.executable, "-W", "error", "-m", "simulation", *share, *seeds]
        workers.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = [worker.communicate()[0] for worker in workers]
    print("\n".join(said))
    assert [worker.returncode for worker in workers] == [0] * NUM_WORKERS, "\n".join(said)


def test_histories_replay_exactly(echo) -> None:
    history = importlib.import_module("simulation.history")
    for seed in range(3):
        made = history.make_history(seed)
        assert made == history.make_history(seed)
        first, second = history.run(made), history.run(made, deep_every=0)
        assert first.results == second.results
        assert first.num_operations == second.num_operations
        printed = eval(str(made), vars(history))  # what a failing seed prints is the case itself
        assert printed == made


def test_the_small_case_of_a_planted_bug_fails_too(echo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrinking keeps the failure, and keeps little else: here every copy-on-write is skipped."""
    history = importlib.import_module("simulation.history")
    shrinking = importlib.import_module("simulation.shrink")
    memory = importlib.import_module("jaxserve.cache.kv_memory")
    monkeypatch.setattr(memory.KVMemory, "copy_on_write", lambda self, row, col: None)
    made = next(made for made in map(history.make_history, range(200)) if shrinking.failure_of(made))
    small = shrinking.shrink(made, max_runs=300)
    assert shrinking.failure_of(small) == shrinking.failure_of(made)
    assert len(small.events) <= 12
    monkeypatch.undo()
    assert shrinking.failure_of(small) is None
