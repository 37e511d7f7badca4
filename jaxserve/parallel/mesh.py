"""`make_mesh`: the devices that one replica of a model runs on."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh

from jaxserve.errors import ConfigError


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
        raise ConfigError(
            f"{count} devices were asked for, and {len(devices)} {devices[0].platform} device(s) are there. "
            f"Choose a number between 1 and {len(devices)}."
        )
    return jax.make_mesh((count,), ("tp",), axis_types=(AxisType.Auto,), devices=devices[:count])
