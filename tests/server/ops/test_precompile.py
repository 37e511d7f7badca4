"""`python -m jaxserve.compile`: its command line. What it compiles is proved with the wheel, in tests/e2e."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve_server import precompile
from jaxserve_server.flags import Options


def test_it_takes_the_servers_flags_and_needs_no_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Options] = []

    def fill(options: Options) -> tuple[dict[str, float], int]:
        seen.append(options)
        (tmp_path / "made").write_bytes(b"x" * 2_500_000)
        return {"step[2]": 1.0, "empty": 2.25, "step[64]": 12.5}, 1

    monkeypatch.setattr(precompile, "fill", fill)
    flags = ["folder", "--host", "0.0.0.0", "--max-num-seqs", "7", "--compilation-cache-dir", str(tmp_path)]
    assert precompile.main(flags) == 0
    assert (seen[0].model, seen[0].engine.max_num_seqs) == ("folder", 7)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["step[64]    12.50 s", "empty        2.25 s", "step[2]      1.00 s"]
    assert lines[4].startswith("3 programs, 2 compiled and 1 there already, in ")
    assert lines[4].endswith(f"; {tmp_path} holds 1 files, 2.5 MB")


def test_faults_end_with_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert precompile.main(["demo", "--compilation-cache-dir", "none"]) == 1
    assert "nothing to fill. Name a folder." in capsys.readouterr().err
    assert precompile.main([str(tmp_path / "missing"), "--compilation-cache-dir", str(tmp_path)]) == 1
    assert "missing" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_info:
        precompile.main(["demo", "--no-such-flag"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("python -m jaxserve.compile: error: unknown flag --no-such-flag")


def test_help_imports_no_jax(repo: Path) -> None:
    code = (
        "import sys, jaxserve_server.precompile as p\ntry: p.main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    )
    paths = f"{repo}:{repo / 'server'}:{repo / 'checkpoints'}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": paths}
    )
    assert done.stdout.startswith("usage: python -m jaxserve.compile ")
    assert "Compile a model's programs" in done.stdout
