"""Workers, pools, the queue and the fleet's feed, as `api/` deals with them. Read `FleetSurface.heartbeat` first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import msgspec

from llorch_wire.errors import ApiError, ErrorCode
from llorch_wire.worker import (
    AttemptRef,
    Heartbeat,
    HeartbeatReply,
    Orders,
    RegisterReply,
    WorkerHealth,
    WorkerRegistration,
)
from orchestratord.fleet import by_model, by_pool
from orchestratord.house import House
from orchestratord.recovery import Recovery
from orchestratord.store.types import FleetEvent, QueueDepth, WorkerView
from orchestratord.surface import Surface
from orchestratord.values import ModelView, PoolView

PAGE = 1_000


class FleetSurface(Surface):
    """What workers and operators do. Every method raises ApiError, with the code to answer."""

    def __init__(self, house: House, recovery: Recovery) -> None:
        super().__init__(house, recovery)
        self._fleet_news = asyncio.Event()

    async def queue(self) -> list[QueueDepth]:
        """Waiting tasks by model, priority and tenant."""
        return await self._stored(self._store.queue())

    async def models(self) -> list[ModelView]:
        """Every model ever registered."""
        known = await self._stored(self._house.fleet.known_models())
        return by_model(known, await self._stored(self._house.fleet.workers()))

    async def workers(self) -> list[WorkerView]:
        """Every registered worker."""
        return await self._stored(self._house.fleet.workers(fresh=True))

    async def worker(self, worker_id: str) -> WorkerView:
        """One worker. Raises ApiError NOT_FOUND."""
        view = await self._stored(self._store.worker(worker_id))
        if view is None:
            raise _no_worker()
        return view

    async def worker_health(self, worker_id: str) -> WorkerHealth | None:
        """What the worker answers to this replica at its registered address, None when it can't be reached there.

        Raises ApiError NOT_FOUND.
        """
        view = await self.worker(worker_id)
        return await self._house.client.health(view.url)

    async def pools(self) -> list[PoolView]:
        """Workers summed up by pool."""
        return by_pool(await self.workers())

    async def register(self, registration: WorkerRegistration) -> RegisterReply:
        """A worker says that it is there."""
        await self._stored(self._store.register_worker(registration, self._settings.worker_lease_ms))
        self._log.info(
            "worker registered",
            worker_id=registration.worker_id,
            model=registration.model,
            instance_id=registration.instance_id,
        )
        self._house.wake_dispatcher(None)
        return RegisterReply(
            lease_ms=self._settings.worker_lease_ms,
            heartbeat_ms=self._settings.worker_heartbeat_ms,
            replicas=list(self._house.replicas.urls),
        )

    async def heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> HeartbeatReply:
        """A worker says that it is alive. Raises ApiError NOT_FOUND: it must register again."""
        outcome = await self._stored(self._store.heartbeat(worker_id, heartbeat, self._settings.worker_lease_ms))
        if not outcome.known:
            raise ApiError(ErrorCode.NOT_FOUND, "this worker instance is not registered: register again")
        cancel = [AttemptRef(task_id=task_id, attempt=attempt) for task_id, attempt in outcome.cancel]
        return HeartbeatReply(
            orders=Orders(drain=outcome.drain, cancel=cancel),
            replicas=list(self._house.replicas.urls),
            lease_ms=self._settings.worker_lease_ms,
            heartbeat_ms=self._settings.worker_heartbeat_ms,
        )

    async def drain_worker(self, worker_id: str, deadline_ms: int) -> WorkerView:
        """No new work there; what runs finishes, or moves at the deadline. Raises ApiError NOT_FOUND."""
        if not await self._stored(self._store.drain_worker(worker_id, deadline_ms)):
            raise _no_worker()
        self._log.info("worker drains", worker_id=worker_id, deadline_ms=deadline_ms)
        return await self.worker(worker_id)

    async def undrain_worker(self, worker_id: str) -> WorkerView:
        """Take a drained worker back into service. Raises ApiError NOT_FOUND.

        The worker itself says `draining` until its next heartbeat brings it the news; what is returned is its state
        from then on. One that drains without an order, because it is stopping, goes on doing so.
        """
        ordered = (await self.worker(worker_id)).drain_deadline_at_ms is not None
        if not await self._stored(self._store.undrain_worker(worker_id)):
            raise _no_worker()
        self._house.wake_dispatcher(None)
        view = await self.worker(worker_id)
        return msgspec.structs.replace(view, state="ready") if ordered and view.state == "draining" else view

    async def remove_worker(self, worker_id: str) -> None:
        """Forget a worker; what runs there moves. Raises ApiError NOT_FOUND."""
        running = await self._stored(self._store.running_on(worker_id))
        if not await self._stored(self._store.remove_worker(worker_id)):
            raise _no_worker()
        for task in running:
            self._recovery.move(task)

    async def fleet(self, after: str | None = None) -> AsyncGenerator[list[FleetEvent]]:
        """What happens in the fleet, after a position (None: from now on). Yields what there is, maybe [], as soon as
        Redis has been reached, then [] after at most 10 s of silence."""
        cursor = await self._fleet_end() if after is None else after
        told_at = float("-inf")
        while self._state != "draining":
            self._fleet_news.clear()
            events = await self._stored(self._store.read_fleet(after=cursor))
            if events:
                cursor = events[-1].position
            silent_s = asyncio.get_running_loop().time() - told_at
            if events or silent_s >= self._settings.keep_alive_s:
                yield events
                told_at = asyncio.get_running_loop().time()
                continue
            try:
                async with asyncio.timeout(min(1.0, self._settings.keep_alive_s - silent_s)):
                    await self._fleet_news.wait()
            except TimeoutError:
                continue

    async def _fleet_end(self) -> str:
        cursor = "0-0"
        while events := await self._stored(self._store.read_fleet(after=cursor, limit=PAGE)):
            cursor = events[-1].position
        return cursor


def _no_worker() -> ApiError:
    return ApiError(ErrorCode.NOT_FOUND, "no such worker is registered: see GET /v2/workers", param="worker_id")
