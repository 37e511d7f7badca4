"""What the device is told of beams, and what it answers, as arrays. Arithmetic only; no jax."""

from __future__ import annotations

import numpy as np

from jaxserve.scheduler.finish import BeamAnswer
from jaxserve.scheduler.plan import StepPlan
from jaxserve.state import BEAM, BEAM_COLUMNS
from jaxserve.types import MAX_BEAM_WIDTH


def follow_sizes(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows that `ops.beams.follow_beams` is compiled for: one search of any width, and all rows."""
    return tuple(sorted({min(MAX_BEAM_WIDTH, max_rows), max_rows}))


def pack_group(rows: tuple[int, ...]) -> np.ndarray:
    """The array of `ops.beams.start_beams`."""
    packed = np.full(MAX_BEAM_WIDTH, -1, np.int32)
    packed[: len(rows)] = rows
    return packed


def pack_followers(plan: StepPlan, features: np.ndarray) -> np.ndarray | None:
    """The array of `ops.beams.follow_beams`: the step's beams that continue one. None if it has none.

    Args:
        features: int32 [R] feature bits of each row.
    """
    is_beam = (features[plan.decode_rows] & BEAM) != 0
    num, max_rows = int(np.count_nonzero(is_beam)), len(features)
    if num == 0:
        return None
    size = next(size for size in follow_sizes(max_rows) if size >= num)
    packed = np.zeros((2, size), np.int32)
    packed[0] = max_rows
    packed[0, :num] = plan.decode_rows[is_beam]
    packed[1, :num] = plan.decode_positions[is_beam]
    return packed.reshape(-1)


def unpack_answer(columns: np.ndarray) -> BeamAnswer:
    """What `ops.beams.select_beams` says.

    Args:
        columns: int32 [S, 34].
    """
    assert columns.shape[1] == BEAM_COLUMNS, columns.shape
    floats = columns.view(np.float32)
    return BeamAnswer(
        parents=columns[:, 0],
        scores=floats[:, 1],
        stop_tokens=columns[:, 2 : 2 + MAX_BEAM_WIDTH],
        stop_scores=floats[:, 2 + MAX_BEAM_WIDTH :],
    )
