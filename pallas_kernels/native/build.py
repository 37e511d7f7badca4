"""The CPU's kernels, from C++ to XLA: compiled once for this processor and this jaxlib, kept, loaded, registered.

There is no wheel of them: they are compiled where they run, for the very processor (`-march=native`), with whatever C++
compiler is there. Where there is none, `load_kernels` says so and nobody has them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax

from pallas_kernels.native.trial import kernels_error

logger = logging.getLogger(__name__)

COMPILERS = ("g++", "clang++", "c++")
HEADERS = ("native/product.h", "native/rows.h", "native/vector.h", "native/xla.h")
# Two libraries, for two cores to compile in the same time; what XLA calls in each, by source.
LIBRARIES = {
    "layers": {
        "linear/kernel_cpu.cc": ("jaxserve_linear", "jaxserve_gated_linear", "jaxserve_take_rows"),
        "rms_norm/kernel_cpu.cc": ("jaxserve_add_rms_norm",),
        "rope_write/kernel_cpu.cc": ("jaxserve_rope_write",),
    },
    "attention": {"ragged_paged_attention/kernel_cpu.cc": ("jaxserve_attention",)},
}
# One rounding of a product and its sum wherever the processor has it; no other liberty with float32.
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-DNDEBUG", "-shared", "-fPIC", "-pthread")
TIMEOUT_S = 300
PREFIX = "kernels-"
_ROOT = Path(__file__).parents[1]


class Loaded(NamedTuple):
    """The kernels of this process.

    Attributes:
        key: names the machine code: source, compiler and flags, jaxlib, processor. Equal keys, equal bits. None where
            there are none.
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
        folder: where what was compiled is kept and looked for; it is made if need be. What lies there is executed: it
            must be this user's alone. None compiles for this process only.

    Cost: 7 s of a core the first time on a machine, some milliseconds after that.
    """
    lock, results = _attempts()
    with lock:
        if not results:
            results.append(_load(folder))
        return results[0]


def _load(folder: Path | None) -> Loaded:
    if os.name != "posix":
        return Loaded(None, f"the CPU's kernels are built on POSIX systems only, and this is {os.name}")
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return Loaded(None, f"there is no C++ compiler ({', '.join(COMPILERS)}) to build the CPU's kernels with")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            key, paths = _build(compiler, Path(temporary) if folder is None else folder)
            for path, sources in zip(paths, LIBRARIES.values(), strict=True):
                library = ctypes.CDLL(str(path))  # stays loaded when its file is gone
                for name in itertools.chain.from_iterable(sources.values()):
                    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
            return Loaded(key, None) if _is_tried(paths) else _try(key, paths)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return Loaded(None, f"the CPU's kernels cannot be built: {said.strip()[-2000:]}")


def _build(compiler: str, folder: Path) -> tuple[str, list[Path]]:
    """The key, and the libraries in the order of `LIBRARIES`, compiled side by side where they are not there."""
    command = [compiler, *FLAGS, native_target()]
    key = _key(command)
    command += ["-isystem", jax.ffi.include_dir()]  # not in the key: a place, and the version is
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def build(library: str) -> Path:
        path = folder / f"{PREFIX}{key}-{library}.so"
        if path.exists():
            os.utime(path)  # what is not used for long is removed
            return path
        logger.info("compiling the CPU's kernels (%s) with %s, once for this machine", library, compiler)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            includes = "".join(f'#include "{source}"\n' for source in LIBRARIES[library])  # as one, its headers once
            _run([*command, "-x", "c++", "-", "-o", str(part.absolute())], includes)
            part.chmod(0o600)  # executable when it has been tried
            part.replace(path)  # a reader sees all or nothing
        finally:
            part.unlink(missing_ok=True)
        return path

    with ThreadPoolExecutor(len(LIBRARIES)) as pool:
        return key, list(pool.map(build, LIBRARIES))


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


def native_target() -> str:
    """The flag that allows all that this processor has."""
    return "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"


def _key(command: list[str]) -> str:
    version = _run([command[0], "--version"])
    facts = [_source_digest(), *command, version, metadata.version("jaxlib"), _processor()]
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{len(fact)} {fact}\n".encode())
    return digest.hexdigest()[:40]


def _run(command: list[str], given: str = "") -> str:
    done = subprocess.run(  # noqa: S603
        command, input=given, cwd=_ROOT, check=True, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    return done.stdout


def _source_digest() -> str:
    digest = hashlib.sha256()
    for name in (*itertools.chain.from_iterable(LIBRARIES.values()), *HEADERS):
        content = (_ROOT / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _processor() -> str:
    """What `-march=native` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.partition(":")[0].strip() in wanted))
