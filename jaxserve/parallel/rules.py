"""Which mesh axis each logical axis of an `ArraySpec` is cut over. One table; models know nothing of meshes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import ConfigError
from jaxserve.parallel.specs import ArraySpec, map_specs

# Axes that are not named here are whole on every device.
MESH_AXES: Mapping[str, str] = MappingProxyType({"vocab": "tp", "ffn": "tp", "kv_heads": "tp"})


def partition_spec(spec: ArraySpec) -> PartitionSpec:
    """The mesh axis, or None, of each dimension of `spec`."""
    return PartitionSpec(*(MESH_AXES.get(axis) if axis else None for axis in spec.axes))


def shardings(specs: Any, mesh: Mesh) -> Any:
    """A tree of NamedSharding for a tree of ArraySpec.

    Raises:
        ConfigError: a dimension does not divide by the mesh axis that it is cut over.
    """
    return map_specs(lambda spec: _sharding(spec, mesh), specs)


def _sharding(spec: ArraySpec, mesh: Mesh) -> NamedSharding:
    partition = partition_spec(spec)
    for size, logical, axis in zip(spec.shape, spec.axes, partition, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(
                f"{logical}={size} cannot be divided over {mesh.shape[axis]} devices. "
                f"Choose a number of devices that divides {size}."
            )
    return NamedSharding(mesh, partition)
