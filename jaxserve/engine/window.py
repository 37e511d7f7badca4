"""`BatchingWindow`: which requests wait a moment so that those which come together start together.

A pure policy: callers pass the clock. One prompt a step reads all weights for its tokens alone; held back for
some milliseconds, the prompts of a burst share them. What runs is never held up.
"""

from __future__ import annotations

from typing import Any, Protocol


class Waiting(Protocol):
    """What the window needs to know of a request."""

    @property
    def request_id(self) -> str: ...

    @property
    def num_open(self) -> int:
        """Rows that it can use."""
        ...

    @property
    def num_prompt(self) -> int: ...

    @property
    def arrival_s(self) -> float: ...


class BatchingWindow:
    """Holds requests in their order of arrival, and lets all go at once.

    Args:
        window_s: the oldest is held no longer than this; 0 holds nobody.
        max_rows: rows of the running batch.
        max_tokens: tokens a step.
    """

    def __init__(self, window_s: float, *, max_rows: int, max_tokens: int) -> None:
        self._window_s = window_s
        self._max_rows, self._max_tokens = max_rows, max_tokens
        self._held: dict[str, Any] = {}
        self._num_tokens = 0
        self.num_rows = 0  # that the held ones can use

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._held

    def hold(self, request: Waiting) -> None:
        self._held[request.request_id] = request
        self._count(request, 1)

    def pull(self, request_id: str) -> Any:
        """Takes one out before its time."""
        request = self._held.pop(request_id)
        self._count(request, -1)
        return request

    def remaining_s(self, now: float) -> float:
        """Seconds until the oldest must go; at least 0."""
        oldest: Waiting = next(iter(self._held.values()))
        return max(oldest.arrival_s + self._window_s - now, 0.0)

    def release(self, now: float, *, num_running: int, num_waiting: int) -> list[Any]:
        """All that are held, oldest first, if they need wait no longer; else none.

        They go when the oldest's time is over, when they fill the rows or the tokens that a step has left, or
        when requests wait for room already: those would not start sooner if these stood back.

        Args:
            now: on the clock of the requests' `arrival_s`.
            num_running: rows in use; each takes a token of a step.
            num_waiting: sequences that wait for rows or blocks.
        """
        if not self._held or not self._is_over(now, num_running, num_waiting):
            return []
        released = list(self._held.values())
        self._held.clear()
        self.num_rows = self._num_tokens = 0
        return released

    def _is_over(self, now: float, num_running: int, num_waiting: int) -> bool:
        return (
            num_waiting > 0
            or self.num_rows >= self._max_rows - num_running
            or self._num_tokens >= self._max_tokens - num_running
            or self.remaining_s(now) == 0.0
        )

    def _count(self, request: Waiting, sign: int) -> None:
        self.num_rows += sign * request.num_open
        self._num_tokens += sign * request.num_prompt
