"""The daemon behind its HTTP surface: `Orchestrator` admits tasks, runs the loops and lets readers follow.

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
import secrets
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeAlias, TypeVar

import structlog

from llorch_wire.errors import ApiError, ErrorCode
from llorch_wire.tasks import TaskRequest, TaskStatus
from llorch_wire.worker import (
    AttemptRef,
    Heartbeat,
    HeartbeatReply,
    Orders,
    RegisterReply,
    WorkerRegistration,
)
from orchestratord.admission import AdmissionPolicy, Drawn, admit, refusal
from orchestratord.committer import Committer
from orchestratord.dispatcher import Dispatcher
from orchestratord.fleet import FleetView, by_model, by_pool
from orchestratord.followers import CATCHERS, Followers
from orchestratord.forecast import Forecast
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
from orchestratord.store.types import Admitted, FleetEvent, QueueDepth, Refused, WorkerView
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

T = TypeVar("T")

_Loop: TypeAlias = asyncio.Task[None]

STORE_RETRY_MS = 1_000
LOOP_PAUSE_S = 0.5
PAGE = 1_000


class Orchestrator:
    """Everything between the HTTP API and the store. One a process; one `run()` a life."""

    def __init__(
        self, store: Store, settings: RuntimeSettings | None = None, observations: Observations | None = None
    ) -> None:
        self._settings = settings or RuntimeSettings()
        self._store = store
        self.observations = observations or Observations()
        s = self._settings
        client = WorkerClient(s.worker_key, connect_s=s.connect_s, stall_s=s.stall_s, probe_s=s.probe_s)
        self._house = house = House(store, s, self.observations, client)
        house.committer = Committer(store, self.observations)
        house.fleet = FleetView(house)
        house.followers = Followers(house)
        house.relays = Relays(house)
        house.replicas = Replicas(house)
        house.watch = Watch(house)
        house.spawn = self._spawn
        self._recovery = Recovery(house)
        self._dispatcher = Dispatcher(house, PlanPolicy(age_limit_ms=s.age_limit_ms, preempt=s.preempt))
        house.wake_dispatcher = self._dispatcher.wake
        self._fleet_news = asyncio.Event()
        self._admission = AdmissionPolicy(s.default_max_tokens, s.max_prompt_bytes, s.wait_for_workers)
        self._state: RuntimeState = "starting"
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._stop_deadline_s = 0.0
        self._stop = asyncio.Event()
        self._stopped = asyncio.Event()
        self._log = structlog.get_logger("orchestratord")

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

    # ---- tasks

    async def submit(
        self,
        request: TaskRequest,
        *,
        tenant: Tenant,
        idempotency_key: str | None = None,
        correlation_id: str,
        salt: str = "",
    ) -> Submitted:
        """Admit a task. It is in Redis when this returns. Raises ApiError with the code to answer.

        `salt` parts the workers' prefix caches further than the tenant does.
        """
        try:
            submitted = await self._submit(request, tenant, idempotency_key, correlation_id, salt)
        except ApiError as error:
            self.observations.count("admissions", error.code.lower())
            raise
        self.observations.count("admissions", "admitted" if submitted.created else "repeated")
        return submitted

    async def _submit(
        self, request: TaskRequest, tenant: Tenant, idempotency_key: str | None, correlation_id: str, salt: str
    ) -> Submitted:
        if self._state == "draining":
            raise ApiError(
                ErrorCode.DRAINING, "this orchestrator is stopping: send it again, to another one", retry_after_ms=1_000
            )
        known = await self._stored(self._house.fleet.known_models(request.model))
        drawn = Drawn(
            task_id=str(uuid.uuid4()),
            seed=secrets.randbits(63),
            now_ms=self._house.now_ms(),
            correlation_id=correlation_id,
            idempotency_key=idempotency_key,
            salt=salt,
        )
        forecast, ms_per_token = await self._deadline_figures(request)
        task = admit(
            request,
            tenant,
            self._admission,
            drawn,
            known_models=known,
            workers=await self._stored(self._house.fleet.workers()),
            forecast=forecast,
            ms_per_token=ms_per_token,
        )
        result = await self._stored(self._store.admit(task, self._settings.limits))
        if isinstance(result, Refused):
            raise await self._refusal(result, task.model)
        return await self._submitted(result, drawn.now_ms)

    async def _deadline_figures(self, request: TaskRequest) -> tuple[Forecast | None, float | None]:
        """Where a task admitted now would stand in time; only looked up for one that has a deadline."""
        if request.deadline_ms is None:
            return None, None
        depths = await self._stored(self._store.queue())
        ahead = sum(
            depth.depth
            for depth in depths
            if depth.model == request.model and (depth.priority == "interactive" or request.priority == "batch")
        )
        rates = await self._stored(self._house.fleet.rates(request.model))
        forecast = await self._stored(self._house.fleet.forecast(request.model, ahead + 1))
        return forecast, rates.ms_per_token if rates else None

    async def _refusal(self, refused: Refused, model: str) -> ApiError:
        limits = self._settings.limits
        forecast = await self._stored(self._house.fleet.forecast(model, 1))
        wait_ms = STORE_RETRY_MS if forecast is None else round(forecast.p90_ms)
        return refusal(refused, limits, await self._stored(self._house.fleet.known_models()), wait_ms, model)

    async def _submitted(self, admitted: Admitted, now_ms: int) -> Submitted:
        forecast = None
        if admitted.created:
            self._dispatcher.wake(admitted.model)
        if admitted.status == "queued":
            forecast = await self._forecast(admitted.model, admitted.queue_position)
        if forecast is not None and admitted.created:
            self._house.fleet.book.note(admitted.task_id, forecast, now_ms)
        return Submitted(
            task_id=admitted.task_id,
            created=admitted.created,
            status=admitted.status,
            model=admitted.model,
            seed=admitted.seed,
            queue_position=admitted.queue_position,
            predicted_start_ms=None if forecast is None else round(forecast.p50_ms),
            predicted_start_p90_ms=None if forecast is None else round(forecast.p90_ms),
            created_at_ms=admitted.created_at_ms,
        )

    async def _forecast(self, model: str, position: int) -> Forecast | None:
        """A forecast is a courtesy: none when Redis has just gone away."""
        try:
            return await self._house.fleet.forecast(model, position)
        except StoreUnavailableError:
            return None

    async def task(self, task_id: str, tenant: Tenant | None) -> TaskView:
        """A task with its text so far. Raises ApiError NOT_FOUND. Tenant None sees every tenant's."""
        record = await self._stored(self._store.task(task_id, None if tenant is None else tenant.name))
        if record is None:
            raise _no_task()
        parts: list[str] = []
        after, next_index = "0-0", 0
        while entries := await self._stored(self._store.read_log(task_id, after=after, limit=PAGE)):
            for entry in entries:
                for token in entry.tokens:
                    if token.i == next_index:
                        parts.append(token.t)
                        next_index += 1
            after = entries[-1].position
            if len(entries) < PAGE:
                break
        forecast = None
        if record.status == "queued" and record.queue_position and record.attempt == 0:
            forecast = await self._forecast(record.model, record.queue_position)
        return TaskView(
            record=record,
            text="".join(parts),
            predicted_start_ms=None if forecast is None else round(forecast.p50_ms),
        )

    async def tasks(
        self,
        tenant: Tenant,
        *,
        status: TaskStatus | None = None,
        model: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> tuple[list[TaskView], str | None]:
        """A page of tasks, newest first, without text, and the cursor of the next page. Raises ApiError."""
        try:
            records, cursor = await self._stored(
                self._store.list_tasks(tenant.name, status=status, model=model, limit=limit, after=after)
            )
        except ValueError:
            raise ApiError(
                ErrorCode.INVALID_PARAMS, "`after` must be the `next` of the page before", param="after"
            ) from None
        return [TaskView(record=record) for record in records], cursor

    async def cancel(self, task_id: str, tenant: Tenant | None) -> TaskView:
        """End a task with CANCELLED; a task that ended already stays as it is. Raises ApiError NOT_FOUND."""
        outcome = await self._stored(self._store.cancel(task_id, None if tenant is None else tenant.name))
        if outcome is None:
            raise _no_task()
        if outcome.changed:
            self.observations.count("cancellations", "running" if outcome.running else "queued")
            self._house.fleet.book.forget(task_id)
            self._house.followers.kick(task_id)
        if outcome.running is not None:
            self._recovery.stop(outcome.running, "cancel")
        return await self.task(task_id, tenant)

    def follow(self, task_id: str, tenant: Tenant | None, after: str | None = None) -> AsyncGenerator[list[StreamItem]]:
        """The task's events after the position `after`, then live, ending after the terminal event.

        Yields [] after at most 10 s of silence (send a keep-alive comment). Before its first item it raises ApiError:
        NOT_FOUND, GONE (the log was dropped), CONFLICT (`after` is ahead of a finished log), INVALID_PARAMS; at any
        time STORE_UNAVAILABLE. Ends early when this reader fell too far behind or this replica stops: the client
        resumes from its last id. Close it (`aclose`) when the client goes away, then call `disconnected`.
        """
        return self._follow(task_id, None if tenant is None else tenant.name, after)

    async def _follow(self, task_id: str, tenant: str | None, after: str | None) -> AsyncGenerator[list[StreamItem]]:
        stream = self._house.followers.follow(task_id, tenant, after)
        try:
            async for items in stream:
                yield items
        except StoreUnavailableError as error:
            raise _store_unavailable() from error
        finally:
            await stream.aclose()

    async def disconnected(self, task_id: str, tenant: Tenant | None) -> None:
        """A streaming client went away: cancels if the task says so and nobody else follows it here."""
        if self._house.followers.is_followed(task_id) or self._state == "draining":
            return
        record = await self._stored(self._store.task(task_id, None if tenant is None else tenant.name))
        if record is None or record.on_disconnect != "cancel" or record.finished_at_ms is not None:
            return
        await self.cancel(task_id, tenant)

    # ---- queue and fleet

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
        self._dispatcher.wake()
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
        """Take a drained worker back into service. Raises ApiError NOT_FOUND."""
        if not await self._stored(self._store.undrain_worker(worker_id)):
            raise _no_worker()
        self._dispatcher.wake()
        return await self.worker(worker_id)

    async def remove_worker(self, worker_id: str) -> None:
        """Forget a worker; what runs there moves. Raises ApiError NOT_FOUND."""
        running = await self._stored(self._store.running_on(worker_id))
        if not await self._stored(self._store.remove_worker(worker_id)):
            raise _no_worker()
        for task in running:
            self._recovery.move(task)

    async def fleet(self, after: str | None = None) -> AsyncGenerator[list[FleetEvent]]:
        """What happens in the fleet, after a position (None: from now on). Yields [] after at most 10 s of silence."""
        cursor = await self._fleet_end() if after is None else after
        told_at = asyncio.get_running_loop().time()
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
                await end_tasks([lease])
                await self._house.replicas.leave()
        except (TimeoutError, StoreUnavailableError):
            self._log.warning("not handed over: Redis doesn't answer; the lease will end by itself")

    async def _stored(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except StoreUnavailableError as error:
            self.observations.count("store_errors", "request")
            raise _store_unavailable() from error


def _store_unavailable() -> ApiError:
    return ApiError(
        ErrorCode.STORE_UNAVAILABLE, "Redis doesn't answer or takes no writes: try again", retry_after_ms=STORE_RETRY_MS
    )


def _no_task() -> ApiError:
    return ApiError(ErrorCode.NOT_FOUND, "there is no such task: check its id, or it was retired", param="task_id")


def _no_worker() -> ApiError:
    return ApiError(ErrorCode.NOT_FOUND, "no such worker is registered: see GET /v2/workers", param="worker_id")
