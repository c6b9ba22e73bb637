"""Is that worker still there? Asked once for all relays that doubt it; the answer is written down. Read `verdict`."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import structlog

from llorch_wire.worker import WorkerHealth
from orchestratord.patience import all_of, backoff_ms, until_stored
from orchestratord.store.errors import StoreUnavailableError
from orchestratord.store.types import RunningTask, WorkerView

if TYPE_CHECKING:
    from orchestratord.house import House

Verdict: TypeAlias = Literal["same", "restarted", "lost"]

LOOK_AGAIN_S = 0.5
MAX_ASKED = 64
"""Unreachable workers that are asked side by side."""
FRESH_S = 0.2
"""Sixty-four relays of one worker doubt it at once: they share a probe that is no older."""


class _Lost(NamedTuple):
    """A lost worker as it was looked at last: its lease then, and when it may be asked again."""

    lease_expires_at_ms: int
    due_at: float
    times: int = 0


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
            lambda: self._house.store.mark_worker_lost(
                task.worker_id, task.instance_id, f"{why}; {reason}", unreachable=not restarted
            ),
            self._house.observations,
            "mark_worker_lost",
        )
        if marked:
            self._house.observations.count("workers_lost", "instance" if restarted else "probe")
            self._log.warning("worker lost", worker_id=task.worker_id, why=why, found=reason)
        return "restarted" if restarted else "lost"

    async def run_looking_again(self) -> None:
        """Bring back workers that heartbeat but were found unreachable, once they answer; for ever."""
        lost: dict[str, _Lost] = {}
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            try:
                lost = await self._look_again_at_all(lost)
            except StoreUnavailableError:
                self._house.observations.count("store_errors", "worker_answers")

    async def _look_again_at_all(self, before: dict[str, _Lost]) -> dict[str, _Lost]:
        now = time.monotonic()
        views = [view for view in await self._house.fleet.workers() if view.state == "lost"]
        lost = {view.worker_id: before.get(view.worker_id) or _Lost(view.lease_expires_at_ms, now) for view in views}
        asked: list[WorkerView] = []
        for view in views:
            seen = lost[view.worker_id]
            # A lease that moves on is a heartbeat, whatever this machine's clock says.
            if view.lease_expires_at_ms != seen.lease_expires_at_ms and seen.due_at <= now and len(asked) < MAX_ASKED:
                asked.append(view)
                pause_s = backoff_ms(seen.times, first_ms=500, longest_ms=5_000) / 1000
                lost[view.worker_id] = _Lost(view.lease_expires_at_ms, now + pause_s, seen.times + 1)
        await all_of([self._look_again(view) for view in asked])
        return lost

    async def _look_again(self, worker: WorkerView) -> None:
        health = await self._probe(worker.url)
        if health is None or health.worker_id != worker.worker_id or health.instance_id != worker.instance_id:
            return
        if await self._house.store.worker_answers(worker.worker_id, worker.instance_id):
            self._log.info("worker back", worker_id=worker.worker_id)

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
