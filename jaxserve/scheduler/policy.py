"""Who enters, and who gives way when the blocks run out.

Owns the rules, as pure functions of the tables; it changes nothing. First come, first served:

* A plan serves decode rows first, then prefills and admissions in order of arrival.
* When blocks run out, the youngest row gives way, and takes its old place in the queue.
* A sequence that gave way `MAX_PREEMPTIONS` times is protected from then on: it never gives way again. It is
  admitted only when the whole pool holds all protected rows at their longest, so that none of them ever needs
  another's blocks.

So preemptions a request are bounded, and nothing can deadlock: the protected rows, or where there are none the
oldest row, can take every other row's blocks, and finish with them (`Scheduler.add` refused what the whole pool
cannot hold).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxserve.cache.block_table import BlockTable
from jaxserve.cache.blocks import blocks_for
from jaxserve.errors import ConfigError
from jaxserve.scheduler.sequences import Sequence, SequenceTable

MAX_PREEMPTIONS = 4  # healthy servers see at most 4 a request; 5 is where users call it a livelock


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """The bounds a scheduler works in.

    Attributes:
        num_blocks: KV blocks, the null block included.
        block_size: tokens a block, a power of two.
        max_num_seqs: R, rows of the running batch.
        max_model_len: tokens of the longest sequence.
        max_num_batched_tokens: tokens a step, at least one for each row.
        max_num_queued_reqs: requests that may wait, beside those for which a row is free.
        eos_token_ids: the model's end-of-sequence ids; a stop at one of them has no stop_reason.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_queued_reqs: int = 1024
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        bounds = {"num_blocks": 2, "max_num_seqs": 1, "max_model_len": 1, "max_num_queued_reqs": 1}
        for name, low in bounds.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)}.")
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size must be a power of two, got {self.block_size}. Try 16.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}, so that every running sequence gets a token a step. "
                "Raise the first or lower the second."
            )

    @property
    def max_blocks_per_row(self) -> int:
        return blocks_for(self.max_model_len, self.block_size)


def is_protected(sequences: SequenceTable) -> np.ndarray:
    """bool[R]: rows that never give way."""
    return sequences.active & (sequences.num_preemptions >= MAX_PREEMPTIONS)


def protected_blocks(sequences: SequenceTable, block_size: int) -> int:
    """Blocks that the protected rows hold together when each has reached its longest."""
    return int(blocks_for(sequences.max_total_len[is_protected(sequences)], block_size).sum())


def by_seniority(sequences: SequenceTable, rows: np.ndarray) -> np.ndarray:
    """The rows, protected ones first, then in order of arrival."""
    return rows[np.lexsort((sequences.arrival[rows], ~is_protected(sequences)[rows]))]


def victims(sequences: SequenceTable, table: BlockTable, needy: np.ndarray, shortage: int) -> np.ndarray:
    """The fewest youngest rows that must give way so that the rest has its blocks.

    Rows that are about to end go last, protected ones never.

    Args:
        needy: decode rows that need a block each; one that gives way needs none.
        shortage: how many more they need than are free, at least 1.
    """
    candidates = np.flatnonzero(sequences.active & ~is_protected(sequences))
    order = np.lexsort((-sequences.arrival[candidates], sequences.is_ending()[candidates]))
    candidates = candidates[order]
    assert (table.num_blocks[candidates] >= 1).all(), "a row without blocks has nothing to give"
    relief = np.cumsum(table.num_blocks[candidates] + np.isin(candidates, needy))
    count = int(np.searchsorted(relief, shortage)) + 1
    assert count <= len(candidates), f"{shortage} blocks short and nobody left to give way"
    return candidates[:count]


class Admission:
    """One plan's decisions about the queue's head.

    A sequence enters when the free blocks hold its known tokens, what the running prefills still need for theirs,
    and one more block for it and for each running sequence. Without those for the running ones it would soon have
    to give way: on the workload of `benchmarks/scheduler.py`, with a pool of 40 % of the demand, 30 % more tokens
    are then computed than needed; with them 3 %, at 2 % more steps. When nothing runs the head always enters. A
    protected one enters only where it can stay.

    Args:
        num_free: free blocks when the step's decode rows have theirs.
    """

    def __init__(self, limits: SchedulerLimits, sequences: SequenceTable, table: BlockTable, num_free: int):
        self._limits = limits
        prefilling = sequences.prefill_rows()
        owed = blocks_for(sequences.num_known[prefilling], limits.block_size) - table.num_blocks[prefilling]
        self._spare = num_free - int(owed.sum())
        self._num_running = sequences.num_active
        self._protected = protected_blocks(sequences, limits.block_size)

    def admit(self, sequence: Sequence) -> bool:
        """Whether the sequence enters; if it does, it counts in the next decisions."""
        size = self._limits.block_size
        needed = blocks_for(len(sequence.known_token_ids), size)
        headroom = 1 + self._num_running if self._num_running else 0
        if needed + headroom > self._spare:
            return False
        if sequence.num_preemptions >= MAX_PREEMPTIONS:
            protected = self._protected + blocks_for(sequence.request.max_total_len, size)
            if protected > self._limits.num_blocks - 1:
                return False
            self._protected = protected
        self._spare -= needed
        self._num_running += 1
        return True
