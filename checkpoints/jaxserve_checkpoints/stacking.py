"""Layers that are read one after another, into the arrays that hold all of them.

A layer is read as if it stood alone, by whoever reads it, and then written to its place of arrays that are on the
devices already: what is held beside the model is the layers that are being read, not the model.
"""

from __future__ import annotations

from functools import partial
from threading import Lock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from jaxserve.config import ModelConfig
from jaxserve.models.params import decoder_specs
from jaxserve.parallel.rules import placements_on
from jaxserve.parallel.specs import ArraySpec


class LayerStacks:
    """The stacked layers of one model. Several threads may write at once.

    Args:
        mesh: None is the first local device.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh | None) -> None:
        specs = decoder_specs(config, 1 if mesh is None else mesh.size, stacked=True)["layers"]
        placements = placements_on(mesh, specs)
        self._stacks = {name: _Stack(spec, placements[name]) for name, spec in specs.items()}

    def put(self, number: int, name: str, array: jax.Array) -> None:
        """Writes a layer's array to its place; returns when it is there.

        Args:
            array: as `decoder_specs` has it without `stacked`, over the same devices.
        """
        self._stacks[name].put(number, array)

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """What `decoder_specs(stacked=True)` has under "layers". Layers that were not written are zeros."""
        return {name: stack.array for name, stack in self._stacks.items()}


class _Stack:
    """One array and the program that writes a layer of it in place."""

    def __init__(self, spec: ArraySpec, placement: Sharding) -> None:
        self._lock = Lock()
        self.array: jax.Array = jax.jit(partial(jnp.zeros, spec.shape, spec.dtype), out_shardings=placement)()
        self._write = jax.jit(_write, donate_argnums=0, out_shardings=placement)

    def put(self, number: int, layer: jax.Array) -> None:
        with self._lock:
            self.array = jax.block_until_ready(self._write(self.array, layer, np.int32(number)))


def _write(stack: jax.Array, layer: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer.reshape(stack.shape[1:]), number, 0)
