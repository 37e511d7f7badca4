"""When a sequence ends, and what a step's answer meant.

Owns the finish codes and `StepEvents`. It changes no table. Stop strings are text and end elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxserve.scheduler.sequences import Request, SequenceTable
from jaxserve.types import FinishReason

CONTINUES, STOP, LENGTH, ERROR = range(4)
FINISH_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length", "error")  # by finish code


@dataclass(frozen=True, slots=True)
class Finished:
    """One sequence that ended in a step.

    Attributes:
        index: its place in the step's arrays.
        request: whose it was.
        reason: "stop", "length" or "error".
        stop_reason: the request's stop id that ended it; None for the model's end-of-sequence ids and
            for other reasons.
    """

    index: int
    request: Request
    reason: FinishReason
    stop_reason: int | None


@dataclass(frozen=True, slots=True)
class StepEvents:
    """What a step gave to whom; arrays in the order of the plan's `sampled_rows`, not to be written to.

    Attributes:
        step: the plan's.
        rows: int64[S] rows when the plan was made.
        positions: int32[S] the tokens' positions.
        tokens: int32[S].
        live: bool[S] false where the row had been taken away meanwhile: the token is dropped.
        finish_codes: int8[S] index into `FINISH_REASONS`; of an ERROR row the token is worthless.
        requests: object[S] the Request of each row when the plan was committed, live or not.
        finished: the sequences that ended, in the same order; their rows and blocks are free already.
    """

    step: int
    rows: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray
    live: np.ndarray
    finish_codes: np.ndarray
    requests: np.ndarray
    finished: tuple[Finished, ...]


def finish_codes(
    sequences: SequenceTable, rows: np.ndarray, lengths: np.ndarray, tokens: np.ndarray, failed: np.ndarray | None
) -> np.ndarray:
    """int8[n]: how each row ends with its newest token. An error goes before a stop, a stop before the length.

    Args:
        rows: [n] live rows.
        lengths: [n] their tokens, the newest included.
        tokens: [n] the newest.
        failed: bool[n] rows whose answer is worthless, or None.
    """
    codes = (lengths >= sequences.max_total_len[rows]) * np.int8(LENGTH)
    if sequences.stop_width:
        stops = (sequences.stop_ids[: sequences.stop_width].take(rows, axis=1) == tokens).any(axis=0)
        if stops.any():
            codes[stops & (lengths >= sequences.min_stop_len[rows])] = STOP
    if failed is not None:
        codes[failed] = ERROR
    return codes


def finished(
    codes: np.ndarray, requests: np.ndarray, tokens: np.ndarray, eos_token_ids: tuple[int, ...]
) -> tuple[Finished, ...]:
    """Those that end, from arrays of one length."""
    ended = []
    for index in np.flatnonzero(codes).tolist():
        code, token = int(codes[index]), int(tokens[index])
        reason = FINISH_REASONS[code]
        assert reason is not None
        stop_reason = token if code == STOP and token not in eos_token_ids else None
        ended.append(Finished(index, requests[index], reason, stop_reason))
    return tuple(ended)
