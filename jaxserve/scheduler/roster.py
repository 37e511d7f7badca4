"""`Roster`: rows that take part in a step, and what of them stays as it is while they keep their sequences."""

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
