"""`StepPlan`: one step's decisions, as a frozen value.

A decision is a value before it is an effect: `planner` makes a plan from a view, `Scheduler.commit`
carries it out on the tables, `engine.pack` lays it out for the device, `Scheduler.digest` takes the
device's answer to it. Plans can be printed, compared and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. All arrays are int32 (bool where said) and must not be written to.

    The tokens of the step are, in this order: one token for each decode row, then each prefill chunk.

    Attributes:
        step: counts from 0.
        decode_rows: [D] rows that feed the token they sampled last, ascending.
        decode_positions: [D] the position of that token.
        prefill_rows: [N] rows whose known tokens are fed, in order of service; a row occurs once.
        prefill_starts: [N] position of the chunk's first token.
        prefill_lens: [N] tokens in the chunk, at least 1.
        prefill_samples: bool[N] whether the chunk reaches the last known token, so that a token is
            sampled after it.
        block_rows, block_cols, block_ids: [U] entries of block tables that change in this step: table
            [row, col] becomes id. They hold the new blocks of all rows in the step.
        admitted: rows that were given to a sequence in this step, in order of admission.
        preempted: request ids that lose their row and blocks and go back to waiting.
        generations: [D + N] generation of each row (decode rows first) when the plan was made; a row
            whose generation has moved on when the answer arrives belongs to somebody else.
    """

    step: int
    decode_rows: np.ndarray
    decode_positions: np.ndarray
    prefill_rows: np.ndarray
    prefill_starts: np.ndarray
    prefill_lens: np.ndarray
    prefill_samples: np.ndarray
    block_rows: np.ndarray
    block_cols: np.ndarray
    block_ids: np.ndarray
    admitted: tuple[int, ...]
    preempted: tuple[str, ...]
    generations: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.decode_rows) + int(self.prefill_lens.sum())

    @property
    def sampled_rows(self) -> np.ndarray:
        """[S] rows that get a new token, decode rows first, then prefill rows that sample."""
        return np.concatenate([self.decode_rows, self.prefill_rows[self.prefill_samples]])

    @property
    def is_empty(self) -> bool:
        return len(self.decode_rows) == 0 and len(self.prefill_rows) == 0
