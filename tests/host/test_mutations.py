"""Some of the planted bugs, so that the list and its script do not rot; `scripts/mutate` plants all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_sample_of_planted_bugs_is_seen(repo: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    command = [sys.executable, str(repo / "scripts" / "mutate"), "--sample", os.environ.get("JAXSERVE_MUTANTS", "4")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_planted_bug_fits_the_source(repo: Path) -> None:
    namespace: dict = {"__name__": "planted"}
    exec((repo / "tests" / "host" / "mutations" / "planted.py").read_text(), namespace)
    planted = namespace["PLANTED"]
    assert len(planted) >= 25
    assert len({bug.name for bug in planted}) == len(planted)
    misfits = [bug.name for bug in planted if (repo / bug.file).read_text().count(bug.old) != 1]
    assert not misfits, f"change tests/host/mutations/planted.py with the source: {misfits}"
