"""The CPU's kernels, for tests: compiled once for a process, or a reason to leave their tests out."""

from __future__ import annotations

import os
import shutil

import pytest

from pallas_kernels.native import build, compiler

TARGET = os.environ.get("JAXSERVE_KERNEL_TARGET")  # another processor's than this one's

needs_cpu_kernels = pytest.mark.skipif(
    not any(map(shutil.which, compiler.COMPILERS)),
    reason=f"no C++ compiler here: one of {', '.join(compiler.COMPILERS)}",
)
if not needs_cpu_kernels.args[0]:
    with pytest.MonkeyPatch.context() as patch:
        if TARGET is not None:
            patch.setattr(compiler, "native_target", lambda: TARGET)
        loaded = build.load_kernels(None)
    assert loaded.missing is None, loaded.missing
