"""What every part of the store stands on: a connection, Redis' clock, and whether leases may be judged."""

from __future__ import annotations

import time
from typing import Any

from orchestratord.store.connection import Connection


class StoreBase:
    """Holds the connection. See `orchestratord.store.store.Store`."""

    def __init__(self, connection: Connection, *, memory_watermark: float = 0.9) -> None:
        self._connection = connection
        self._memory_watermark = memory_watermark
        self._memory_full = False
        self._memory_read_at: float | None = None
        self._clock_offset_ms: float | None = None

    async def aclose(self) -> None:
        """Closes every connection."""
        await self._connection.aclose()

    def hurry(self, timeout_s: float) -> None:
        """From now on every call, those under way too, gives up after `timeout_s` without an answer."""
        self._connection.hurry(timeout_s)

    async def ping(self) -> None:
        """Raises StoreUnavailableError when Redis doesn't answer."""
        await self._connection.call(self._connection.client.ping)

    def healthy_for_s(self) -> float:
        """Seconds (monotonic) since a command last failed, took longer than a second or met a jump of Redis' clock."""
        return self._connection.healthy_for_s()

    async def _run(self, script: str, *args: str | bytes | int | float) -> Any:
        return await self._connection.run(script, *args)

    async def _run_judging(self, script: str, now_ms: int | None, healthy_ms: int | None, *args: str | int) -> Any:
        """Runs a script that judges leases. Its last two arguments say for how long Redis has been reachable and until
        when, by Redis' clock, this call counts as being in time: one that was held up (a paused Redis, a slow network)
        would find every lease ended, and so would a first one whose clock isn't known yet."""
        healthy = self.healthy_for_s() * 1000 if healthy_ms is None else healthy_ms
        latest = ""
        if now_ms is None:
            offset = self._clock_offset_ms
            latest = "0" if offset is None else str(int(offset + time.monotonic() * 1000 + 1000))
        now, believable, *rest = await self._run(script, moment(now_ms), *args, int(healthy), latest)
        if now_ms is None:
            if not believable and self._clock_offset_ms is not None:
                self._connection.trouble()
            self._clock_offset_ms = int(now) - time.monotonic() * 1000
        return rest


def moment(now_ms: int | None) -> str:
    """Argument of a script: the caller's time, or Redis' own."""
    return "" if now_ms is None else str(now_ms)
