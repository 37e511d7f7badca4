"""Compiling the step programs before the first request, and knowing that none is compiled after.

A fixed set: one program for each token bucket and two for admission. They are called as compiled
executables, so that a shape nobody planned for is an error and not a silent compilation.
"""

from __future__ import annotations

import functools
import os
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import EngineLimits, ModelConfig
from jaxserve.errors import ConfigError
from jaxserve.state import DecodeState, KVCache, StepShape
from jaxserve.steps import ROW_FIELDS, admit_row, set_row_tables, step, table_fields

# (programs done, programs in all, name of the one just done, its seconds)
OnProgress = Callable[[int, int, str, float], None]
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts XLA compilations of this process since it was made."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == _COMPILE_EVENT


@functools.cache
def compile_counter() -> CompileCounter:
    """The process's one counter: jax's listeners cannot be taken back."""
    return CompileCounter()


@dataclass(frozen=True, slots=True)
class CompiledSteps:
    """The executables of one engine.

    Attributes:
        steps: (shape, executable) of each bucket, ascending.
        admit, set_tables: `steps.admit_row` and `steps.set_row_tables`.
        compile_s: seconds of each program by name.
    """

    steps: tuple[tuple[StepShape, Callable], ...]
    admit: Callable
    set_tables: Callable
    compile_s: dict[str, float]

    def for_tokens(self, num_tokens: int) -> tuple[StepShape, Callable]:
        """The smallest bucket that holds `num_tokens`."""
        for shape, executable in self.steps:
            if shape.num_tokens >= num_tokens:
                return shape, executable
        raise AssertionError(f"a step of {num_tokens} tokens is past the last bucket, {self.steps[-1][0].num_tokens}")


def step_shape(limits: EngineLimits, num_tokens: int) -> StepShape:
    return StepShape(
        num_tokens=num_tokens,
        max_rows=limits.max_num_seqs,
        max_blocks=limits.max_blocks_per_row,
        block_size=limits.block_size,
        q_tile=min(limits.q_tile, num_tokens),
        kv_tile=limits.kv_tile,
    )


def compile_steps(
    params: Any,
    kv: KVCache,
    state: DecodeState,
    model: ModelConfig,
    limits: EngineLimits,
    on_progress: OnProgress | None = None,
) -> CompiledSteps:
    """Lowers and compiles every program, in as many threads as there are cores.

    Args:
        params, kv, state: the arrays themselves; their shapes and shardings are what is compiled for.
    """
    abstract = partial(jax.tree.map, _abstract)
    programs: dict[str, Callable[[], Any]] = {}
    for num_tokens in reversed(limits.token_buckets):  # the longest compilations first
        shape = step_shape(limits, num_tokens)
        function = partial(step, config=model, shape=shape, max_model_len=limits.max_model_len)
        jitted = jax.jit(function, donate_argnums=(1, 2))
        packed = jax.ShapeDtypeStruct((shape.packed_len,), jnp.int32)
        programs[f"step[{num_tokens}]"] = partial(jitted.lower, abstract(params), abstract(kv), abstract(state), packed)
    for name, function, fields in (
        ("admit", admit_row, ROW_FIELDS),
        ("set_tables", set_row_tables, table_fields(model.vocab_size)),
    ):
        packed = jax.ShapeDtypeStruct((sum(fields.values()),), jnp.int32)
        programs[name] = partial(jax.jit(function, donate_argnums=(0,)).lower, abstract(state), packed)
    compiled, seconds = _compile_all(programs, on_progress)
    steps = tuple((step_shape(limits, n), compiled[f"step[{n}]"]) for n in limits.token_buckets)
    return CompiledSteps(steps, compiled["admit"], compiled["set_tables"], seconds)


def _abstract(array: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=getattr(array, "sharding", None))


def _compile_all(
    programs: dict[str, Callable[[], Any]], on_progress: OnProgress | None
) -> tuple[dict[str, Any], dict[str, float]]:
    done: list[str] = []

    def compile_one(name: str) -> tuple[Any, float]:
        begin = time.perf_counter()
        executable = programs[name]().compile()
        seconds = time.perf_counter() - begin
        done.append(name)
        if on_progress:
            on_progress(len(done), len(programs), name, seconds)
        return executable, seconds

    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, len(programs))) as pool:
        results = dict(zip(programs, pool.map(compile_one, programs), strict=True))
    return {name: r[0] for name, r in results.items()}, {name: r[1] for name, r in results.items()}


def use_compilation_cache(folder: str) -> Path:
    """Keeps compiled programs in `folder` from now on, for the whole process.

    Raises:
        ConfigError: the folder is not this user's alone. What lies in it is executed.
    """
    path = Path(folder).expanduser()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ConfigError(
            f"The compilation cache {folder} must be a folder that belongs to this user with mode 0700, because "
            "compiled code in it is executed. Set the mode, choose another folder, or turn the cache off."
        )
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
