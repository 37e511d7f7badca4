"""The CPU's kernels are compiled once, for the processor at hand, or there are none and a reason is given."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from pallas_kernels.native import build, compiler, trial
from tests.kernels.cpu_kernels import needs_cpu_kernels

TESTS = Path(__file__).parent


@needs_cpu_kernels
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the targets are x86's")
@pytest.mark.parametrize("target", ["x86-64", "x86-64-v3"], ids=["SSE2", "AVX2"])
def test_they_are_right_on_older_processors(target: str) -> None:
    """The same source with narrower vectors, and without instructions for bfloat16."""
    tests = [f"{TESTS}/test_cpu_{name}.py" for name in ("linear", "rows", "attention")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"JAXSERVE_KERNEL_TARGET": f"-march={target}", "JAXSERVE_KERNEL_CASES": "10"},
        cwd=TESTS.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


@needs_cpu_kernels
def test_what_was_compiled_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "private" / "kernels"
    key, paths = compiler.compile_kernels(folder)
    assert {file.name for file in folder.iterdir()} == {
        f"kernels-{key}-layers.so",
        f"kernels-{key}-attention.so",
    }
    assert folder.stat().st_mode & 0o077 == 0
    assert not build._is_tried(paths)
    assert build._try(key, paths) == (key, None)
    assert build._is_tried(paths)
    for path in paths:
        os.utime(path, (1, 1))
    assert compiler.compile_kernels(folder) == (key, paths)
    assert all(path.stat().st_mtime > 1 for path in paths), "their use was not noted"
    assert build._is_tried(paths), "compiled anew"
    monkeypatch.setattr(compiler, "native_target", lambda: "-march=x86-64")
    assert compiler.compile_kernels(folder)[0] != key
    assert not [file for file in folder.iterdir() if file.suffix == ".part"]


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("dtype", "name"), [("bfloat16", "linear"), ("float32", "gated_linear"), ("bfloat16", "ragged_paged_attention")]
)
def test_kernels_that_are_wrong_are_none(
    dtype: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A trial of what was just compiled: here a compiler that is a few hundredths off."""
    right = getattr(trial, name)

    def wrong(x: jax.Array, *arguments: Any, **options: Any) -> jax.Array:
        y = right(x, *arguments, **options)
        return y * 1.03 if x.dtype == dtype else y

    monkeypatch.setattr(trial, name, wrong)
    none = {name: dict.fromkeys(sources, ()) for name, sources in compiler.LIBRARIES.items()}
    monkeypatch.setattr(build, "LIBRARIES", none)  # those of this process stay
    found = build._load(tmp_path)
    assert found.key is None
    assert re.fullmatch(rf"the CPU's .* in {dtype} are off by \S+, where \S+ is allowed", found.missing or "")
    assert list(tmp_path.iterdir()) == [], "the next start would not try it"
    monkeypatch.setattr(trial, name, right)
    assert build._load(tmp_path).missing is None


def test_without_a_compiler_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = build._load(None)
    assert found == (None, r"there is no C++ compiler (g++, clang++, c++) to build the CPU's kernels with")


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing = tmp_path / "g++"
    failing.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo 1.0; exit; fi\necho "no such instruction" >&2\nexit 1\n'
    )
    failing.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = build._load(tmp_path / "kept")
    assert found == (None, "the CPU's kernels cannot be built: no such instruction")
    assert list((tmp_path / "kept").iterdir()) == []


def test_other_systems_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "os", SimpleNamespace(name="nt"))
    assert build._load(None).missing == "the CPU's kernels are built on POSIX systems only, and this is nt"
