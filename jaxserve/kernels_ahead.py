"""Begins to compile the CPU's kernels before jax is imported, which takes as long: two cores have work at once."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from importlib import metadata

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.private_folder import private_folder
from pallas_kernels.native import compiler


def begin_kernels(config: EngineConfig) -> None:
    """Starts a thread if an engine of this configuration will ask for kernels, as far as can be seen without jax.

    Nothing hangs on it: who asks for them compiles what is not there, and says what is wrong.
    """
    folder = config.compilation_cache_dir
    is_asked = config.attention_backend != "xla" and config.tensor_parallel_size == 1 and not config.stacked_layers
    if folder is None or not is_asked or not _runs_on_cpu():
        return
    with contextlib.suppress(ConfigError, OSError):
        compiler.begin(private_folder(folder) / "kernels")


def _runs_on_cpu() -> bool:
    """Whether jax has no other device: it is told so, or has no plugin for one."""
    asked = os.environ.get("JAX_PLATFORMS", "").lower()
    if asked:
        return asked == "cpu"
    has_plugin = any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))
    return not has_plugin and not metadata.entry_points(group="jax_plugins")
