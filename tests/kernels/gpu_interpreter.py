"""Mosaic GPU's interpreter for tests: its parameters, and what makes jax 0.10.2's bearable."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax._src import core
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels.mosaic_gpu import interpreter_params

DETECTS_RACES = jax.__version_info__ >= (0, 11)  # 0.10.2 takes the option and does nothing


def params(races: bool = True) -> Any:
    """Fresh memory is NaN; a read out of bounds raises, and so does a race if this jax looks for races."""
    return interpreter_params(uninitialized_memory="nan", detect_races=races and DETECTS_RACES)


def _evaluate(jaxpr: Any, consts: Any, *args: Any) -> None:
    core.eval_jaxpr(jaxpr, consts, *args)


_evaluate_compiled = jax.jit(_evaluate, static_argnums=(0,))
_one_compiles = threading.Lock()


def _run_compiled_once(jaxpr: Any, consts: Any, *args: Any) -> None:
    with _one_compiles:
        compiled = _evaluate_compiled.trace(jaxpr, consts, *args).lower().compile()
    compiled(consts, *args)


@pytest.fixture(scope="module", autouse=True)
def compile_threads_once() -> Iterator[None]:
    """Compiling is most of what a test takes. jax 0.10.2 compiles the kernel anew for each thread of each CTA, since
    it jits a function that it has just defined; later versions jit a function of the module, but the threads of the
    first CTA all at once. Here one compiles and the others wait, and XLA is asked for few optimizations.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thread_map, "_run_jaxpr", _run_compiled_once)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def forget_failures() -> Iterator[None]:
    """The interpreter keeps the memory of a kernel that raised: the next test would find it."""
    yield
    gpu_callbacks.reset_gpu_interpret_mode_state()
