"""The devices that one replica of a model runs on."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxserve.errors import ConfigError
from jaxserve.parallel.rules import MESH_AXIS


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh of one axis, "tp", over the first `num_devices` local devices; None takes all.

    The axis is Auto (the compiler places what has no annotation): jax.make_mesh's default is Explicit
    since 0.7.

    Raises:
        ConfigError: there are fewer devices than that.
    """
    devices = jax.local_devices()
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        kind = devices[0].platform
        simulate = " XLA_FLAGS=--xla_force_host_platform_device_count=N in the environment simulates N of them."
        raise ConfigError(
            f"{count} devices were asked for, and {len(devices)} {kind} device(s) are there. "
            f"Choose a number between 1 and {len(devices)}.{simulate if kind == 'cpu' else ''}"
        )
    return jax.make_mesh((count,), (MESH_AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count])


def mesh_for(tensor_parallel_size: int) -> Mesh | None:
    """The mesh that a model is loaded to; None for one device, which needs none.

    Raises:
        ConfigError: there are fewer devices than that.
    """
    return None if tensor_parallel_size == 1 else make_mesh(tensor_parallel_size)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the arrays (or ShapeDtypeStructs) of a tree lie on; None where they lie on one device."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
        return sharding.mesh
    return None


def first_device(params: Any, tensor_parallel_size: int) -> Any:
    """The first of the devices that parameters lie on; None for jax's own first one.

    Raises:
        ConfigError: they lie on another number of devices.
    """
    mesh = mesh_of(params)
    num_devices = 1 if mesh is None else mesh.size
    if num_devices != tensor_parallel_size:
        raise ConfigError(
            f"The parameters lie on {num_devices} device(s) and tensor_parallel_size={tensor_parallel_size}. "
            f"Load them with load_model(..., mesh=make_mesh({tensor_parallel_size}))."
        )
    return None if mesh is None else mesh.devices.flat[0]


def bytes_on_each(tree: Any) -> int:
    """Bytes that the arrays (or ShapeDtypeStructs) of a tree take on each of the devices that they lie on."""
    return sum(_part_size(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _part_size(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape)
