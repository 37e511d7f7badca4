"""`Roster`: rows that take part in a step, and what of them stays as it is while they keep their sequences.

`DecodeFront`: the decoding ones, and where they stand.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Roster:
    """Columns of the sequence table for some of its rows, gathered once.

    Decoding rows change only when a sequence enters, ends or gives way. As long as none does, every step takes the
    same roster, and the gathers are spared.

    Attributes:
        num_releases: the table's when this was made. While that stands, all rows are still their sequences'.
        rows: intp[D], distinct.
        generations: int32[D] of the rows.
        sequences: object[D] the rows' Sequences.
        offsets: intp[D] where each row's token ids begin.
        max_total_len, min_stop_len: int32[D].
        stop_ids: int32[W, D] one column a row, padded.
        everyone: bool[D] true.
        all_continue: int8[D] zero: the finish codes of a step in which no sequence ends.
        at: what to index columns of the table with: the rows, or a slice where they are all of a stretch.
    """

    num_releases: int
    rows: np.ndarray
    generations: np.ndarray
    sequences: np.ndarray
    offsets: np.ndarray
    max_total_len: np.ndarray
    min_stop_len: np.ndarray
    stop_ids: np.ndarray
    everyone: np.ndarray
    all_continue: np.ndarray
    at: np.ndarray | slice

    def __post_init__(self) -> None:
        for name in _arrays():
            getattr(self, name).setflags(write=False)

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, keep: np.ndarray) -> Roster:
        """The rows for which `keep`, bool[D], is true, in the same order."""
        parts = {name: getattr(self, name)[..., keep] for name in _arrays()}
        return Roster(self.num_releases, **parts, at=parts["rows"])


@cache
def _arrays() -> tuple[str, ...]:
    return tuple(field.name for field in fields(Roster) if field.name not in ("num_releases", "at"))


class DecodeFront:
    """The rows that decode, where they stand, and which of them are about to open a block.

    As long as no row enters, ends or gives way, a step moves all of them by the same number of tokens: positions are
    those of the step before, and the rows that open a block the same ones every `block_size` tokens.

    Attributes:
        roster: the rows.
        positions: int32[D] of the token that each feeds next, read-only.
        num_steps_left: until one of them gets to its longest.
    """

    __slots__ = ("_num_steps", "_opening", "num_steps_left", "positions", "roster")

    def __init__(self, roster: Roster, positions: np.ndarray, num_steps_left: int) -> None:
        positions.setflags(write=False)
        self.roster = roster
        self.positions = positions
        self.num_steps_left = num_steps_left
        self._num_steps = 0
        self._opening: dict[int, np.ndarray] = {}

    def opening_rows(self, block_size: int) -> np.ndarray:
        """intp[n], read-only: the rows whose next token is the first of a block, where one is missing.

        Args:
            block_size: a power of two, the same in every call.
        """
        phase = self._num_steps % block_size
        rows = self._opening.get(phase)
        if rows is None:
            rows = self._opening[phase] = self._find_opening(block_size)
            rows.setflags(write=False)
        return rows

    def _find_opening(self, block_size: int) -> np.ndarray:
        opens_block = (self.positions & (block_size - 1)) == 0  # a row's blocks hold its computed tokens exactly
        return self.roster.rows[opens_block]

    def advance(self, positions: np.ndarray, num_steps: int) -> None:
        """All rows stand `num_steps` tokens further on, at `positions`; but for those at their longest."""
        positions.setflags(write=False)
        self.positions = positions
        self.num_steps_left -= num_steps
        self._num_steps += num_steps

    def check_integrity(self, block_size: int) -> None:
        """Asserts that the rows which open a block, where they were found before, are those that do now."""
        known = self._opening.get(self._num_steps % block_size)
        assert known is None or np.array_equal(known, self._find_opening(block_size)), "other rows open a block"
