"""`ArraySpec`: what one array of a model or cache is, said once.

Init, shardings, checkpoint loading and memory planning are tree-maps over trees of these
(after the `ArrayInfo` trees of jax-llm-examples).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

Init = Literal["normal", "ones", "zeros"]


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array: shape, dtype, the meaning of each axis, and how it is initialised.

    Attributes:
        axes: a logical axis name (or None) for each dimension; `parallel.rules` maps it to a mesh axis.
        init: "normal" has a standard deviation of 0.02.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    init: Init = "normal"

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def is_spec(x: Any) -> bool:
    return isinstance(x, ArraySpec)


def map_specs(function: Callable[[ArraySpec], Any], specs: Any) -> Any:
    """`function` over every ArraySpec of a tree."""
    return jax.tree.map(function, specs, is_leaf=is_spec)


def abstract_arrays(specs: Any, placements: Any) -> Any:
    """Arrays that are not there: a tree of ShapeDtypeStruct for a tree of ArraySpec and one of shardings."""
    return jax.tree.map(
        lambda spec, placement: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype), sharding=placement),
        specs,
        placements,
        is_leaf=is_spec,
    )


def tree_bytes(specs: Any) -> int:
    return sum(spec.num_bytes for spec in jax.tree.leaves(specs, is_leaf=is_spec))


def init_arrays(specs: Any, key: jax.Array) -> Any:
    """Random arrays for a tree of specs, drawn in one jitted call."""
    leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)

    def make(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, len(leaves))
        return [_init_array(spec, k) for spec, k in zip(leaves, keys, strict=True)]

    return treedef.unflatten(jax.jit(make)(key))


def _init_array(spec: ArraySpec, key: jax.Array) -> jax.Array:
    match spec.init:
        case "normal":
            return (0.02 * jax.random.normal(key, spec.shape, jnp.float32)).astype(spec.dtype)
        case "ones":
            return jnp.ones(spec.shape, spec.dtype)
        case "zeros":
            return jnp.zeros(spec.shape, spec.dtype)
