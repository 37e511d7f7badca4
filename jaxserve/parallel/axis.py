"""`Axis`: the devices that a step is spread over, as the code of the step sees them; its collectives are all here.

A step is written for one device's part of the parameters and of the cache. Where parts must meet it asks the axis,
which on one device has nothing to do: then the program is the one that knows of no axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.parallel.rules import MESH_AXIS


@dataclass(frozen=True, slots=True)
class Axis:
    """`size` devices of the mesh axis "tp". With more than one, methods are for use under `jax.shard_map`."""

    size: int = 1

    def sum(self, part: Float[Array, "..."]) -> Float[Array, "..."]:
        """The sum of every device's part, on every device: one all-reduce."""
        return part if self.size == 1 else jax.lax.psum(part, MESH_AXIS)

    def lookup(self, table: Array, ids: Int[Array, " tokens"]) -> Array:
        """The rows [T, D] of a table [V / N, D] that is cut over its first axis: one all-reduce in its own dtype.

        All but one of the numbers that are added are zeros.
        """
        if self.size == 1:
            return table[ids]
        local = ids - jax.lax.axis_index(MESH_AXIS) * len(table)
        is_mine = (local >= 0) & (local < len(table))
        mine = table[jnp.where(is_mine, local, 0)]
        return jax.lax.psum(jnp.where(is_mine[:, None], mine, jnp.zeros((), table.dtype)), MESH_AXIS)

    def pad(self, rows: Array, fill: int = 0) -> Array:
        """`rows` and as many of `fill` as it takes for every device to have the same number of them."""
        missing = -len(rows) % self.size
        if not missing:
            return rows
        return jnp.concatenate([rows, jnp.full((missing, *rows.shape[1:]), fill, rows.dtype)])

    def own(self, rows: Array) -> Array:
        """This device's share of padded rows that all have."""
        if self.size == 1:
            return rows
        num = len(rows) // self.size
        return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(MESH_AXIS) * num, num)

    def own_whole(self, columns: Float[Array, "rows part"], num_columns: int) -> Float[Array, "own columns"]:
        """This device's share of padded rows, whole, where each device has some columns of all: one all-to-all.

        Args:
            num_columns: of a whole row; what is past them is padding.
        """
        if self.size == 1:
            return columns
        return jax.lax.all_to_all(columns, MESH_AXIS, split_axis=0, concat_axis=1, tiled=True)[:, :num_columns]

    def gather(self, own: Array, num_rows: int) -> Array:
        """The rows of all devices, on every device, without what `pad` added: one all-gather."""
        return own if self.size == 1 else jax.lax.all_gather(own, MESH_AXIS, tiled=True)[:num_rows]


ONE_DEVICE = Axis()
