"""From the options to something that can serve: weights, text tools and a warm engine, put together.

This and `jaxserve.llm` are the two places that do so. Runs in a thread, for seconds to minutes, while the
event loop already answers probes. Knows no HTTP, and no jax unless the engine is to run in this process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxserve.errors import CheckpointError, ConfigError, ParameterError
from jaxserve.text.chat import load_chat_template
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import MAX_BEAM_WIDTH, SamplingParams
from jaxserve_checkpoints.hf_config import generation_defaults
from jaxserve_checkpoints.source import resolve
from jaxserve_server.engine_process import Launch, RemoteLaunch
from jaxserve_server.flags import Options
from jaxserve_server.serving import Limits, Serving
from jaxserve_server.startup_log import log_vocabularies
from jaxserve_server.status import Loaded
from jaxserve_server.wire import Start


def load(options: Options, loop: asyncio.AbstractEventLoop) -> Loaded:
    """Loads, compiles and warms up what `options` ask for, with a line in the log for each part.

    Args:
        loop: the event loop that will serve, which runs in another thread.

    Raises:
        CheckpointError: the model or the tokenizer cannot be read.
        ConfigError: it cannot be served as asked.
        EngineDeadError: the engine's process ended before it was ready.
    """
    launch = launch_engine(options, loop)
    try:
        return _load(options, launch)
    except BaseException:
        launch.abandon()
        raise


def launch_engine(options: Options, loop: asyncio.AbstractEventLoop) -> Launch:
    """Starts the engine in a process of its own, or, if that was asked for, in this one."""
    start = Start(options.model, options.dtype, options.revision, options.engine, options.uvicorn_log_level)
    if not options.disable_frontend_multiprocessing:
        return RemoteLaunch(start, loop)
    from jaxserve_server.engine_start import LocalLaunch  # jax: 1.5 s and 150 MB, which the engine's process has

    return LocalLaunch(start)


def _load(options: Options, launch: Launch) -> Loaded:
    model = launch.read_model()
    text_folder = resolve(options.tokenizer).folder if options.tokenizer else Path(model.folder)
    tokenizer = Tokenizer.from_folder(text_folder)
    log_vocabularies(tokenizer.max_token_id + 1, model.config.vocab_size)
    chat_template = load_chat_template(text_folder, tokenizer, options.chat_template)
    defaults = sampling_defaults(options.generation_config, model.generation_defaults)
    engine, limits, system_fingerprint = launch.finish()
    serving = Serving(
        engine=engine,
        tokenizer=tokenizer,
        chat_template=chat_template,
        model_names=options.served_model_name or model_names(options.model),
        model_config=model.config,
        max_model_len=limits.max_model_len,
        system_fingerprint=system_fingerprint,
        created=int(time.time()),
        default_sampling=defaults,
        limits=Limits(max_beam_width=min(MAX_BEAM_WIDTH, limits.max_num_seqs)),
    )
    return Loaded(serving=serving, engine=engine, max_num_queued_reqs=limits.max_num_queued_reqs)


def model_names(model: str) -> tuple[str, ...]:
    """The names of a model that was given none: a folder's own name, and its path as it was typed (vLLM's)."""
    folder = Path(model).expanduser()
    if not folder.is_dir() or model == "demo":
        return (model,)
    return tuple(dict.fromkeys((folder.resolve().name or model, model)))


def sampling_defaults(source: str, own: Mapping[str, int | float]) -> Mapping[str, int | float]:
    """What `--generation-config` says: the model's `own`, none ("vllm"), or those of another folder.

    Raises:
        CheckpointError: that folder has none.
        ConfigError: a value is out of bounds; every request that leaves the field out would be refused.
    """
    if source == "auto":
        defaults = own
    elif source == "vllm":
        defaults = {}
    elif (Path(source) / "generation_config.json").is_file():
        defaults = generation_defaults(Path(source))
    else:
        raise CheckpointError(
            f"--generation-config: {source} has no generation_config.json. Give 'auto', 'vllm' or a folder with one."
        )
    checked: dict[str, Any] = dict(defaults)
    try:
        SamplingParams(**checked)
    except ParameterError as error:
        raise ConfigError(f"generation_config.json: {error} Correct it, or pass --generation-config vllm.") from error
    return defaults
