"""Making a failing history small: events are dropped as long as it fails in the same place."""

from __future__ import annotations

import traceback
from dataclasses import replace

from .history import Event, History, run

Place = tuple[str, str, int]  # exception, file, line


def failure_of(history: History, deep_every: int = 1) -> Place | None:
    """Where the history fails, or None if it does not."""
    try:
        run(history, deep_every)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return type(error).__name__, last.filename, last.lineno or 0
    return None


def shrink(history: History, max_runs: int = 1500) -> History:
    """The history with as few events as bisection finds: a failing one, if `history` fails with every check deep."""
    place = failure_of(history)
    if place is None:
        return history
    events, num_runs = list(history.events), 0

    def fails(some: list[Event]) -> bool:
        return failure_of(replace(history, events=tuple(some))) == place

    size = max(1, len(events) // 2)
    while size and num_runs < max_runs:
        begin, has_changed = 0, False
        while begin < len(events) and num_runs < max_runs:
            shorter = events[:begin] + events[begin + size :]
            num_runs += 1
            if fails(shorter):
                events, has_changed = shorter, True
            else:
                begin += size
        size = size if size == 1 and has_changed else size // 2
    return replace(history, events=tuple(events))
