"""Compiling the step programs before the first request, or loading them, and knowing that none is compiled after.

`programs` says which they are. They are called as compiled executables, so that a shape nobody planned for is an error
and not a silent compilation.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxserve.config import EngineLimits, ModelConfig
from jaxserve.engine.beams import follow_sizes
from jaxserve.engine.executables import ExecutableStore, is_supported, prune
from jaxserve.engine.programs import Programs, copy_sizes, engine_programs, step_shape
from jaxserve.parallel.mesh import mesh_of
from jaxserve.private_folder import private_folder
from jaxserve.state import StepShape

logger = logging.getLogger(__name__)

# (programs done, programs in all, name of the one just done, its seconds)
OnProgress = Callable[[int, int, str, float], None]
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class CompileCounter:
    """Counts XLA compilations of this process since it was made."""

    def __init__(self) -> None:
        self.count = 0  # those included that jax's cache answers
        self._thread = threading.local()
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def cache_hits(self) -> int:
        """How many of this thread's compilations jax's own cache has answered."""
        return getattr(self._thread, "hits", 0)

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == _COMPILE_EVENT

    def _on_event(self, event: str, **_: Any) -> None:
        if event == _CACHE_HIT_EVENT:
            self._thread.hits = self.cache_hits() + 1


@functools.cache
def compile_counter() -> CompileCounter:
    """The process's one counter: jax's listeners cannot be taken back."""
    return CompileCounter()


@dataclass(frozen=True, slots=True)
class CompiledSteps:
    """The executables of one engine.

    Attributes:
        empty: () -> (KVCache, DecodeState), in which nothing belongs to anybody.
        steps: (shape, executable) of each bucket, ascending.
        admit, set_tables, count_stored: `steps.admit_row`, `steps.set_row_tables` and `steps.count_stored`.
        start_beams: `ops.beams.start_beams`.
        follow_beams: `ops.beams.follow_beams` by number of rows.
        copy, gather, scatter: `ops.blocks.copy_blocks`, `gather_blocks` and `scatter_blocks` by number of blocks.
        compile_s: seconds of each program by name.
        num_loaded: how many of them an earlier start had left.
    """

    empty: Callable
    steps: tuple[tuple[StepShape, Callable], ...]
    admit: Callable
    set_tables: Callable
    count_stored: Callable
    start_beams: Callable
    follow_beams: Mapping[int, Callable]
    copy: Mapping[int, Callable]
    gather: Mapping[int, Callable]
    scatter: Mapping[int, Callable]
    compile_s: dict[str, float]
    num_loaded: int

    @property
    def max_decode_steps(self) -> int:
        """Decode steps that one call can run, however many rows decode."""
        rows = self.steps[0][0].max_rows
        return min(shape.max_steps for shape, _ in self.steps if shape.num_tokens <= self._decode_tokens(rows))

    def _decode_tokens(self, rows: int) -> int:
        return min(shape.num_tokens for shape, _ in self.steps if shape.num_tokens >= rows)

    def for_plan(self, num_tokens: int, num_updates: int) -> tuple[StepShape, Callable]:
        """The smallest bucket that holds so many tokens and updates of block tables."""
        for shape, executable in self.steps:
            if shape.num_tokens >= num_tokens and shape.num_updates >= num_updates:
                return shape, executable
        raise AssertionError(
            f"a step of {num_tokens} tokens and {num_updates} updates of block tables is past the last bucket, "
            f"{self.steps[-1][0]}"
        )


def compile_steps(
    params: Any,
    model: ModelConfig,
    limits: EngineLimits,
    on_progress: OnProgress | None = None,
    cache: Path | None = None,
    *,
    reuse: bool = True,
) -> CompiledSteps:
    """Loads the programs that an earlier start has left and compiles the others, in a thread for each core.

    Args:
        params: the arrays themselves; their shapes and sharding are what is compiled for.
        cache: where `use_compilation_cache` keeps programs; None neither loads nor keeps.
        reuse: False compiles all of them, and keeps what comes out.
    """
    programs = engine_programs(params, model, limits)
    store = ExecutableStore(cache, model, limits, mesh_of(params)) if cache and is_supported() else None
    made = _make_all(programs, store, reuse, on_progress)
    compiled = {name: program.executable for name, program in made.items()}
    num_loaded = sum(program.loaded for program in made.values())
    logger.info("%d programs: %d compiled, %d loaded", len(made), len(made) - num_loaded, num_loaded)
    if cache:
        prune(cache)

    def by_size(name: str, sizes: Iterable[int]) -> dict[int, Callable]:
        return {size: compiled[f"{name}[{size}]"] for size in sizes}

    return CompiledSteps(
        empty=compiled["empty"],
        steps=tuple((step_shape(limits, n), compiled[f"step[{n}]"]) for n in limits.token_buckets),
        admit=compiled["admit"],
        set_tables=compiled["set_tables"],
        count_stored=compiled["count_stored"],
        start_beams=compiled["start_beams"],
        follow_beams=by_size("follow_beams", follow_sizes(limits.max_num_seqs)),
        copy=by_size("copy", copy_sizes(limits)),
        gather=by_size("gather", limits.swap_buckets),
        scatter=by_size("scatter", limits.swap_buckets),
        compile_s={name: program.seconds for name, program in made.items()},
        num_loaded=num_loaded,
    )


@dataclass(frozen=True, slots=True)
class _Made:
    """One program. `seconds` is what it took to load or to compile."""

    executable: Callable
    loaded: bool
    seconds: float


def _make_all(
    programs: Programs, store: ExecutableStore | None, reuse: bool, on_progress: OnProgress | None
) -> dict[str, _Made]:
    done: list[str] = []

    def make(name: str) -> _Made:
        begin, lower = time.perf_counter(), programs[name]
        found = store.load(name, lower.args) if store and reuse else None
        executable = found or _compile(name, lower, store)
        made = _Made(executable, found is not None, time.perf_counter() - begin)
        done.append(name)
        if on_progress:
            on_progress(len(done), len(programs), name, made.seconds)
        return made

    with ThreadPoolExecutor(max_workers=min(num_cores(), len(programs))) as pool:
        return dict(zip(programs, pool.map(make, programs), strict=True))


def _compile(name: str, lower: partial[Any], store: ExecutableStore | None) -> Callable:
    hits = compile_counter().cache_hits()
    executable = lower().compile()
    if store and compile_counter().cache_hits() == hits:  # XLA:CPU loses functions when it writes what it has read
        store.save(name, lower.args, executable)
    return executable


def num_cores() -> int:
    """Cores that this process may use: a container's share of them, not the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_compilation_cache(folder: str) -> Path:
    """Makes a folder in which compiled programs are kept from now on.

    jax's own cache is turned on only where ours does not work: XLA:CPU cannot write again what that has read, and
    asking it means lowering each program.

    Raises:
        ConfigError: as `private_folder`.
    """
    path = private_folder(folder)
    if not is_supported():
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
