"""Is that worker still there? Asked once for all relays that doubt it; the answer is written down. Read `verdict`."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Literal, TypeAlias

import structlog

from llorch_wire.worker import WorkerHealth
from orchestratord.patience import until_stored
from orchestratord.store.types import RunningTask

if TYPE_CHECKING:
    from orchestratord.house import House

Verdict: TypeAlias = Literal["same", "restarted", "lost"]

FRESH_S = 0.2
"""Sixty-four relays of one worker doubt it at once: they share a probe that is no older."""


class Watch:
    """Probes workers at `/health` before they are declared lost."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._locks: dict[str, asyncio.Lock] = {}
        self._answers: dict[str, tuple[float, WorkerHealth | None]] = {}
        self._log = structlog.get_logger("orchestratord.watch")

    async def verdict(self, task: RunningTask, why: str) -> Verdict:
        """What became of the engine instance that runs the attempt; unless it is the same, the store is told."""
        health = await self._probe(task.worker_url)
        if (
            health is not None
            and health.worker_id == task.worker_id
            and health.instance_id == task.instance_id
            and health.status != "failed"
        ):
            return "same"
        restarted = health is not None and health.worker_id == task.worker_id
        reason = "its engine restarted" if restarted else "it doesn't answer"
        marked = await until_stored(
            lambda: self._house.store.mark_worker_lost(task.worker_id, task.instance_id, f"{why}; {reason}"),
            self._house.observations,
            "mark_worker_lost",
        )
        if marked:
            self._house.observations.count("workers_lost", "instance" if restarted else "probe")
            self._log.warning("worker lost", worker_id=task.worker_id, why=why, found=reason)
        return "restarted" if restarted else "lost"

    async def _probe(self, url: str) -> WorkerHealth | None:
        lock = self._locks.setdefault(url, asyncio.Lock())
        async with lock:
            at, answer = self._answers.get(url, (0.0, None))
            if at and time.monotonic() - at < FRESH_S:
                return answer
            begun = time.monotonic()
            answer = await self._house.client.health(url)
            self._house.observations.measure("probe_s", time.monotonic() - begun)
            self._answers[url] = (time.monotonic(), answer)
        self._forget_idle()
        return answer

    def _forget_idle(self) -> None:
        """Workers come and go with new ports: keep no more than a fleet's worth."""
        if len(self._locks) <= 1024:
            return
        for url in [url for url, lock in self._locks.items() if not lock.locked()]:
            del self._locks[url]
            self._answers.pop(url, None)
