"""Muon for matrices, AdamW for the embedding and the norms."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

MATRIX_RATE = 0.02  # of orthogonalised updates (Jordan, Muon, 2024)
VECTOR_RATE = 3e-3
WEIGHT_DECAY = 0.1
WARMUP_STEPS = 40
PLATEAU_END = 0.6  # share of the time at which the learning rate begins to fall
_NUM_IN_AXES = {"qkv": 1, "o": 3, "gate_up": 1, "down": 1}  # the last ones: matrices are [out, in]


def _matrix_axes(params: Any) -> Any:
    """For each leaf its (in, out) axes, or None where it is no matrix inside a layer."""

    def axes(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers | None:
        ins = _NUM_IN_AXES.get(getattr(path[-1], "key", ""))
        if ins is None:
            return None
        outs = leaf.ndim - ins
        return MuonDimensionNumbers(tuple(range(outs, leaf.ndim)), tuple(range(outs)))

    return jax.tree_util.tree_map_with_path(axes, params)


@cache
def make_optimizer() -> optax.GradientTransformation:
    """Updates at full learning rate; the training loop scales them by `rate`. Cached: jit compiles once per object."""
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


def rate(step: int, progress: float) -> float:
    """Share of the full learning rate: 40 steps of warm-up, a plateau, and linear to 0.02 over the last 40 %.

    A state saved on the plateau can be trained on for any time (Hu et al., MiniCPM, arXiv:2404.06395 §4).
    """
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    decay = min(1.0, max(0.02, (1.0 - progress) / (1.0 - PLATEAU_END)))
    return warmup * decay
