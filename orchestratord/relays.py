"""Every relay of this process: started for a claim or an adoption, found by task, stopped together. Read `start`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from orchestratord.outcomes import Disowned, Faulted, Outcome, TurnedAway, Vanished
from orchestratord.relay import Relay, Start
from orchestratord.settle import Settlement
from orchestratord.store.errors import LogGapError
from orchestratord.store.types import RunningTask

if TYPE_CHECKING:
    from orchestratord.house import House


class Relays:
    """At most one relay a task: a newer attempt replaces the older one's."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._settlement = Settlement(house)
        self._running: dict[str, tuple[Relay, asyncio.Task[None] | None]] = {}
        self._closing = False
        self._log = structlog.get_logger("orchestratord.relays")

    def __len__(self) -> int:
        return len(self._running)

    def has(self, task_id: str) -> bool:
        """Whether this process relays the task."""
        return task_id in self._running

    def of_worker(self, worker_id: str) -> list[Relay]:
        """Relays of one worker's attempts."""
        return [relay for relay, _ in self._running.values() if relay.task.worker_id == worker_id]

    def start(self, task: RunningTask, start: Start | None) -> None:
        """Relay an attempt that this replica owns; None attaches to what runs already."""
        current = self._running.get(task.task_id)
        if current is not None and current[0].task.attempt >= task.attempt:
            return
        if self._closing:
            return  # hand_over covers it: the store knows this replica as its owner
        self.stop(task.task_id)
        relay = Relay(self._house, task, start)
        self._running[task.task_id] = (relay, None)
        self._house.observations.relays_active = len(self._running)
        self._house.followers.relayed_here(task.task_id, True)
        self._house.spawn(self._run(relay), name=f"relay {task.task_id}:{task.attempt}")

    def stop(self, task_id: str, attempt: int | None = None) -> bool:
        """End a relay quietly; the generation at the worker is not touched. True if there was one."""
        current = self._running.get(task_id)
        if current is None or (attempt is not None and current[0].task.attempt != attempt):
            return False
        relay, runner = current
        relay.stopped = True
        if runner is not None:
            runner.cancel()
        self._remove(relay)
        return True

    def attempts(self) -> list[tuple[str, int]]:
        """(task_id, attempt) of every relay."""
        return [(task_id, relay.task.attempt) for task_id, (relay, _) in self._running.items()]

    def stop_disowned(self, task_id: str, attempt: int) -> bool:
        """End a relay that still reads although the store names another owner, or none."""
        current = self._running.get(task_id)
        if current is None or current[0].settling:
            return False  # it is just writing how the attempt ended
        return self.stop(task_id, attempt)

    def close(self) -> None:
        """No new relays, and end all there are; their generations go on for whoever adopts them."""
        self._closing = True
        for task_id in list(self._running):
            self.stop(task_id)

    async def _run(self, relay: Relay) -> None:
        """relay → settle. A relay that was stopped settles nothing."""
        task = relay.task
        if self._running.get(task.task_id, (None, None))[0] is not relay:
            return
        self._running[task.task_id] = (relay, asyncio.current_task())
        try:
            while not await self._relayed_and_settled(relay):
                pass
        finally:
            self._remove(relay)

    async def _relayed_and_settled(self, relay: Relay) -> bool:
        """False when the log turned out to lack what was relayed already: a failover undid it, and it goes again."""
        outcome = await self._outcome(relay)
        if relay.stopped:
            return True
        relay.settling = True
        try:
            await self._settlement.settle(relay, outcome)
        except LogGapError as gap:
            self._log.warning("the log is behind", task_id=relay.task.task_id, tokens=gap.expected_index)
            relay.settling = False
            relay.rewind(gap.expected_index)
            return False
        return True

    async def _outcome(self, relay: Relay) -> Outcome:
        try:
            outcome = await relay.run()
        except Exception as error:  # a bug here must not leave the task running for ever
            self._log.error("relay failed", task_id=relay.task.task_id, exc_info=error)
            return Faulted("the orchestrator failed while relaying it")
        self._report(relay, outcome)
        return outcome

    def _report(self, relay: Relay, outcome: Outcome) -> None:
        if relay.adopted:
            lost = isinstance(outcome, Vanished | TurnedAway | Disowned) or not relay.delivered
            self._house.observations.count("adoptions", "requeued" if lost else "reattached")

    def _remove(self, relay: Relay) -> None:
        task_id = relay.task.task_id
        if self._running.get(task_id, (None, None))[0] is not relay:
            return
        del self._running[task_id]
        self._house.observations.relays_active = len(self._running)
        self._house.followers.relayed_here(task_id, False)
