"""Rows a few at a time, up to the last that anybody wants: what a program of many rows costs is then what it is fed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def past_last(wanted: Bool[Array, " rows"]) -> Int[Array, ""]:
    """How many rows, at the beginning, hold all that are wanted; others may stand among them."""
    return jnp.max(jnp.where(wanted, jnp.arange(1, len(wanted) + 1, dtype=jnp.int32), 0))


def in_tiles(
    function: Callable[..., Any], arrays: tuple[jax.Array, ...], num_wanted: Int[Array, ""], tile: int | None
) -> Any:
    """function(*arrays), by tiles of rows.

    Args:
        function: of arrays with any number of rows; a row of what it returns depends on that row alone.
        arrays: [S, ...].
        num_wanted: how many rows, at the beginning, are computed; of the tiles past them zeros come back.
        tile: rows at once; None computes all in one call.
    """
    num_rows = len(arrays[0])
    if tile is None or num_rows <= tile:
        return function(*arrays)

    def cut(start: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.lax.dynamic_slice_in_dim(array, start, tile) for array in arrays)

    def run(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        start, out = carry
        # The last tile begins early enough to be whole: its first rows are computed again, and are the same.
        here = jnp.minimum(start, num_rows - tile)
        place = lambda all_, new: jax.lax.dynamic_update_slice_in_dim(all_, new, here, axis=0)  # noqa: E731
        return start + tile, jax.tree.map(place, out, function(*cut(here)))

    shapes = jax.eval_shape(lambda: function(*cut(jnp.int32(0))))
    none = jax.tree.map(lambda part: jnp.zeros((num_rows, *part.shape[1:]), part.dtype), shapes)
    return jax.lax.while_loop(lambda carry: carry[0] < num_wanted, run, (jnp.int32(0), none))[1]
