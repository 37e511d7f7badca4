"""Muon for matrices, AdamW for the embedding and the norms."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from jaxserve.models.decoder import Params

MATRIX_RATE = 0.02  # of orthogonalised updates (Jordan, Muon, 2024)
VECTOR_RATE = 3e-3
WEIGHT_DECAY = 0.1
_NUM_IN_AXES = {"qkv": 1, "o": 3, "gate_up": 1, "down": 1}  # layout [in, out] of float32 weights


def _matrix_axes(params: Params) -> Any:
    """For each leaf its (in, out) axes, or None where it is no matrix inside a layer."""

    def axes(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers | None:
        ins = _NUM_IN_AXES.get(getattr(path[-1], "key", ""))
        if ins is None:
            return None
        return MuonDimensionNumbers(tuple(range(ins)), tuple(range(ins, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)


def make_optimizer() -> optax.GradientTransformation:
    """Updates at full learning rate; the training loop scales them by `rate`."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            MATRIX_RATE,
            weight_decay=WEIGHT_DECAY,
            adam_learning_rate=VECTOR_RATE,
            adam_weight_decay=0.0,
            adam_b2=0.98,
            muon_weight_dimension_numbers=_matrix_axes,
        ),
    )


def rate(progress: float, warmup: float = 0.03) -> float:
    """Share of the full learning rate at `progress` of the training (0 to 1): warm-up, then cosine to 0.01."""
    if progress < warmup:
        return max(progress, 1e-3) / warmup
    done = min(1.0, (progress - warmup) / (1 - warmup))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
