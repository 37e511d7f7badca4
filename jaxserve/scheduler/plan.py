"""`StepPlan`: one step's decisions and their effects on memory, as a frozen value.

A decision is a value before it is an effect: `planner` makes a `Decision` from a view, `Scheduler.commit` carries it
out on the tables and returns the `StepPlan`, which has the block ids that came of it; `engine` lays the plan out for
the device, and `Scheduler.digest` takes the device's answer to it. Both can be printed, compared and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


def frozen(values: np.ndarray | Sequence[int], dtype: type = np.int32) -> np.ndarray:
    """The values as a read-only array."""
    array = np.asarray(values, dtype)
    array.setflags(write=False)
    return array


NO_IDS = frozen(())
NO_FLAGS = frozen((), bool)


@dataclass(frozen=True, slots=True, eq=False)
class Admitted:
    """A row that was given to a sequence in this step.

    Attributes:
        row: the row.
        block_ids: int32[m] its whole block table, new blocks included.
        num_stored: its first tokens whose KV lies in those blocks before the step: shared or restored. At most
            one of them, the last, is fed again.
    """

    row: int
    block_ids: np.ndarray
    num_stored: int


@dataclass(frozen=True, slots=True)
class Preempted:
    """A sequence that lost its row in this step, and whether its blocks went to host memory."""

    request_id: str
    index: int
    swapped: bool


class StepPlan(NamedTuple):
    """What one step does. All arrays are int32 (intp or bool where said) and must not be written to.

    A tuple, because one is made in each step: a frozen dataclass of so many fields takes 3.1 instead of 1.4 us.

    The device does, in this order: copies `swap_out_blocks` to host memory, copies blocks for copy-on-write (all
    sources are read before a target is written), restores `swap_in_blocks` from host memory, sets up admitted rows,
    sets the block table entries, and runs the tokens. A block may be source of one and target of a later one of these.
    The tokens are: one for each decode row, then each prefill chunk.

    Attributes:
        step: counts from 0.
        decode_rows: intp[D] rows that feed the token they sampled last, ascending.
        decode_positions: [D] the position of that token.
        num_steps: decode steps that run one after the other, each feeding what the one before sampled. More than 1
            only where nothing but decode rows is fed. A row leaves the loop when its sequence ends.
        prefill_rows: [N] rows whose known tokens are fed, in order of service; a row occurs once.
        prefill_starts: [N] position of the chunk's first token.
        prefill_lens: [N] tokens in the chunk, at least 1.
        prefill_samples: bool[N] whether the chunk reaches the last known token, so that a token is
            sampled after it.
        prefill_stored: bool[N] the chunk is one token whose KV is in its block already (which others may
            share): it is fed for its logits and must not be written again.
        prefill_generations: [N] generation of each of `prefill_rows` when the plan was made; a row whose generation
            has moved on when the answer arrives belongs to somebody else.
        block_rows, block_cols, block_ids: intp[U] entries of block tables that change in this step: table
            [row, col] becomes id. Of rows that were running before; admitted rows bring their whole table.
        copy_from, copy_to: [X] blocks whose content is copied, before any token is written.
        swap_out_blocks, swap_out_slots: [O] blocks whose content goes to a slot of host memory. It must be
            read before this step writes: the blocks may belong to others by then.
        swap_in_slots, swap_in_blocks: [I] slots of host memory whose content comes back into a block.
        admitted: rows that were given to a sequence in this step, in order of admission.
        beam_groups: rows of each beam search whose beams start in this step, in order of the beams.
        preempted: sequences that lost their row and go back to waiting.
    """

    step: int
    decode_rows: np.ndarray
    decode_positions: np.ndarray
    num_steps: int
    prefill_rows: np.ndarray
    prefill_starts: np.ndarray
    prefill_lens: np.ndarray
    prefill_samples: np.ndarray
    prefill_stored: np.ndarray
    prefill_generations: np.ndarray
    block_rows: np.ndarray
    block_cols: np.ndarray
    block_ids: np.ndarray
    copy_from: np.ndarray
    copy_to: np.ndarray
    swap_out_blocks: np.ndarray
    swap_out_slots: np.ndarray
    swap_in_slots: np.ndarray
    swap_in_blocks: np.ndarray
    admitted: tuple[Admitted, ...]
    beam_groups: tuple[tuple[int, ...], ...]
    preempted: tuple[Preempted, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.decode_rows) + int(self.prefill_lens.sum())

    @property
    def sampled_rows(self) -> np.ndarray:
        """[S] rows that get a new token, decode rows first, then prefill rows that sample."""
        if not len(self.prefill_rows):
            return self.decode_rows
        return np.concatenate([self.decode_rows, self.prefill_rows[self.prefill_samples]])

    @property
    def is_empty(self) -> bool:
        """Whether no token is fed."""
        return len(self.decode_rows) == 0 and len(self.prefill_rows) == 0
