"""The engine's half of loading: weights on their device, programs compiled, a line in the log for each part.

Runs in the engine's process, or in a thread of the server's where there is only one. The one module of the server
that brings jax with it.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version

import jax

from jaxserve import __version__
from jaxserve.config import EngineLimits
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.parallel.mesh import bytes_on_each
from jaxserve_checkpoints.load import LoadedModel, load_for_engine
from jaxserve_server.engine_process import ReadyEngine
from jaxserve_server.startup_log import log_compiled, log_engine_ready, log_kv_cache, log_reuse, log_weights
from jaxserve_server.wire import ModelRead, Start
from pallas_kernels.native.build import load_kernels


def read_weights(start: Start) -> LoadedModel:
    """The model that is asked for, with the line that says so.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it cannot be served as asked.
    """
    model = load_for_engine(start.model, start.engine, dtype=start.dtype, revision=start.revision)
    log_weights(bytes_on_each(model.params), model.seconds, start.engine.tensor_parallel_size)
    return model


def model_read(model: LoadedModel) -> ModelRead:
    """What the server needs to know of the model."""
    return ModelRead(str(model.folder), model.config, dict(model.generation_defaults))


def log_engine(start: Start, limits: EngineLimits, kv_bytes: int, init_s: float) -> None:
    """Says what an engine holds, and how long it took to begin."""
    log_kv_cache(
        device=jax.default_backend().upper(),
        num_bytes=kv_bytes // limits.tensor_parallel_size,
        num_tokens=limits.num_kv_tokens,
        max_model_len=limits.max_model_len,
        concurrency=limits.max_concurrency,
    )
    log_reuse(
        prefix_caching=start.engine.enable_prefix_caching,
        num_swap_blocks=limits.num_swap_blocks,
        num_swap_bytes=limits.num_swap_blocks * kv_bytes // limits.num_blocks,
    )
    log_engine_ready(init_s)


def fingerprint(model: LoadedModel, limits: EngineLimits) -> str:
    """Names what the tokens depend on: our version, the weights, and how sums are rounded.

    In exact mode that is the dtypes, the tiles, the kernels, the devices, the backend and its version; else the sizes
    of steps are among it.
    """
    device = jax.devices()[0]
    numerics = f"{model.config.dtype} {limits.kv_dtype} {limits.max_model_len} {limits.kv_tile} {limits.q_tile}"
    numerics += f" over {limits.tensor_parallel_size}" + " stacked" * limits.stacked_layers
    numerics += f" attention {limits.attention}" + " panels" * limits.panels
    if limits.attention == "cpu" or limits.panels:
        numerics += f" {load_kernels(None).key}"  # of those that are loaded already
    if not limits.exact:
        numerics += f" {limits}"
    facts = f"{model.version} {numerics} {device.platform} {device.device_kind} {version('jaxlib')}"
    mode = "exact-" if limits.exact else ""
    return f"jaxserve-{__version__}-{mode}{hashlib.sha256(facts.encode()).hexdigest()[:8]}"


class LocalLaunch:
    """Starts an engine in this process: a `Launch`."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._model: LoadedModel | None = None

    def read_model(self) -> ModelRead:
        self._model = read_weights(self._start)
        return model_read(self._model)

    def finish(self) -> ReadyEngine:
        model, self._model = self._model, None
        assert model is not None, "read_model comes first"
        engine = AsyncEngine(model.config, model.params, self._start.engine)
        engine.start(on_progress=log_compiled)
        log_engine(self._start, engine.limits, engine.kv_bytes, engine.init_s)
        return ReadyEngine(engine, engine.limits, fingerprint(model, engine.limits))

    def abandon(self) -> None:
        self._model = None
