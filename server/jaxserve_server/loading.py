"""From the options to something that can serve: weights, text tools and a warm engine, put together.

This and `jaxserve.llm` are the two places that do so. Runs in a thread, for seconds to minutes, while the
event loop already answers probes. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxserve import __version__
from jaxserve.config import EngineLimits
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.errors import CheckpointError, ConfigError, ParameterError
from jaxserve.text.chat import load_chat_template
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import MAX_BEAM_WIDTH, SamplingParams
from jaxserve_checkpoints.hf_config import generation_defaults
from jaxserve_checkpoints.load import LoadedModel, load_model
from jaxserve_checkpoints.source import resolve
from jaxserve_server.flags import Options
from jaxserve_server.serving import Limits, Serving
from jaxserve_server.startup_log import (
    log_compiled,
    log_engine_ready,
    log_kv_cache,
    log_reuse,
    log_vocabularies,
    log_weights,
)
from jaxserve_server.status import Loaded


def load(options: Options) -> Loaded:
    """Loads, compiles and warms up what `options` ask for, with a line in the log for each part.

    Raises:
        CheckpointError: the model or the tokenizer cannot be read.
        ConfigError: it cannot be served as asked.
    """
    model = load_model(options.model, dtype=options.dtype, revision=options.revision)
    log_weights(model.num_bytes, model.seconds)
    text_folder = resolve(options.tokenizer).folder if options.tokenizer else model.folder
    tokenizer = Tokenizer.from_folder(text_folder)
    log_vocabularies(tokenizer.max_token_id + 1, model.config.vocab_size)
    chat_template = load_chat_template(text_folder, tokenizer, options.chat_template)
    defaults = sampling_defaults(options.generation_config, model)

    engine = AsyncEngine(model.config, model.params, options.engine)
    engine.start(on_progress=log_compiled)
    limits = engine.limits
    log_kv_cache(
        device=jax.default_backend().upper(),
        num_bytes=engine.kv_bytes,
        num_tokens=limits.num_kv_tokens,
        max_model_len=limits.max_model_len,
        concurrency=limits.max_concurrency,
    )
    log_reuse(
        prefix_caching=options.engine.enable_prefix_caching,
        num_swap_blocks=limits.num_swap_blocks,
        num_swap_bytes=limits.num_swap_blocks * engine.kv_bytes // limits.num_blocks,
    )
    log_engine_ready(engine.init_s)
    serving = Serving(
        engine=engine,
        tokenizer=tokenizer,
        chat_template=chat_template,
        model_names=options.served_model_name or model_names(options.model),
        model_config=model.config,
        max_model_len=limits.max_model_len,
        system_fingerprint=fingerprint(model, limits),
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


def sampling_defaults(source: str, model: LoadedModel) -> Mapping[str, int | float]:
    """What `--generation-config` says: the model's own, none ("vllm"), or those of another folder.

    Raises:
        CheckpointError: that folder has none.
        ConfigError: a value is out of bounds; every request that leaves the field out would be refused.
    """
    if source == "auto":
        defaults = model.generation_defaults
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


def fingerprint(model: LoadedModel, limits: EngineLimits) -> str:
    """Names what the tokens depend on: the code's version, the weights, their dtype and the sizes."""
    facts = f"{model.version} {model.config.dtype} {limits} {jax.default_backend()} {jax.__version__}"
    return f"jaxserve-{__version__}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
