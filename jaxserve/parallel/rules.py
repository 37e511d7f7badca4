"""Which mesh axis each logical axis of an `ArraySpec` is cut over. One table; models know nothing of meshes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxserve.config import ModelConfig
from jaxserve.errors import ConfigError
from jaxserve.parallel.specs import ArraySpec, map_specs

MESH_AXIS = "tp"
# Axes that are not named here are whole on every device.
MESH_AXES: Mapping[str, str] = MappingProxyType({"vocab": MESH_AXIS, "ffn": MESH_AXIS, "kv_heads": MESH_AXIS})


def check_divides(config: ModelConfig, num_devices: int) -> None:
    """Whether a model can be cut over so many devices.

    The vocabulary is padded; kv heads are copied where there are fewer of them than devices.

    Raises:
        ConfigError: its heads or its feed-forward width do not divide.
    """
    if _divides(config, num_devices):
        return
    sizes = [size for size in range(1, config.num_heads + 1) if _divides(config, size)]
    raise ConfigError(
        f"tensor_parallel_size={num_devices} does not divide this model: it has {config.num_heads} query heads, "
        f"{config.num_kv_heads} kv heads and a feed-forward width of {config.intermediate_size}. "
        f"Choose one of {', '.join(map(str, sizes))}."
    )


def _divides(config: ModelConfig, num_devices: int) -> bool:
    few, many = sorted((config.num_kv_heads, num_devices))
    return not (many % few or config.num_heads % num_devices or config.intermediate_size % num_devices)


def partition_spec(spec: ArraySpec) -> PartitionSpec:
    """The mesh axis, or None, of each dimension of `spec`."""
    return PartitionSpec(*(MESH_AXES.get(axis) if axis else None for axis in spec.axes))


def shardings(specs: Any, mesh: Mesh) -> Any:
    """A tree of NamedSharding for a tree of ArraySpec.

    Raises:
        ConfigError: a dimension does not divide by the mesh axis that it is cut over.
    """
    return map_specs(lambda spec: _sharding(spec, mesh), specs)


def placements_on(mesh: Mesh | None, specs: Any) -> Any:
    """A tree of shardings for a tree of ArraySpec: over a mesh, or on the first local device."""
    if mesh is not None:
        return shardings(specs, mesh)
    only = SingleDeviceSharding(jax.local_devices()[0])
    return map_specs(lambda spec: only, specs)


def _sharding(spec: ArraySpec, mesh: Mesh) -> NamedSharding:
    partition = partition_spec(spec)
    for size, logical, axis in zip(spec.shape, spec.axes, partition, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(
                f"{logical}={size} cannot be divided over {mesh.shape[axis]} devices. "
                f"Choose a number of devices that divides {size}."
            )
    return NamedSharding(mesh, partition)
