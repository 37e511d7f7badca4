"""Rows in tiles come out as in one call, and those past the last wanted tile are not computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.ops.tiles import in_tiles


@pytest.mark.parametrize(("num_rows", "tile"), [(64, 8), (10, 4), (9, 8), (8, 8), (3, 8), (5, None)])
def test_wanted_rows_are_those_of_one_call(num_rows: int, tile: int | None) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((num_rows, 5), dtype=np.float32))
    ids = jnp.arange(num_rows, dtype=jnp.int32)

    def function(x: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x * 2, ids + 1

    run = jax.jit(lambda num: in_tiles(function, (x, ids), num, tile))
    for num in (0, 1, num_rows // 2, num_rows):
        doubled, counted = run(jnp.int32(num))
        np.testing.assert_array_equal(doubled[:num], 2 * x[:num])
        np.testing.assert_array_equal(counted[:num], ids[:num] + 1)
        assert doubled.shape == x.shape
        assert counted.dtype == jnp.int32


def test_tiles_past_the_last_wanted_row_are_left() -> None:
    seen: list[int] = []

    def function(ids: jax.Array) -> jax.Array:
        jax.debug.callback(lambda first: seen.append(int(first)), ids[0])
        return ids

    for num, tiles in ((0, []), (1, [0]), (4, [0]), (5, [0, 4]), (10, [0, 4, 6])):  # the last one is whole
        seen.clear()
        out = in_tiles(function, (jnp.arange(10, dtype=jnp.int32),), jnp.int32(num), 4)
        jax.effects_barrier()
        assert seen == tiles
        assert not out[tiles[-1] + 4 if tiles else 0 :].any()
