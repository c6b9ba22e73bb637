"""This replica's lease, and what it still owns. Read `Replicas.run` first.

A process that was paused, or cut off from Redis, for longer than its lease may have lost its tasks to another replica.
Nothing it writes can do harm – every script is fenced by the attempt – but it should stop reading what isn't its own.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING

import structlog

from orchestratord.patience import until_stored
from orchestratord.store.errors import StoreUnavailableError

if TYPE_CHECKING:
    from orchestratord.house import House

FRESH_S = 0.3
RECONCILE_S = 2.0


class Replicas:
    """The lease of this process and the list of the others."""

    def __init__(self, house: House) -> None:
        self._house = house
        self.replica_id = house.settings.replica_id or f"r-{uuid.uuid4().hex[:12]}"
        self.urls: tuple[str, ...] = (house.settings.replica_url,)
        self._renewed_at: float | None = None
        self._owned: tuple[float, frozenset[str]] = (0.0, frozenset())
        self._owned_lock = asyncio.Lock()
        self._without_relay: frozenset[str] = frozenset()
        self._log = structlog.get_logger("orchestratord.replicas")

    def holds_lease(self) -> bool:
        """Whether the last renewal is younger than the lease."""
        at = self._renewed_at
        return at is not None and time.monotonic() - at < self._house.settings.replica_lease_ms / 1000

    async def run(self) -> None:
        """Renew for ever; after a gap longer than the lease, let go of what others have adopted."""
        reconciled_at = time.monotonic()
        while True:
            try:
                first = self._renewed_at is None
                if await self._renew() or first or time.monotonic() - reconciled_at >= RECONCILE_S:
                    await self._reconcile(first=first)
                    reconciled_at = time.monotonic()
            except StoreUnavailableError:
                self._house.observations.count("store_errors", "replica_heartbeat")
            await asyncio.sleep(self._house.settings.replica_renew_s)

    async def owns(self, task_id: str) -> bool:
        """Whether the store still calls this replica the owner of a running task. Waits for Redis."""
        asked_at = time.monotonic()
        async with self._owned_lock:
            read_at, owned = self._owned
            if read_at < asked_at - FRESH_S:
                owned = await self._read_owned()
        return task_id in owned

    async def leave(self) -> None:
        """Hand everything over and end the lease. Raises StoreUnavailableError."""
        while await self._house.store.hand_over(self.replica_id):
            pass
        await self._house.store.leave(self.replica_id)

    async def _renew(self) -> bool:
        """True when the lease had ended before this renewal."""
        settings, store = self._house.settings, self._house.store
        lapsed = self._renewed_at is not None and not self.holds_lease()
        await store.replica_heartbeat(self.replica_id, settings.replica_url, settings.replica_lease_ms)
        self._renewed_at = time.monotonic()
        others = [view.url for view in await store.replicas() if view.replica_id != self.replica_id]
        self.urls = (settings.replica_url, *others)
        if lapsed:
            self._log.warning("lease had ended", replica_id=self.replica_id)
        return lapsed

    async def _read_owned(self) -> frozenset[str]:
        read_at = time.monotonic()
        running = await until_stored(
            lambda: self._house.store.owned(self.replica_id), self._house.observations, "owned"
        )
        self._owned = (read_at, frozenset(task.task_id for task in running))
        return self._owned[1]

    async def _reconcile(self, *, first: bool) -> None:
        """Make relays and ownership agree.

        A claim or adoption whose answer was lost leaves a task that nobody relays: seen twice in a row, it is attached;
        at once at the start, when it can only be a namesake's that died. A relay whose task isn't owned here any more
        ends.
        """
        relays = self._house.relays
        before = relays.attempts()
        running = await self._house.store.owned(self.replica_id)
        owned = {task.task_id for task in running}
        self._owned = (time.monotonic(), frozenset(owned))
        for task_id, attempt in before:
            if task_id not in owned and relays.stop_disowned(task_id, attempt):
                self._log.info("relay ended: not its owner any more", task_id=task_id, attempt=attempt)
        missing = frozenset(task_id for task_id in owned if not relays.has(task_id))
        for task in running:
            if task.task_id in missing and (first or task.task_id in self._without_relay):
                relays.start(task, None)
        self._without_relay = missing
