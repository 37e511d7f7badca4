"""`Stream`: one caller's end of a request, in the caller's event loop.

What whoever serves `AsyncEngineLike` hands its callers, be the step loop a thread or another process. Free of
jax: a process that only talks to an engine imports it too.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from jaxserve.errors import JaxserveError
from jaxserve.types import Delta, FinishReason

ENDS_ALL: tuple[FinishReason, ...] = ("error", "abort")  # a delta with one of these is the request's last

Item = Delta | JaxserveError | None  # None: nothing follows


@dataclass(slots=True, eq=False)
class Stream:
    """Belongs to the caller's event loop; others only carry it.

    Attributes:
        num_open: continuations without a finish_reason.
        items: what came and was not read.
    """

    request_id: str
    num_open: int
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    items: deque[Item] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def done(self) -> bool:
        return self.num_open <= 0

    def put(self, item: Item) -> None:
        """In the event loop's thread."""
        self.items.append(item)
        self.wake.set()

    async def more(self) -> bool:
        """Waits for an item. False: none follows."""
        if self.done:
            return False
        if not self.items:
            self.wake.clear()
            await self.wake.wait()
        return True

    def take(self) -> Delta | None:
        """The next item; None where it only says that nothing follows.

        Raises:
            JaxserveError: the item, or the one in its delta.
        """
        item = self.items.popleft()
        if item is None or isinstance(item, JaxserveError) or item.finish_reason in ENDS_ALL:
            self.num_open = 0
        elif item.finish_reason is not None:
            self.num_open -= 1
        error = item.error if isinstance(item, Delta) else item
        if error is not None:
            raise error
        assert item is None or isinstance(item, Delta)
        return item
