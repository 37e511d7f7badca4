"""Whether the CPU's kernels are begun before jax is there: where an engine will ask for them and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxserve import kernels_ahead
from jaxserve.config import EngineConfig
from jaxserve.kernels_ahead import begin_kernels
from pallas_kernels.native import compiler


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    folders: list[Path] = []
    monkeypatch.setattr(compiler, "begin", folders.append)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return folders


def test_they_are_begun_where_they_are_kept(begun: list[Path], tmp_path: Path) -> None:
    begin_kernels(EngineConfig(compilation_cache_dir=str(tmp_path / "programs")))
    assert begun == [tmp_path / "programs" / "kernels"]
    assert (tmp_path / "programs").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_backend": "xla"},
        {"tensor_parallel_size": 2},
        {"stacked_layers": True},
        {"compilation_cache_dir": None},
    ],
    ids=str,
)
def test_nothing_is_compiled_that_nobody_will_ask_for(
    changes: dict[str, Any], begun: list[Path], tmp_path: Path
) -> None:
    begin_kernels(EngineConfig(**{"compilation_cache_dir": str(tmp_path)} | changes))
    assert begun == []


def test_other_devices_have_kernels_of_their_own(
    begun: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(compilation_cache_dir=str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    begin_kernels(config)
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(kernels_ahead.importlib.util, "find_spec", lambda name: name if name == "libtpu" else None)
    begin_kernels(config)
    assert begun == []
    monkeypatch.setattr(kernels_ahead.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(kernels_ahead.metadata, "entry_points", lambda group: [])
    begin_kernels(config)
    assert begun == [tmp_path / "kernels"]


def test_a_folder_of_others_is_left_for_the_loader_to_refuse(begun: list[Path], tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    begin_kernels(EngineConfig(compilation_cache_dir=str(tmp_path)))
    assert begun == []


def test_it_needs_no_jax_and_what_fails_is_said_by_who_asks(tmp_path: Path) -> None:
    """A thread that fails is silent; a compiler that works leaves the libraries."""
    code = (
        "import sys, pathlib, threading\n"
        "from jaxserve.kernels_ahead import begin_kernels\n"
        "from pallas_kernels.native import compiler\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
        "compiler.COMPILERS = ('no-such-compiler',)\n"
        "compiler.begin(pathlib.Path(sys.argv[1]))\n"
        "[t.join() for t in threading.enumerate() if t.name == 'compile-kernels']\n"
        "try: compiler.compile_kernels(pathlib.Path(sys.argv[1]))\n"
        "except compiler.CompilerError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "there is no C++ compiler (no-such-compiler) to build the CPU's kernels with\n"
    assert done.stderr == ""
