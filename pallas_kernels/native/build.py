"""The CPU's kernels, loaded, tried and registered with XLA; `compiler` compiles them."""

from __future__ import annotations

import ctypes
import functools
import itertools
import stat
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import jax

from pallas_kernels.native.compiler import LIBRARIES, CompilerError, compile_kernels
from pallas_kernels.native.trial import kernels_error


class Loaded(NamedTuple):
    """The kernels of this process.

    Attributes:
        key: names the machine code (`compile_kernels`); None where there are none.
        missing: why there are none, as a sentence.
    """

    key: str | None
    missing: str | None


@functools.cache
def _attempts() -> tuple[threading.Lock, list[Loaded]]:
    """The process's one lock and its one result: XLA takes a target's name once."""
    return threading.Lock(), []


def load_kernels(folder: Path | None) -> Loaded:
    """Makes the kernels callable in this process, or says why they cannot be had. The first call decides for all.

    What has just been compiled is tried (`trial`), and there are none if it is wrong.

    Args:
        folder: as `compile_kernels` takes it. None compiles for this process only.

    Cost: 7 s of a core the first time on a machine, some milliseconds after that.
    """
    lock, results = _attempts()
    with lock:
        if not results:
            results.append(_load(folder))
        return results[0]


def _load(folder: Path | None) -> Loaded:
    try:
        with tempfile.TemporaryDirectory() as temporary:
            key, paths = compile_kernels(Path(temporary) if folder is None else folder)
            for path, sources in zip(paths, LIBRARIES.values(), strict=True):
                library = ctypes.CDLL(str(path))  # stays loaded when its file is gone
                for name in itertools.chain.from_iterable(sources.values()):
                    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
            return Loaded(key, None) if _is_tried(paths) else _try(key, paths)
    except CompilerError as error:
        return Loaded(None, str(error))
    except OSError as error:
        return Loaded(None, f"the CPU's kernels cannot be loaded: {error}")


def _is_tried(paths: list[Path]) -> bool:
    return all(path.stat().st_mode & stat.S_IXUSR for path in paths)


def _try(key: str, paths: list[Path]) -> Loaded:
    """Tries kernels beside their references; those that are right are marked so, executable, and others removed."""
    wrong = kernels_error()
    for path in paths:
        if wrong is None:
            path.chmod(0o700)
        else:
            path.unlink(missing_ok=True)  # another process tries, too
    return Loaded(None if wrong else key, wrong)
