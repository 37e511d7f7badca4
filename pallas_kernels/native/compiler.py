"""From C++ to libraries: the CPU's kernels compiled once for this processor and this jaxlib, and kept.

There is no wheel of them: they are compiled where they run, for the very processor (`-march=native`), with whatever C++
compiler is there. Nothing here imports jax, so that a compiler can work while jax is being imported (`begin`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import logging
import os
import platform
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

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
_LOCK = threading.Lock()


class CompilerError(Exception):
    """There is no compiler, or it failed. The message says which and what it said."""


def begin(folder: Path) -> None:
    """Starts to compile in a thread; `compile_kernels` waits for it, and says what went wrong, if anything did."""

    def run() -> None:
        with contextlib.suppress(CompilerError):
            compile_kernels(folder)

    threading.Thread(target=run, name="compile-kernels", daemon=True).start()


def compile_kernels(folder: Path) -> tuple[str, list[Path]]:
    """The key, and the libraries in the order of `LIBRARIES`, compiled side by side where they are not there.

    The key names the machine code: source, compiler and flags, jaxlib, processor. Equal keys, equal bits.

    Args:
        folder: where what was compiled is kept and looked for; it is made if need be. What lies there is executed: it
            must be this user's alone.

    Raises:
        CompilerError: they cannot be compiled.

    Cost: 7 s of a core the first time on a machine, some milliseconds after that.
    """
    if os.name != "posix":
        raise CompilerError(f"the CPU's kernels are built on POSIX systems only, and this is {os.name}")
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise CompilerError(f"there is no C++ compiler ({', '.join(COMPILERS)}) to build the CPU's kernels with")
    try:
        with _LOCK:
            return _compile(compiler, folder)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise CompilerError(f"the CPU's kernels cannot be built: {said.strip()[-2000:]}") from error


def _compile(compiler: str, folder: Path) -> tuple[str, list[Path]]:
    command = [compiler, *FLAGS, native_target()]
    key = _key(command)
    command += ["-isystem", _include_folder()]  # not in the key: a place, and the version is
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


def native_target() -> str:
    """The flag that allows all that this processor has."""
    return "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"


def _include_folder() -> str:
    """What `jax.ffi.include_dir()` says."""
    spec = importlib.util.find_spec("jaxlib")
    assert spec is not None
    assert spec.submodule_search_locations
    return str(Path(next(iter(spec.submodule_search_locations))) / "include")


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
