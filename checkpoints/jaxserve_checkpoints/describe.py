"""What a model is, read without its weights."""

from __future__ import annotations

from pathlib import Path

from jaxserve.config import ModelConfig
from jaxserve_checkpoints import hf_config, manifest, orbax
from jaxserve_checkpoints.source import resolve


def describe_model(name_or_config: str | Path, *, dtype: str = "auto", revision: str | None = None) -> ModelConfig:
    """The configuration of a model.

    Args:
        name_or_config: what `load_model` takes, or a config.json, or a folder that holds one and no weights.
        dtype: of the weights as served; "auto" is what the configuration names.

    Raises:
        UnsupportedModelError: an architecture or feature that is not implemented.
        CheckpointError: anything else that is wrong with it.
    """
    path = Path(name_or_config).expanduser()
    if path.is_file() and path.name == hf_config.CONFIG_FILE:
        return hf_config.read_config(path.parent, dtype=dtype)
    source = resolve(name_or_config, revision=revision, weights=False)
    if source.kind == "converted":
        return orbax.read_config(source.folder, manifest.verify(source.folder), dtype)
    return hf_config.read_config(source.folder, dtype=dtype)
