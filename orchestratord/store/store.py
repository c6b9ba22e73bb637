"""The state of every task, worker and replica. One async method a transition, each one Lua script."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from llorch_wire.events import EndEvent, ErrorEvent
from llorch_wire.tasks import TaskStatus
from llorch_wire.worker import Heartbeat, WorkerRegistration
from orchestratord.store.types import (
    Admitted,
    AppendOutcome,
    Assignment,
    CancelOutcome,
    Claimed,
    Finding,
    FleetEvent,
    HeartbeatOutcome,
    LogEntry,
    NewTask,
    QueueDepth,
    QueueLimits,
    Refused,
    ReplicaView,
    RequeueOutcome,
    RequeueReason,
    RunningTask,
    ServiceRates,
    Snapshot,
    SweepReport,
    TaskRecord,
    TokenBatch,
    WorkerView,
)


class Hints(Protocol):
    """Wake-ups. Iterate for names; names that came while nobody looked are given once each."""

    async def subscribe(self, name: str) -> None: ...
    async def unsubscribe(self, name: str) -> None: ...
    def __aiter__(self) -> AsyncIterator[str]: ...


class Store:
    """See docs/internals.md, section Store. `now_ms=None` is Redis `TIME`."""

    @classmethod
    async def connect(
        cls, url: str, *, jobs: bool = False, timeout_s: float = 5.0, memory_watermark: float = 0.9
    ) -> Store:
        """Raises StoreUrlError, StoreUnavailableError."""
        raise NotImplementedError

    async def aclose(self) -> None: ...
    async def ping(self) -> None:
        """Raises StoreUnavailableError."""

    def healthy_for_s(self) -> float:
        """Seconds since the last failed command, monotonic."""
        raise NotImplementedError

    async def admit(self, task: NewTask, limits: QueueLimits, *, now_ms: int | None = None) -> Admitted | Refused: ...
    async def models(self) -> list[str]: ...
    async def model_known(self, model: str) -> bool: ...
    async def snapshot(self, model: str, *, per_queue: int = 16, now_ms: int | None = None) -> Snapshot: ...
    async def waiting_models(self) -> list[str]: ...
    async def claim(
        self,
        replica_id: str,
        model: str,
        version: int,
        assignments: Sequence[Assignment],
        *,
        now_ms: int | None = None,
    ) -> list[Claimed]: ...
    async def append(self, batches: Sequence[TokenBatch]) -> list[AppendOutcome]: ...
    async def record_prompt_tokens(self, task_id: str, attempt: int, tokens_in: int) -> None: ...
    async def complete(
        self, task_id: str, attempt: int, event: EndEvent | ErrorEvent, *, now_ms: int | None = None
    ) -> bool: ...
    async def cancel(self, task_id: str, tenant: str | None, *, now_ms: int | None = None) -> CancelOutcome | None: ...
    async def release(self, worker_id: str, task_id: str, attempt: int) -> None: ...
    async def requeue(
        self,
        task_id: str,
        attempt: int,
        reason: RequeueReason,
        *,
        failure: bool,
        progressed: bool = False,
        avoid_worker: str | None = None,
        backoff_ms: int = 0,
        max_failures: int = 5,
        error: ErrorEvent | None = None,
        now_ms: int | None = None,
    ) -> RequeueOutcome: ...
    async def hand_over(self, replica_id: str) -> int: ...
    async def adopt(
        self, replica_id: str, *, limit: int = 64, healthy_ms: int | None = None, now_ms: int | None = None
    ) -> list[RunningTask]: ...
    async def owned(self, replica_id: str) -> list[RunningTask]: ...
    async def running_on(self, worker_id: str) -> list[RunningTask]: ...
    async def sweep(
        self, *, limit: int = 64, healthy_ms: int | None = None, now_ms: int | None = None
    ) -> SweepReport: ...

    async def task(self, task_id: str, tenant: str | None) -> TaskRecord | None: ...
    async def list_tasks(
        self,
        tenant: str,
        *,
        status: TaskStatus | None = None,
        model: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> tuple[list[TaskRecord], str | None]:
        """Newest first. `after` is the cursor of the previous page; ValueError when it isn't one."""
        raise NotImplementedError

    async def queue(self, *, now_ms: int | None = None) -> list[QueueDepth]: ...
    async def read_log(self, task_id: str, *, after: str = "0-0", limit: int = 512) -> list[LogEntry]: ...
    async def log_bounds(self, task_id: str) -> tuple[str, str, bool] | None: ...
    async def payload(self, task_id: str) -> bytes | None: ...
    async def token_ids(self, task_id: str) -> tuple[int, ...]: ...

    async def register_worker(
        self, registration: WorkerRegistration, lease_ms: int, *, now_ms: int | None = None
    ) -> None: ...
    async def heartbeat(
        self, worker_id: str, heartbeat: Heartbeat, lease_ms: int, *, now_ms: int | None = None
    ) -> HeartbeatOutcome: ...
    async def workers(self, *, now_ms: int | None = None) -> list[WorkerView]: ...
    async def worker(self, worker_id: str, *, now_ms: int | None = None) -> WorkerView | None: ...
    async def drain_worker(self, worker_id: str, deadline_ms: int, *, now_ms: int | None = None) -> bool:
        """`deadline_ms` is a duration from now. False when there is no such worker."""
        raise NotImplementedError

    async def undrain_worker(self, worker_id: str) -> bool: ...
    async def remove_worker(self, worker_id: str) -> bool: ...
    async def mark_worker_lost(
        self, worker_id: str, instance_id: str, reason: str, *, now_ms: int | None = None
    ) -> bool:
        """True when this call marked it: the instance is still the registered one and wasn't lost yet."""
        raise NotImplementedError

    async def replica_heartbeat(
        self, replica_id: str, url: str, lease_ms: int, *, now_ms: int | None = None
    ) -> None: ...
    async def replicas(self) -> list[ReplicaView]: ...
    async def leave(self, replica_id: str) -> int:
        """The replica's lease ends; tasks it still owned become adoptable at once. Returns how many."""
        raise NotImplementedError

    async def set_rates(self, model: str, rates: ServiceRates) -> None: ...
    async def rates(self, model: str) -> ServiceRates | None: ...
    async def fleet_event(self, kind: str, subject: str, text: str, *, now_ms: int | None = None) -> str:
        """Returns the event's position."""
        raise NotImplementedError

    async def read_fleet(self, *, after: str = "0-0", limit: int = 256) -> list[FleetEvent]: ...
    def hints(self) -> AbstractAsyncContextManager[Hints]: ...
    async def finished(self, before_ms: int, *, limit: int = 500) -> list[str]: ...
    async def delete_task(self, task_id: str) -> bool:
        """False when it isn't there or hasn't ended."""
        raise NotImplementedError

    async def audit(self, *, repair: bool = False) -> list[Finding]: ...
