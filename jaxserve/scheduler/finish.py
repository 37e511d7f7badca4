"""When a sequence ends, and what a step's answer meant.

Owns the finish codes and `StepEvents`. It changes no table. Stop strings are text and end elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxserve.scheduler.roster import Roster
from jaxserve.scheduler.sequences import Request, Sequence
from jaxserve.types import FinishReason

CONTINUES, STOP, LENGTH, ERROR = range(4)
FINISH_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length", "error")  # by finish code


@dataclass(frozen=True, slots=True)
class BeamAnswer:
    """What the device says of a step's beams; rows in the order of `plan.sampled_rows`, those of others ignored.

    Attributes:
        parents: int32[S] the row whose beam each row's beam now continues.
        scores: float32[S] the new beam's sum of logprobs.
        stop_tokens: int32[S, 16] of each row's beam before the step, its likeliest stop tokens; -1 pads.
        stop_scores: float32[S, 16] the sums of logprobs with them, descending; -inf pads.
    """

    parents: np.ndarray
    scores: np.ndarray
    stop_tokens: np.ndarray
    stop_scores: np.ndarray


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished sequence of a beam search.

    Attributes:
        token_ids: its output.
        cumulative_logprob: sum of the tokens' logprobs.
        score: what it is ranked by.
        reason: "stop" or "length".
        stop_reason: the request's stop id that ended it; None for the model's end-of-sequence ids.
    """

    token_ids: tuple[int, ...]
    cumulative_logprob: float
    score: float
    reason: FinishReason
    stop_reason: int | None


@dataclass(frozen=True, slots=True)
class Finished:
    """One sequence that ended in a step.

    Attributes:
        index: its place in the step's arrays.
        sequence: which it was.
        reason: "stop", "length" or "error"; with an error all sequences of the request have ended.
        stop_reason: the request's stop id that ended it; None for the model's end-of-sequence ids and
            for other reasons.
        is_last: no sequence of the request is left.
    """

    index: int
    sequence: Sequence
    reason: FinishReason
    stop_reason: int | None
    is_last: bool


class StepEvents(NamedTuple):
    """What a step gave to whom; arrays in the order of the plan's `sampled_rows`, not to be written to.

    Attributes:
        step: the plan's.
        rows: int64[S] rows when the plan was made.
        positions: int32[S] the tokens' positions.
        tokens: int32[S].
        live: bool[S] false where the token is nobody's: the row had been taken away meanwhile, or it is a beam.
        finish_codes: int8[S] index into `FINISH_REASONS`; of an ERROR row the token is worthless.
        sequences: object[S] the Sequence of each row when the plan was committed, live or not.
        finished: the sequences that ended, in the same order; their rows and blocks are free already.
        beams: beam searches that ended, with their hypotheses, the best first. One that failed is in `finished`.
    """

    step: int
    rows: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray
    live: np.ndarray
    finish_codes: np.ndarray
    sequences: np.ndarray
    finished: tuple[Finished, ...]
    beams: tuple[tuple[Request, tuple[Hypothesis, ...]], ...] = ()


def finish_codes(
    roster: Roster, lengths: np.ndarray, tokens: np.ndarray, failed: np.ndarray | None, *, may_end: bool = True
) -> np.ndarray:
    """int8[n]: how each row ends with its newest token. An error goes before a stop, a stop before the length.

    Args:
        roster: n rows, all live.
        lengths: [n] their tokens, the newest included.
        tokens: [n] the newest.
        failed: bool[n] rows whose answer is worthless, or None.
        may_end: false where none can be at its longest.

    Returns: codes, not to be written to.
    """
    at_end = lengths >= roster.max_total_len if may_end else None
    stops = roster.stop_ids == tokens
    some_end = at_end is not None and np.count_nonzero(at_end)
    if not (some_end or np.count_nonzero(stops) or (failed is not None and np.count_nonzero(failed))):
        return roster.all_continue
    codes = np.zeros(len(roster), np.int8)
    if at_end is not None:
        codes[at_end] = LENGTH
    codes[stops.any(axis=0) & (lengths >= roster.min_stop_len)] = STOP
    if failed is not None:
        codes[failed] = ERROR
    return codes
