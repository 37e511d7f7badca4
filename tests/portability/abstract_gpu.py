"""A GPU that is not there, for programs to be lowered for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
from jax._src.mesh import AbstractDevice


@dataclass(frozen=True)
class AbstractGpu(AbstractDevice):
    """What Mosaic GPU and the kernels ask a device for; jax's own abstract device has no compute capability."""

    compute_capability: str


def on_gpu(capability: str) -> AbstractContextManager[Any]:
    """Programs are lowered for a GPU of this compute capability."""
    device = AbstractGpu("abstract GPU", None, "gpu", capability)
    axes = {"axis_names": ("gpu",), "axis_types": (jax.sharding.AxisType.Auto,)}
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), **axes, abstract_device=device))
