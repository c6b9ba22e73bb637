"""From queue to worker: snapshot → plan → claim → relay, for every model with waiting tasks. Read `Dispatcher.serve`.

| race | who wins |
|---|---|
| two replicas plan the same queue | the claim that comes first; the other's version is old, it plans again |
| a claim whose answer is lost | it stands; `Replicas` finds the task without a relay and attaches it |
| claim against cancel or deadline | the store: a task is in one place |
| claim against a worker's death | the relay notices and sends the task back |
| two replicas ask batch tasks to yield | both choose the same ones; the worker yields once |
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

import structlog

from orchestratord.plan_history import PlanHistory
from orchestratord.planner import Plan, PlanPolicy, plan
from orchestratord.relay import Start
from orchestratord.store.errors import StoreUnavailableError
from orchestratord.store.types import Claimed, RunningTask, Snapshot

if TYPE_CHECKING:
    from orchestratord.house import House

MAX_PLANS = 8
"""Plans a round and model: more wait for the next round, so that one busy model doesn't hold up the others."""
PER_QUEUE = 16
HEAR_S = (0.005, 0.015)
"""Replicas that all planned at each hint would take turns in finding their plans out of date."""
MAX_FRUITLESS = 3
MIN_PAUSE_S = 0.01
"""After some rounds without a claim: a flood of admissions into full workers must not become a busy loop."""


class Dispatcher:
    """The scheduling loop of one replica."""

    def __init__(self, house: House, policy: PlanPolicy) -> None:
        self._house = house
        self._policy = policy
        self._woken = asyncio.Event()
        self._closing = False
        self._heard = False
        self._look_around = True
        self._named: dict[str, None] = {}
        self._history = PlanHistory()
        self._log = structlog.get_logger("orchestratord.dispatcher")

    def wake(self, model: str | None = None) -> None:
        """Something may be placeable now, in this model or in any."""
        if model is None:
            self._look_around = True
        else:
            self._named[model] = None
        self._woken.set()

    def hear(self) -> None:
        """Some replica changed a queue. It serves it itself; this one looks a moment later, for what is left."""
        if not self._heard:
            self._heard = True
            asyncio.get_running_loop().call_later(random.uniform(*HEAR_S), self._look)

    def _look(self) -> None:
        self._heard = False
        self.wake()

    def close(self) -> None:
        """No new claims; `run` returns once the present one is answered."""
        self._closing = True
        self._woken.set()

    async def run(self) -> None:
        """A round whenever woken, and at least every `dispatch_s`, until `close`."""
        fruitless = 0
        while not self._closing:
            try:
                async with asyncio.timeout(self._house.settings.dispatch_s):
                    await self._woken.wait()
            except TimeoutError:
                self._look_around, fruitless = True, 0
            self._woken.clear()
            try:
                fruitless = 0 if await self.round() else fruitless + 1
            except StoreUnavailableError:
                self._house.observations.count("store_errors", "dispatch")
                self._look_around = True
                fruitless += 1
            if fruitless > MAX_FRUITLESS:
                await asyncio.sleep(MIN_PAUSE_S)

    async def round(self) -> int:
        """Serve the models named, or every one that waits. Returns the tasks claimed. Raises StoreUnavailableError."""
        if self._closing or not self._house.replicas.holds_lease():
            return 0  # what a replica without a lease claims would be adopted at once
        named, self._named = self._named, {}
        claimed = sum([await self.serve(model) for model in named])
        if self._look_around:
            self._look_around = False
            for model in await self._house.store.waiting_models():
                claimed += await self.serve(model)
        return claimed

    async def serve(self, model: str) -> int:
        """Plan and claim until nothing more can be placed."""
        house, total = self._house, 0
        for tries in range(MAX_PLANS):
            if self._closing:
                return total
            begun = time.monotonic()
            snapshot = await house.store.snapshot(model, per_queue=PER_QUEUE)
            decision = await self._plan(snapshot)
            if not decision.assignments:
                self._let_yield(decision)
                return total
            claimed = await house.store.claim(house.replicas.replica_id, model, snapshot.version, decision.assignments)
            for item in claimed:
                self._start(item)
            total += len(claimed)
            house.observations.measure("plan_s", time.monotonic() - begun, model)
            if not claimed:
                house.observations.count("claim_conflicts", model)
                await asyncio.sleep(random.uniform(0, 0.005) * (tries + 1))
                continue
            self._let_yield(decision)  # the claim has shown that the snapshot was still true
            if len(claimed) == len(snapshot.waiting) < PER_QUEUE:
                return total  # no queue was longer than what was seen of it
        self.wake(model)
        return total

    async def _plan(self, snapshot: Snapshot) -> Plan:
        rates = await self._house.fleet.rates(snapshot.model)
        tokens_out = rates.tokens_out if rates and rates.samples else None
        return plan(snapshot, self._policy, self._history.memory(snapshot, time.monotonic(), tokens_out))

    def _start(self, claimed: Claimed) -> None:
        house, task = self._house, claimed.task
        house.relays.start(task, Start(claimed.payload, claimed.resume_token_ids))
        house.followers.kick(task.task_id)
        house.observations.count("attempts_started", task.model)
        self._log.debug(
            "claimed",
            task_id=task.task_id,
            attempt=task.attempt,
            worker_id=task.worker_id,
            correlation_id=task.correlation_id,
        )
        if task.attempt == 1:
            waited_s = max(0, task.claimed_at_ms - task.created_at_ms) / 1000
            house.observations.measure("scheduling_latency_s", waited_s, task.priority)
            verdict = house.fleet.book.settle(task.task_id, task.claimed_at_ms)
            if verdict is not None:
                house.observations.count("forecast_starts", verdict)

    def _let_yield(self, decision: Plan) -> None:
        for task in decision.preemptions:
            self._history.asked(task, time.monotonic())
            self._house.observations.count("preemptions", task.model)
            self._house.spawn(self._yield(task), name=f"preempt {task.task_id}:{task.attempt}")

    async def _yield(self, task: RunningTask) -> None:
        asked = await self._house.client.cancel(
            task.worker_url, task.task_id, task.attempt, "preempt", task.correlation_id
        )
        self._log.info("asked to yield", task_id=task.task_id, worker_id=task.worker_id, confirmed=asked)
