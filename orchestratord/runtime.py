"""The daemon behind its HTTP surface: `Orchestrator` builds the house and runs its loops.

`api/` calls this class and nothing below it. Read `Orchestrator.run` first: it is every long-lived loop in one group.

| race | who wins |
|---|---|
| stop against a claim in flight | hand_over: what was claimed is adoptable, with or without a relay here |
| stop against submit | submit is refused with DRAINING; what was admitted before is in Redis |
| a loop that fails against the others | they go on; it is logged and starts again after a pause |
| Redis away at stop | the lease ends by itself and the others adopt |
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeAlias

from orchestratord.committer import Committer
from orchestratord.dispatcher import Dispatcher
from orchestratord.fleet import FleetView
from orchestratord.fleet_surface import FleetSurface
from orchestratord.followers import CATCHERS, Followers
from orchestratord.house import House
from orchestratord.listening import Listening
from orchestratord.observations import Observations
from orchestratord.patience import end_tasks
from orchestratord.planner import PlanPolicy
from orchestratord.recovery import Recovery
from orchestratord.relays import Relays
from orchestratord.replicas import Replicas
from orchestratord.store.errors import StoreUnavailableError
from orchestratord.store.store import Store
from orchestratord.task_surface import TaskSurface
from orchestratord.values import (
    ModelView,
    PoolView,
    RuntimeSettings,
    RuntimeState,
    StreamItem,
    Submitted,
    TaskView,
    Tenant,
)
from orchestratord.watch import Watch
from orchestratord.worker_client import WorkerClient

__all__ = [
    "ModelView",
    "Orchestrator",
    "PoolView",
    "RuntimeSettings",
    "RuntimeState",
    "StreamItem",
    "Submitted",
    "TaskView",
    "Tenant",
]

_Loop: TypeAlias = asyncio.Task[None]

LOOP_PAUSE_S = 0.5


class Orchestrator(TaskSurface, FleetSurface):
    """Everything between the HTTP API and the store. One a process; one `run()` a life.

    What clients may do is in `TaskSurface`, what workers and operators may do in `FleetSurface`.
    """

    def __init__(
        self, store: Store, settings: RuntimeSettings | None = None, observations: Observations | None = None
    ) -> None:
        s = settings or RuntimeSettings()
        observations = observations or Observations()
        client = WorkerClient(s.worker_key, connect_s=s.connect_s, stall_s=s.stall_s, probe_s=s.probe_s)
        house = House(store, s, observations, client)
        super().__init__(house, Recovery(house))
        house.committer = Committer(store, observations)
        house.fleet = FleetView(house)
        house.followers = Followers(house)
        house.relays = Relays(house)
        house.replicas = Replicas(house)
        house.watch = Watch(house)
        house.spawn = self._spawn
        self._dispatcher = Dispatcher(house, PlanPolicy(age_limit_ms=s.age_limit_ms, preempt=s.preempt))
        house.wake_dispatcher = self._dispatcher.wake
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._stop_deadline_s = 0.0
        self._stop = asyncio.Event()
        self._stopped = asyncio.Event()

    @property
    def replica_id(self) -> str:
        """New at every start, unless the settings name it."""
        return self._house.replicas.replica_id

    @property
    def state(self) -> RuntimeState:
        """`starting` until the first lease, `draining` from the moment `stop` is called."""
        if self._state == "starting" and self._house.replicas.holds_lease():
            self._state = "ready"
        return self._state

    async def run(self) -> None:
        """Every long-lived loop in one task group; returns after `stop`."""
        house = self._house
        try:
            async with house.client, asyncio.TaskGroup() as self._group:
                listening = Listening(house, on_queue=self._dispatcher.hear, on_fleet=self._fleet_news.set)
                lease = self._loop(house.replicas.run, "lease")
                self._loop(house.committer.run, "committer")
                self._loop(listening.run, "hints")
                self._loop(listening.run_subscribing, "subscriptions")
                self._loop(self._recovery.run_sweeping, "sweep")
                adopting = self._loop(self._recovery.run_adopting, "adopt")
                self._loop(house.watch.run_looking_again, "lost workers")
                self._loop(house.followers.run_ticking, "ticks")
                for number in range(CATCHERS):
                    self._loop(house.followers.run_catching, f"catch-up {number}")
                dispatching = self._loop(self._dispatcher.run, "dispatch")
                try:
                    await self._stop.wait()
                    await self._leave(dispatching, adopting, lease)
                finally:
                    self._closed = True
                    await end_tasks(self._tasks)
            self._log.info("stopped", replica_id=self.replica_id)
        finally:
            self._state = "draining"
            self._stopped.set()

    async def stop(self, deadline_s: float) -> None:
        """No new claims, running attempts handed over to other replicas, everything closed within `deadline_s`.

        The generations go on at their workers; another replica, or the next start, attaches to them.
        """
        self._state = "draining"
        self._stop_deadline_s = deadline_s
        self._stop.set()
        if self._group is not None:
            await self._stopped.wait()

    async def ready(self) -> tuple[bool, str]:
        """Whether traffic should come here, and why not."""
        if self.state != "ready":
            return False, self.state
        try:
            await self._store.ping()
        except StoreUnavailableError:
            return False, "Redis doesn't answer"
        return True, "ready"

    # ---- running

    def _loop(self, body: Callable[[], Coroutine[Any, Any, None]], name: str) -> asyncio.Task[None]:
        return self._task(self._guarded_loop(body, name), name)

    async def _guarded_loop(self, body: Callable[[], Awaitable[None]], name: str) -> None:
        """Until the body returns. A loop that fails is logged and begins again: the others, and every stream, go on."""
        while True:
            try:
                await body()
                return
            except Exception as error:
                self._log.error("loop failed", loop=name, exc_info=error)
            await asyncio.sleep(LOOP_PAUSE_S)

    def _spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        if self._group is None or self._closed:
            work.close()
            return
        self._task(self._guarded(work, name), name)

    def _task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        assert self._group is not None
        task = self._group.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _guarded(self, work: Coroutine[Any, Any, None], name: str) -> None:
        try:
            await work
        except Exception as error:
            self._log.error("task failed", work=name, exc_info=error)

    async def _leave(self, dispatching: _Loop, adopting: _Loop, lease: _Loop) -> None:
        """No new claims, end relays and readers, hand over. What Redis doesn't take in time is adopted later."""
        self._dispatcher.close()
        self._recovery.close()
        try:
            async with asyncio.timeout(self._stop_deadline_s):
                # A claim that is on its way must be answered first, or Redis might carry it out after the handing over.
                await asyncio.wait((dispatching, adopting), timeout=self._stop_deadline_s / 2)
                self._house.relays.close()
                self._house.followers.close()
                await self._end_served()
                await end_tasks([lease])
                await self._house.replicas.leave()
        except (TimeoutError, StoreUnavailableError):
            self._log.warning("not handed over: Redis doesn't answer; the lease will end by itself")
