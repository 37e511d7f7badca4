"""Saves and restores a training state (any tree of arrays) as a flat .npz, so that a run can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np


def save_state(path: Path, tree: Any, counts: dict[str, int]) -> None:
    """Writes the leaves in tree order; the old file stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = {f"leaf_{index:05d}": np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(tree))}
    partial = path.with_suffix(".partial.npz")
    arrays: dict[str, Any] = leaves | {name: np.int64(count) for name, count in counts.items()}
    np.savez(partial, **arrays)
    partial.replace(path)


def load_state(path: Path, like: Any) -> tuple[Any, dict[str, int]]:
    """The saved tree in the structure of `like`, and the counts.

    Raises:
        ValueError: the file belongs to a model or an optimizer of another shape.
    """
    leaves, structure = jax.tree.flatten(like)
    with np.load(path, allow_pickle=False) as file:
        names = sorted(name for name in file.files if name.startswith("leaf_"))
        found = [file[name] for name in names]
        counts = {name: int(file[name]) for name in file.files if not name.startswith("leaf_")}
    if [array.shape for array in found] != [np.shape(leaf) for leaf in leaves]:
        raise ValueError(f"{path} holds {len(found)} arrays of another model. Remove it, or train without --resume.")
    return structure.unflatten([jax.numpy.asarray(array) for array in found]), counts
