"""Dropping finished tasks, with their logs, once they are too old or too many, or Redis' memory too short.

Read `Retention.run` first.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from orchestratord.observations import Observations
from orchestratord.store.store import Store

PAGE = 256
BUDGET_S = 9.0
"""Time for one run, below the jobs' timeout. What is left over waits for the next run."""
YOUNG_S = 60
"""However short memory is, who asked for a task has this long to read it."""


class Retention:
    """Keeps at most `keep_count` finished tasks, none of them longer than `keep_s`; fewer while memory is short, since
    the alternative is to refuse new ones. A task stays until its webhook is delivered or given up."""

    def __init__(
        self,
        store: Store,
        observations: Observations,
        *,
        keep_s: int,
        keep_count: int,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._observations = observations
        self._keep_s = keep_s
        self._keep_count = keep_count
        self._now_s = now_s
        self._early = 0

    async def run(self) -> int:
        """Drop what is due, oldest first; returns how many. Raises StoreUnavailableError."""
        deadline = time.monotonic() + BUDGET_S
        dropped = passed_over = self._early = 0
        while time.monotonic() < deadline:
            due = await self._due(passed_over)
            if not due:
                break
            removed = await self._store.delete_tasks(due)
            dropped += removed
            passed_over += len(due) - removed
        if dropped:
            self._observations.count("tasks_retired", amount=dropped)
            log = structlog.get_logger("orchestratord.jobs")
            log.info("finished tasks dropped", count=dropped)
            if self._early:
                log.warning("finished tasks dropped before their time: Redis is near its maxmemory", count=self._early)
        return dropped

    async def _due(self, skip: int) -> list[str]:
        """The next page, after those that stay for now: their webhooks aren't delivered yet, or another replica is at
        them."""
        now_ms = int(self._now_s() * 1000)
        old = await self._store.finished(now_ms - self._keep_s * 1000, limit=PAGE, skip=skip)
        if old:
            return old
        surplus = await self._store.finished_count() - self._keep_count - skip
        if surplus > 0:
            # By count, whatever the age; a clock that lags behind Redis' must not spare the newest.
            return await self._store.finished(now_ms + 86_400_000, limit=min(surplus, PAGE), skip=skip)
        if not await self._store.is_memory_short():
            return []
        early = await self._store.finished(now_ms - YOUNG_S * 1000, limit=PAGE, skip=skip)
        self._early += len(early)
        return early
