"""The latest items of one task, shared by its readers in this process. No I/O. Read `Follower.push` first.

items:  [ base … end )      a reader keeps its own sequence number; one that finds it below `base` fell behind
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from llorch_wire.events import QueuedEvent, StartedEvent
from orchestratord.cursor import Cursor
from orchestratord.values import StreamItem

RING_ITEMS = 2_048


class Follower:
    """The latest items of one task, shared by its readers here."""

    def __init__(self, task_id: str, cursor: Cursor, now: float) -> None:
        self.task_id = task_id
        self.cursor = cursor
        """Where the ring's end is in the log."""
        self.floor = cursor.position
        """Everything after this position is in the ring."""
        self.base = 0
        self.items: list[StreamItem] = []
        self.readers = 0
        self.looked_at = now
        """When something last came, or the log was last looked into."""
        self.woken_at = now
        self.doubted_at = now
        """When something last came, or the log was last asked whether it still leads on from here."""
        self.undone = False
        """A failover has undone what the ring holds: the log has ended before it, is gone, or went on another way."""
        self.relayed_here = False
        self.queue_position: int | None = None
        """Last one told, None once the task has started."""
        self._waiters: set[asyncio.Future[None]] = set()

    @property
    def end(self) -> int:
        """Sequence number of the next item."""
        return self.base + len(self.items)

    def push(self, items: Sequence[StreamItem], now: float) -> None:
        """Items that `cursor` has just passed, or items without a position."""
        if not items:
            return
        for item in items:
            if isinstance(item.event, QueuedEvent):
                self.queue_position = item.event.queue_position
            elif isinstance(item.event, StartedEvent):
                self.queue_position = None
        self.push_tokens(items, now)

    def push_tokens(self, items: Sequence[StreamItem], now: float) -> None:
        """`push` for tokens alone: the hot path."""
        self.looked_at = self.doubted_at = now
        self.items += items
        if len(self.items) >= 2 * RING_ITEMS:  # cut rarely, a half at a time
            self._drop(len(self.items) - RING_ITEMS)
        self.wake(now)

    def wake(self, now: float) -> None:
        """Let every waiting reader look."""
        self.woken_at = now
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def changed(self) -> None:
        """Wait until `wake`."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def _drop(self, count: int) -> None:
        dropped = self.items[:count]
        del self.items[:count]
        self.base += count
        for item in reversed(dropped):
            if item.position is not None:
                attempt, _, number = item.position.partition("-")
                self.floor = (int(attempt), int(number))
                return
