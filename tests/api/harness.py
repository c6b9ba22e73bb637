"""The HTTP surface on a real socket, over an orchestrator that answers from memory and does what a test tells it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from llorch_wire.errors import ApiError, ErrorCode
from llorch_wire.events import (
    EndEvent,
    ErrorEvent,
    QueuedEvent,
    StartedEvent,
    StopReason,
    TaskEvent,
    TokenEvent,
    TopLogprob,
    parse_position,
    start_position,
    terminal_position,
    token_position,
)
from llorch_wire.tasks import TaskRequest
from llorch_wire.worker import Heartbeat, HeartbeatReply, Orders, RegisterReply, WorkerRegistration
from orchestratord.api.app import create_app
from orchestratord.api.server import bind, make_server
from orchestratord.metrics import Metrics
from orchestratord.observations import Observations
from orchestratord.runtime import ModelView, Orchestrator, PoolView, StreamItem, Submitted, TaskView, Tenant
from orchestratord.settings import Settings
from orchestratord.store.types import FleetEvent, QueueDepth, TaskRecord, Usage, WorkerView

DEADLINE_S = 20.0
WORDS = ("Once", " upon", " a", " time", " there", " was", " a", " fox", ".")


@dataclass
class MemoryTask:
    """A task and its whole log; `released` lets its events out."""

    task_id: str
    request: TaskRequest
    tenant: str
    seed: int
    log: list[tuple[str, TaskEvent]]
    released: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: bool = False
    readers: int = 0


class MemoryOrchestrator:
    """The interface of `Orchestrator` that the API calls, from memory. `hold` keeps events after `queued` back."""

    replica_id = "memory"

    def __init__(self) -> None:
        self.tasks_by_id: dict[str, MemoryTask] = {}
        self.state = "ready"
        self.hold = False
        self.fail_with: ErrorEvent | None = None
        self.parts: list[tuple[str, str]] = []
        """Tokens to generate instead of WORDS: each one's own text, and the text that comes with it."""
        self.end_with: StopReason = "EOS"
        self.refuse_with: ApiError | None = None
        self.left: list[str] = []
        self.calls = 0
        self.keys: dict[str, str] = {}
        self.serving: Counter[str] = Counter()
        self._numbers = itertools.count(1)

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
        self.calls += 1
        if self.refuse_with is not None:
            raise self.refuse_with
        if request.model != "demo":
            raise ApiError(ErrorCode.MODEL_NOT_FOUND, "no worker has ever registered this model", param="model")
        number = next(self._numbers)
        task_id = request.task_id or str(uuid.UUID(int=number))
        if idempotency_key is not None and (known := self.keys.get(idempotency_key)) is not None:
            return self._submitted(self.tasks_by_id[known], created=False)
        seed = request.seed if request.seed is not None else number
        task = MemoryTask(task_id, request, tenant.name, seed, self._log(task_id, request, seed))
        if not self.hold:
            task.released.set()
        self.tasks_by_id[task_id] = task
        if idempotency_key is not None:
            self.keys[idempotency_key] = task_id
        return self._submitted(task, created=True)

    def _submitted(self, task: MemoryTask, *, created: bool) -> Submitted:
        return Submitted(
            task_id=task.task_id,
            created=created,
            status="queued",
            model=task.request.model,
            seed=task.seed,
            queue_position=0,
            predicted_start_ms=0,
            predicted_start_p90_ms=None,
            created_at_ms=1_760_000_000_000,
        )

    def _log(self, task_id: str, request: TaskRequest, seed: int) -> list[tuple[str, TaskEvent]]:
        log: list[tuple[str, TaskEvent]] = [
            ("0-1", QueuedEvent(task_id=task_id, queue_position=0, predicted_start_ms=0)),
            (
                start_position(1),
                StartedEvent(
                    task_id=task_id,
                    worker_id="w0",
                    model="demo",
                    model_digest="sha256:0123456789abcdef0123",
                    seed=seed,
                    attempt=1,
                    determinism="exact",
                    started_at_ms=1_760_000_000_100,
                ),
            ),
        ]
        if self.fail_with is not None:
            return [*log, (terminal_position(1), self.fail_with)]
        if self.parts:
            return log + _told(self.parts, self.end_with, request.logprobs)
        count = min(request.max_tokens or 16, len(WORDS))
        for index, word in enumerate(WORDS[:count]):
            top = None
            if request.logprobs is not None:
                top = tuple(
                    TopLogprob(id=index + rank, t=word if rank == 0 else f"alt{rank}", logprob=-0.5 - rank)
                    for rank in range(request.logprobs)
                )
            log.append(
                (
                    token_position(1, index),
                    TokenEvent(
                        t=word, i=index, id=index, logprob=-0.5 if request.logprobs is not None else None, top=top
                    ),
                )
            )
        reason = "EOS" if count == len(WORDS) else "MAX_TOKENS"
        end = EndEvent(stop_reason=reason, tokens_in=4, tokens_out=count, cached_tokens=1, determinism="exact")
        return [*log, (terminal_position(1), end)]

    def _task(self, task_id: str, tenant: Tenant | None) -> MemoryTask:
        task = self.tasks_by_id.get(task_id)
        if task is None or (tenant is not None and task.tenant != tenant.name):
            raise ApiError(ErrorCode.NOT_FOUND, "no such task", param="task_id")
        return task

    async def task(self, task_id: str, tenant: Tenant | None) -> TaskView:
        task = self._task(task_id, tenant)
        text = "".join(event.t for _, event in task.log if isinstance(event, TokenEvent))
        return TaskView(record=self._record(task), text=text)

    async def tasks(
        self,
        tenant: Tenant | None,
        *,
        status: str | None = None,
        model: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> tuple[list[TaskView], str | None]:
        own = [task for task in self.tasks_by_id.values() if tenant is None or task.tenant == tenant.name]
        return [TaskView(record=self._record(task)) for task in own[:limit]], None

    def _record(self, task: MemoryTask) -> TaskRecord:
        last = task.log[-1][1]
        return TaskRecord(
            task_id=task.task_id,
            tenant=task.tenant,
            model="demo",
            priority=task.request.priority,
            status="cancelled" if task.cancelled else "completed",
            seed=task.seed,
            max_tokens=task.request.max_tokens or 16,
            attempt=1,
            failures=0,
            worker_id="w0",
            created_at_ms=1,
            started_at_ms=2,
            finished_at_ms=3,
            deadline_at_ms=None,
            queue_position=None,
            usage=Usage(tokens_in=4, tokens_out=9),
            end=last if isinstance(last, EndEvent) else None,
            error=last if isinstance(last, ErrorEvent) else None,
            metadata=task.request.metadata,
            on_disconnect=task.request.on_disconnect,
            session_id=task.request.session_id,
            callback_url=None,
        )

    def serve(self, task_ids: Collection[str]) -> None:
        self.serving.update(task_ids)

    def served(self, task_ids: Collection[str]) -> None:
        self.serving.subtract(task_ids)

    async def attend(self, task_id: str, tenant: Tenant | None) -> None:
        pass

    async def cancel(self, task_id: str, tenant: Tenant | None, *, abandoned: bool = False) -> TaskView:
        task = self._task(task_id, tenant)
        task.cancelled = True
        return await self.task(task_id, tenant)

    async def follow(
        self, task_id: str, tenant: Tenant | None, after: str | None = None
    ) -> AsyncIterator[list[StreamItem]]:
        task = self._task(task_id, tenant)
        seen = parse_position(after) if after else (0, 0)
        if seen > parse_position(task.log[-1][0]):
            raise ApiError(ErrorCode.CONFLICT, "this position is ahead of the task's log", param="Last-Event-ID")
        task.readers += 1
        try:
            for position, event in task.log:
                if not isinstance(event, QueuedEvent) and not task.released.is_set():
                    await task.released.wait()
                    if self.state == "draining":
                        return
                if parse_position(position) > seen:
                    yield [StreamItem(event, position)]
        finally:
            task.readers -= 1

    async def disconnected(self, task_id: str, tenant: Tenant | None, *, resumable: bool = True) -> None:
        self.left.append(task_id)
        task = self._task(task_id, tenant)
        if task.request.on_disconnect == "cancel" and task.readers == 0:
            task.cancelled = True

    async def queue(self) -> list[QueueDepth]:
        return [
            QueueDepth(model="demo", priority="interactive", tenant=tenant, depth=2, oldest_age_ms=1500)
            for tenant in ("default", "acme")
        ]

    async def models(self) -> list[ModelView]:
        return [ModelView(model="demo", workers_ready=1, slots_total=4, slots_free=4, context_length=2048)]

    async def workers(self) -> list[WorkerView]:
        return []

    async def worker(self, worker_id: str) -> WorkerView:
        raise ApiError(ErrorCode.NOT_FOUND, "no such worker", param="worker_id")

    async def pools(self) -> list[PoolView]:
        return [PoolView(pool="local", workers_total=1, workers_ready=1, slots_total=4, slots_used=1, models=("demo",))]

    async def register(self, registration: WorkerRegistration) -> RegisterReply:
        return RegisterReply(lease_ms=4000, heartbeat_ms=1000, replicas=["http://127.0.0.1:8080"])

    async def heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> HeartbeatReply:
        return HeartbeatReply(orders=Orders(), replicas=[], lease_ms=4000, heartbeat_ms=1000)

    async def remove_worker(self, worker_id: str) -> None:
        raise ApiError(ErrorCode.NOT_FOUND, "no such worker", param="worker_id")

    async def fleet(self, after: str | None = None) -> AsyncIterator[list[FleetEvent]]:
        yield [FleetEvent(position="1-0", at_ms=1, kind="registered", subject="w0", text="worker w0 registered")]

    async def ready(self) -> tuple[bool, str]:
        return self.state == "ready", "" if self.state == "ready" else self.state


def _told(parts: list[tuple[str, str]], reason: StopReason, logprobs: int | None) -> list[tuple[str, TaskEvent]]:
    tokens: list[tuple[str, TaskEvent]] = []
    for index, (own, came) in enumerate(parts):
        texts = [own, *(f"alt{rank}" for rank in range(1, logprobs or 0))] if logprobs else []
        top = tuple(TopLogprob(id=index + 100 * rank, t=text, logprob=-0.5) for rank, text in enumerate(texts))
        event = TokenEvent(t=came, i=index, id=index, logprob=None if logprobs is None else -0.5, top=top or None)
        tokens.append((token_position(1, index), event))
    matched = "END" if reason == "STOP_SEQUENCE" else None
    end = EndEvent(stop_reason=reason, tokens_in=4, tokens_out=len(parts), stop_sequence_matched=matched)
    return [*tokens, (terminal_position(1), end)]


@contextlib.asynccontextmanager
async def serving(orchestrator: Any, settings: Settings | None = None) -> AsyncIterator[str]:
    """The URL of a server over `orchestrator`, stopped at the end."""
    settings = settings or Settings()
    listener = bind("127.0.0.1", 0)
    app = create_app(cast(Orchestrator, orchestrator), settings, Metrics(Observations(), ["default"]))
    server = make_server(app, max_connections=settings.max_connections, graceful_s=1)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await asyncio.wait({running}, timeout=DEADLINE_S)
            listener.close()


async def until(condition: Any) -> None:
    """Wait for a condition, with a deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


def golden(name: str, transcript: bytes) -> bytes:
    """The transcript kept as golden/<name>.sse; `LLORCH_GOLDEN=write` keeps this one instead."""
    path = Path(__file__).parent / "golden" / f"{name}.sse"
    if os.environ.get("LLORCH_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(transcript)
    return path.read_bytes()
