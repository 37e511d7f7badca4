"""Parameters as an Orbax checkpoint: saved once, restored straight to a mesh's shardings.

Owns the folder `params/` of a converted checkpoint. Which files may be believed is `manifest`'s business;
what the arrays mean is the spec tree's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxserve.config import ModelConfig
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.models.params import decoder_specs
from jaxserve.parallel.rules import placements_on, shardings
from jaxserve.parallel.specs import ArraySpec, abstract_arrays, is_spec, map_specs
from jaxserve_checkpoints import hf_config
from jaxserve_checkpoints.manifest import Manifest
from jaxserve_checkpoints.source import PARAMS_FOLDER
from jaxserve_checkpoints.stacking import LayerStacks

# A device reads whole chunks, so an array that is cut over a mesh wants several.
CHUNK_BYTES = 64 * 2**20


def save(folder: Path, params: Any) -> None:
    """Writes `params` to `folder/params`, which must not exist."""
    # Imported here and below: it takes half a second that a Hugging Face folder need not pay.
    import orbax.checkpoint as ocp

    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / PARAMS_FOLDER).absolute(), params, save_args=save_args)


def restore(folder: Path, config: ModelConfig, mesh: Mesh | None, manifest: Manifest, *, stacked: bool = False) -> Any:
    """The tree of `decoder_specs` over any mesh, whatever the arrays were saved from; each device reads its own part.

    Where several devices hold copies of one kv head, each reads that head's queries whole and keeps its share.

    Args:
        mesh: None is the first local device.
        stacked: the layers, which lie in the files one by one, in one array each. They are read so: beside the
            parameters the devices hold one layer.

    Raises:
        CheckpointError: arrays that are not those of the configuration.
    """
    stored = decoder_specs(config)
    if (wanted := shapes(stored)) != manifest.parameters:
        changed = sorted(name for name in wanted if manifest.parameters.get(name) != wanted[name])
        raise CheckpointError(
            f"The converted parameters are not those of config.json: {len(wanted)} arrays are wanted and "
            f"{len(manifest.parameters)} are there; first difference: {(changed or ['a surplus array'])[0]}. "
            "Convert the model again."
        )
    if not stacked:
        return _restore(folder, config, mesh, lambda path: True)
    params, stacks = _restore(folder, config, mesh, lambda path: path[0].key != "layers"), LayerStacks(config, mesh)
    for number in range(config.num_layers):
        layer = _restore(folder, config, mesh, lambda path, own=number: path[0].key == "layers" and path[1].idx == own)
        for name, array in layer["layers"][number].items():
            stacks.put(number, name, array)
    return params | {"layers": stacks.arrays}


def _restore(folder: Path, config: ModelConfig, mesh: Mesh | None, is_wanted: Callable[[Any], bool]) -> Any:
    """The tree, with the arrays whose path is wanted and nothing in the place of the others."""
    stored = decoder_specs(config)
    if mesh is None:
        return _read(folder, stored, placements_on(None, stored), is_wanted)
    specs = decoder_specs(config, mesh.size)
    if config.num_kv_heads >= mesh.size:
        return _read(folder, specs, shardings(specs, mesh), is_wanted)
    heads = Mesh(mesh.devices.reshape(config.num_kv_heads, -1), ("kv", "copy"))

    def readable(spec: ArraySpec, on_one: ArraySpec) -> ArraySpec:
        return on_one if "kv_heads" in spec.axes else spec

    def placed(spec: ArraySpec) -> Sharding:
        return NamedSharding(heads, _HEAD_PARTS[spec.axes]) if "kv_heads" in spec.axes else shardings(spec, mesh)

    found = jax.tree.map(readable, specs, stored, is_leaf=is_spec)
    read = _read(folder, found, map_specs(placed, found), is_wanted)
    return jax.tree.map(lambda spec, array: _shared_out(spec, array, mesh), specs, read, is_leaf=is_spec)


# What of its kv head a device reads: of qkv [K, G + 2, H, D] and its bias all, of o [D, K, G, H] its own queries'.
_HEAD_PARTS: Mapping[tuple[str | None, ...], PartitionSpec] = MappingProxyType(
    {
        ("kv_heads", None, "head_dim", "embed"): PartitionSpec("kv"),
        ("kv_heads", None, "head_dim"): PartitionSpec("kv"),
        ("embed", "kv_heads", None, "head_dim"): PartitionSpec(None, "kv", "copy"),
    }
)


def _shared_out(spec: ArraySpec, array: jax.Array, mesh: Mesh) -> jax.Array:
    """What devices read of kv heads that several hold, as the array of one kv head a device."""
    if "kv_heads" not in spec.axes or not isinstance(array, jax.Array):
        return array
    parts = {shard.device: shard.data for shard in array.addressable_shards}
    if spec.axes[0] == "kv_heads":  # queries first, the head's key and value behind them
        num_queries = array.shape[1] - 2
        own, copies = spec.shape[1] - 2, num_queries // (spec.shape[1] - 2)
        for place, device in enumerate(mesh.devices.flat):
            first, part = place % copies * own, parts[device]
            parts[device] = jnp.concatenate([part[:, first : first + own], part[:, num_queries:]], axis=1)
    ordered = [parts[device] for device in mesh.devices.flat]
    return jax.make_array_from_single_device_arrays(spec.shape, shardings(spec, mesh), ordered)


def _read(folder: Path, specs: Any, placements: Any, is_wanted: Callable[[Any], bool]) -> Any:
    import orbax.checkpoint as ocp

    abstract = jax.tree.map_with_path(
        lambda path, array: array if is_wanted(path) else ocp.PLACEHOLDER, abstract_arrays(specs, placements)
    )
    # Not strict: what pads a vocabulary is not stored, and is made of zeros. Shapes have been compared.
    how = ocp.checkpoint_utils.construct_restore_args(abstract)
    how = jax.tree.map(lambda arg: replace(arg, strict=False) if hasattr(arg, "strict") else arg, how)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            wanted = ocp.args.PyTreeRestore(item=abstract, restore_args=how)
            return checkpointer.restore((folder / PARAMS_FOLDER).absolute(), args=wanted)
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
