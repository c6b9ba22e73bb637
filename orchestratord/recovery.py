"""What heals by itself: tasks of dead replicas are adopted, what time has ended is swept, drained workers are emptied.

Read `Recovery.adopt` and `Recovery.sweep`. Every replica runs both; the store gives each task to one of them.

| race | who wins |
|---|---|
| two replicas adopt | the store: a task is popped once |
| a paused owner wakes after its task was adopted | both read the same generation until `Replicas` ends the first |
| Redis was away, so that every lease looks over | nobody adopts before Redis was healthy for a whole lease |
| worker's lease ended, yet its streams flow | the streams: its relays ask at /health and go on |
| deadline against the end | whichever script runs first |
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import structlog

from orchestratord.stopping import stop_attempt
from orchestratord.store.errors import StoreUnavailableError
from orchestratord.store.types import CancelOutcome, RunningTask

if TYPE_CHECKING:
    from orchestratord.house import House

ADOPT_LIMIT = 64
MAX_ROUNDS = 16


class Recovery:
    """The two periodic loops."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._closing = False
        self._log = structlog.get_logger("orchestratord.recovery")

    def close(self) -> None:
        """Adopt no more; `run_adopting` returns once the present call is answered."""
        self._closing = True

    async def run_adopting(self) -> None:
        """Adopt at the pace of the sweep, until `close`."""
        namesakes = True
        while not self._closing:
            try:
                if self._house.replicas.holds_lease():
                    if namesakes and self._house.settings.replica_id is not None:
                        await self._house.store.readers_lost(self._house.replicas.replica_id)
                    namesakes = False
                    await self.adopt()
            except StoreUnavailableError:
                self._house.observations.count("store_errors", "adopt")
            await asyncio.sleep(self._house.settings.sweep_s)

    async def run_sweeping(self) -> None:
        """Sweep for ever."""
        while True:
            try:
                await self.sweep()
                await self.end_unattended()
                await self.empty_drained()
                await self.tell_migrations()
            except StoreUnavailableError:
                self._house.observations.count("store_errors", "sweep")
            await asyncio.sleep(self._house.settings.sweep_s)

    async def adopt(self) -> int:
        """Take over running attempts whose owner is dead, and attach to them. Raises StoreUnavailableError."""
        adopted = 0
        for _ in range(MAX_ROUNDS):
            tasks = await self._house.store.adopt(self._house.replicas.replica_id, limit=ADOPT_LIMIT)
            for task in tasks:
                self._house.relays.start(task, None)
            adopted += len(tasks)
            if len(tasks) < ADOPT_LIMIT:
                break
        if adopted:
            self._log.info("adopted", tasks=adopted, replica_id=self._house.replicas.replica_id)
        return adopted

    async def tell_migrations(self) -> None:
        """One line of the fleet feed for all that a worker's tasks went through since the last one."""
        migrations, self._house.migrations = self._house.migrations, Counter()
        for (worker_id, reason), count in migrations.items():
            text = f"{count} task{'s' if count > 1 else ''} sent back: {reason}"
            await self._house.store.fleet_event("tasks_migrated", worker_id, text)

    async def sweep(self) -> None:
        """Retries that are due, deadlines that passed, workers that fell silent. Raises StoreUnavailableError."""
        house = self._house
        report = await house.store.sweep()
        house.observations.count("deadlines_missed", "queued", report.expired_queued)
        for task in report.expired_running:
            house.observations.count("deadlines_missed", "running")
            self.stop(task, "deadline")
        for worker_id in report.workers_lost:
            house.observations.count("workers_lost", "lease")
            self._log.warning("worker lost", worker_id=worker_id, why="no heartbeat within its lease")
        if report.retried:
            house.wake_dispatcher(None)

    async def end_unattended(self) -> None:
        """End what nobody came back to read after its reader's replica had gone. Raises StoreUnavailableError.

        Readers can't come back while Redis is away: the grace begins anew after that.
        """
        house = self._house
        grace_s = house.settings.reader_grace_s
        for task_id, over in await house.store.unattended(round(grace_s * 1000)):
            if house.followers.is_followed(task_id):
                await house.store.attend(task_id, None, house.replicas.replica_id)
            elif over and house.store.healthy_for_s() >= grace_s:
                outcome = await house.store.cancel(task_id, None, abandoned=True)
                if outcome is not None:
                    self.cancelled(task_id, outcome)

    def cancelled(self, task_id: str, outcome: CancelOutcome) -> None:
        """What else a cancelled task's end asks for: its run stopped, its readers told."""
        house = self._house
        if outcome.changed:
            house.observations.count("cancellations", "running" if outcome.running else "queued")
            house.fleet.book.forget(task_id)
            house.followers.kick(task_id)
        if outcome.running is not None:
            self.stop(outcome.running, "cancel")

    def stop(self, task: RunningTask, reason: str) -> None:
        """End an attempt whose log is sealed: its relay here, its run at the worker, its readers' wait."""
        house = self._house
        house.relays.stop(task.task_id, task.attempt)
        house.followers.kick(task.task_id)
        house.spawn(self._stop(task, reason), name=f"stop {task.task_id}:{task.attempt}")

    async def _stop(self, task: RunningTask, reason: str) -> None:
        stopped = await stop_attempt(self._house, task, "deadline" if reason == "deadline" else "cancel")
        if not stopped:
            self._log.warning("worker didn't confirm a stop", task_id=task.task_id, worker_id=task.worker_id)
        self._house.wake_dispatcher(task.model)

    def move(self, task: RunningTask) -> None:
        """Let an attempt yield, to go on at another worker; its relay, here or elsewhere, sends it back."""
        self._house.spawn(self._yield(task), name=f"move {task.task_id}:{task.attempt}")

    async def empty_drained(self) -> None:
        """Let what still runs on a worker whose drain deadline has passed yield, to go on elsewhere."""
        house = self._house
        now_ms = house.now_ms()
        for view in await house.fleet.workers():
            deadline = view.drain_deadline_at_ms
            if view.state != "draining" or deadline is None or now_ms < deadline:
                continue
            for relay in house.relays.of_worker(view.worker_id):
                if relay.drained or relay.settling:
                    continue
                relay.drained = True
                self.move(relay.task)

    async def _yield(self, task: RunningTask) -> None:
        await self._house.client.cancel(task.worker_url, task.task_id, task.attempt, "preempt", task.correlation_id)
