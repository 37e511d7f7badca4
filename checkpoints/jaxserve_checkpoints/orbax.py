"""Parameters as an Orbax checkpoint: saved once, restored straight to a mesh's shardings.

Owns the folder `params/` of a converted checkpoint. Which files may be believed is `manifest`'s business;
what the arrays mean is the spec tree's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.parallel.specs import is_spec
from jaxserve_checkpoints import hf_config
from jaxserve_checkpoints.manifest import Manifest
from jaxserve_checkpoints.source import PARAMS_FOLDER

# A device reads whole chunks, so an array that is cut over a mesh wants several.
CHUNK_BYTES = 64 * 2**20


def save(folder: Path, params: Any) -> None:
    """Writes `params` to `folder/params`, which must not exist."""
    # Imported here and below: it takes half a second that a Hugging Face folder need not pay.
    import orbax.checkpoint as ocp

    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / PARAMS_FOLDER).absolute(), params, save_args=save_args)


def restore(folder: Path, specs: Any, placements: Any, manifest: Manifest) -> Any:
    """The tree of arrays, each device reading its own part.

    Raises:
        CheckpointError: arrays that are not those of the configuration.
    """
    import orbax.checkpoint as ocp

    if (wanted := shapes(specs)) != manifest.parameters:
        changed = sorted(name for name in wanted if manifest.parameters.get(name) != wanted[name])
        raise CheckpointError(
            f"The converted parameters are not those of config.json: {len(wanted)} arrays are wanted and "
            f"{len(manifest.parameters)} are there; first difference: {(changed or ['a surplus array'])[0]}. "
            "Convert the model again."
        )
    abstract = jax.tree.map(
        lambda spec, placement: jax.ShapeDtypeStruct(spec.shape, np.dtype(spec.dtype), sharding=placement),
        specs,
        placements,
        is_leaf=is_spec,
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore((folder / PARAMS_FOLDER).absolute(), abstract)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{PARAMS_FOLDER}/ cannot be restored: {str(error)[:300]}") from error


def read_config(folder: Path, manifest: Manifest, dtype: str) -> ModelConfig:
    """The configuration, in the dtype that the arrays were converted to.

    Raises:
        ConfigError: another dtype is asked for: what is served is what was checked, so it is converted, not cast.
    """
    if dtype not in ("auto", manifest.dtype):
        raise ConfigError(
            f"This checkpoint was converted to {manifest.dtype}; it cannot be served as {dtype}. "
            f"Use --dtype auto, or convert it again with --dtype {dtype}."
        )
    return hf_config.read_config(folder, dtype=manifest.dtype)


def shapes(specs: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each array, or spec, of a tree, by its dotted path."""
    found = jax.tree.leaves_with_path(specs, is_leaf=is_spec)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in found}
