"""Tasks, as `api/` deals with them: submit, look, list, cancel, follow. Read `TaskSurface.submit` first."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncGenerator, Collection

from llorch_wire.errors import ApiError, ErrorCode
from llorch_wire.tasks import Priority, TaskRequest, TaskStatus
from orchestratord.admission import AdmissionPolicy, Drawn, admit, refusal
from orchestratord.forecast import Forecast, next_turn
from orchestratord.settings import Tenant
from orchestratord.stopping import stop_attempt
from orchestratord.store.errors import StoreUnavailableError
from orchestratord.store.types import Admitted, NewTask, PlacementSpec, Refused
from orchestratord.surface import STORE_RETRY_MS, Surface, store_unavailable
from orchestratord.values import StreamItem, Submitted, TaskView

PAGE = 1_000
END_SERVED_S = 2.0
END_SERVED_AT_ONCE = 32


class TaskSurface(Surface):
    """What clients do. Every method raises ApiError, with the code to answer."""

    async def submit(
        self,
        request: TaskRequest,
        *,
        tenant: Tenant,
        idempotency_key: str | None = None,
        correlation_id: str,
        salt: str = "",
        fingerprint: str = "",
        attended: bool = False,
    ) -> Submitted:
        """Admit a task. It is in Redis when this returns. Raises ApiError with the code to answer.

        `salt` parts the workers' prefix caches further than the tenant does; `fingerprint` is of a larger request that
        this one is a part of, and counts as part of its body; `attended`: the caller streams it to its client.
        """
        drawn = Drawn(
            task_id=str(uuid.uuid4()),
            seed=secrets.randbits(63),
            now_ms=self._house.now_ms(),
            correlation_id=correlation_id,
            idempotency_key=idempotency_key,
            salt=salt,
            fingerprint=fingerprint,
            attended_by=self._house.replicas.replica_id if attended else None,
        )
        try:
            submitted = await self._submit(request, tenant, drawn)
        except ApiError as error:
            self.observations.count("admissions", error.code.lower())
            raise
        self.observations.count("admissions", "admitted" if submitted.created else "repeated")
        return submitted

    async def _submit(self, request: TaskRequest, tenant: Tenant, drawn: Drawn) -> Submitted:
        if self._state == "draining":
            raise ApiError(
                ErrorCode.DRAINING, "this orchestrator is stopping: send it again, to another one", retry_after_ms=1_000
            )
        known = await self._stored(self._house.fleet.known_models(request.model))
        forecast, ms_per_token = await self._deadline_figures(request)
        s = self._settings
        task = admit(
            request,
            tenant,
            AdmissionPolicy(s.default_max_tokens, s.max_prompt_bytes, s.wait_for_workers),
            drawn,
            known_models=known,
            workers=await self._stored(self._house.fleet.workers()),
            forecast=forecast,
            ms_per_token=ms_per_token,
        )
        result = await self._stored(self._store.admit(task, self._settings.limits))
        if isinstance(result, Refused):
            raise await self._refusal(result, task)
        return await self._submitted(result, drawn.now_ms, task)

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
        forecast = await self._stored(self._house.fleet.forecast(request.model, ahead + 1, request.priority))
        return forecast, rates.ms_per_token if rates else None

    async def _refusal(self, refused: Refused, task: NewTask) -> ApiError:
        """When a place will be free: when the next task of those that fill the queue starts."""
        place = 1
        if refused.reason == "queue_full_tenant":
            place = next_turn(await self._stored(self._store.queue()), task.model, task.tenant)
        forecast = await self._stored(self._house.fleet.forecast(task.model, place, task.priority))
        wait_ms = STORE_RETRY_MS if forecast is None else round(forecast.p90_ms)
        known = await self._stored(self._house.fleet.known_models())
        return refusal(refused, self._settings.limits, known, wait_ms, task.model)

    async def _submitted(self, admitted: Admitted, now_ms: int, task: NewTask) -> Submitted:
        forecast = None
        if admitted.created:
            self._house.wake_dispatcher(admitted.model)
        if admitted.status == "queued":
            forecast = await self._forecast(admitted.model, admitted.queue_position, task.priority, task.placement)
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

    async def _forecast(
        self, model: str, position: int, priority: Priority, placement: PlacementSpec
    ) -> Forecast | None:
        """A forecast is a courtesy: none when Redis has just gone away."""
        try:
            return await self._house.fleet.forecast(model, position, priority, placement)
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
            forecast = await self._forecast(record.model, record.queue_position, record.priority, record.placement)
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

    async def cancel(self, task_id: str, tenant: Tenant | None, *, abandoned: bool = False) -> TaskView:
        """End a task with CANCELLED; a task that ended already stays as it is. Raises ApiError NOT_FOUND.

        `abandoned`: because nobody reads it any more. A repeat of its request then starts a new one.
        """
        outcome = await self._stored(
            self._store.cancel(task_id, None if tenant is None else tenant.name, abandoned=abandoned)
        )
        if outcome is None:
            raise _no_task()
        self._recovery.cancelled(task_id, outcome)
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
            raise store_unavailable() from error
        finally:
            await stream.aclose()

    async def attend(self, task_id: str, tenant: Tenant | None) -> None:
        """A client begins to stream a task that was admitted before. Raises ApiError STORE_UNAVAILABLE."""
        name = None if tenant is None else tenant.name
        await self._stored(self._store.attend(task_id, name, self._house.replicas.replica_id))

    def serve(self, task_ids: Collection[str]) -> None:
        """These tasks are of a call that can't be resumed: they end with this replica, until they are `served`."""
        self._served.update(task_ids)

    def served(self, task_ids: Collection[str]) -> None:
        """The call for which these were to `serve` has ended."""
        self._served.subtract(task_ids)
        for task_id in task_ids:
            if self._served[task_id] <= 0:
                del self._served[task_id]

    async def disconnected(self, task_id: str, tenant: Tenant | None, *, resumable: bool = True) -> None:
        """A streaming client went away: cancels if the task says so and nobody else follows it here.

        While this replica stops, only what isn't `resumable` (see `serve`): other clients come back elsewhere.
        """
        draining = self._state == "draining"
        if draining and (resumable or task_id in self._ending):
            return
        if not draining and self._house.followers.is_followed(task_id):
            return
        record = await self._stored(self._store.task(task_id, None if tenant is None else tenant.name))
        if record is None or record.on_disconnect != "cancel" or record.finished_at_ms is not None:
            return
        outcome = await self._stored(self._store.cancel(task_id, record.tenant, left=self._house.replicas.replica_id))
        if outcome is not None:
            self._recovery.cancelled(task_id, outcome)

    async def _end_served(self) -> None:
        """Cancel the tasks of every call that can't be resumed, down to their workers, in bounded time."""
        task_ids = list(self._served)
        self._ending.update(task_ids)
        try:
            async with asyncio.timeout(END_SERVED_S), asyncio.TaskGroup() as group:
                room = asyncio.Semaphore(END_SERVED_AT_ONCE)
                for task_id in task_ids:
                    group.create_task(self._end_one(task_id, room))
        except TimeoutError:
            self._log.warning("not every task of a call that broke off could be ended in time", tasks=len(task_ids))

    async def _end_one(self, task_id: str, room: asyncio.Semaphore) -> None:
        async with room:
            try:
                outcome = await self._store.cancel(task_id, None, left=self._house.replicas.replica_id)
            except StoreUnavailableError:
                return  # it becomes unattended when this replica's lease ends
            if outcome is not None and outcome.running is not None:
                await stop_attempt(self._house, outcome.running, "cancel")


def _no_task() -> ApiError:
    return ApiError(ErrorCode.NOT_FOUND, "there is no such task: check its id, or it was retired", param="task_id")
