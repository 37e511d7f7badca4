"""`WaitingQueue`: who waits for a row, in line."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise

from jaxserve.scheduler.sequences import Sequence


class WaitingQueue:
    """The waiting sequences in order of arrival. A preempted one returns to the place it had."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def push(self, sequence: Sequence) -> None:
        """Puts it before all later arrivals."""
        self._sequences.insert(self._place(sequence), sequence)

    def remove(self, sequence: Sequence) -> None:
        place = self._place(sequence)
        assert self._sequences[place] is sequence, f"request {sequence.request.request_id} does not wait"
        del self._sequences[place]

    def pop(self, count: int) -> list[Sequence]:
        """Takes the `count` first ones out."""
        first, self._sequences = self._sequences[:count], self._sequences[count:]
        return first

    def _place(self, sequence: Sequence) -> int:
        return bisect_left(self._sequences, sequence.place, key=lambda s: s.place)

    def check_integrity(self) -> None:
        """Asserts the order of arrival, and that nobody here has a row."""
        places = [s.place for s in self._sequences]
        assert all(a < b for a, b in pairwise(places)), f"places {places} out of order"
        assert all(s.row == -1 for s in self._sequences)
