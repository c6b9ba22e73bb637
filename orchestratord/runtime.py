"""The daemon behind its HTTP surface: `Orchestrator` admits tasks, runs the loops and lets readers follow.

`api/` calls this class and nothing below it. Read `Orchestrator.run` first: it is every long-lived loop in one group.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from llorch_wire.tasks import TaskRequest, TaskStatus
from llorch_wire.worker import Heartbeat, HeartbeatReply, RegisterReply, WorkerRegistration
from orchestratord.observations import Observations
from orchestratord.store.store import Store
from orchestratord.store.types import FleetEvent, QueueDepth, WorkerView
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


class Orchestrator:
    """Everything between the HTTP API and the store. One a process; one `run()` a life."""

    def __init__(
        self, store: Store, settings: RuntimeSettings | None = None, observations: Observations | None = None
    ) -> None:
        raise NotImplementedError

    @property
    def replica_id(self) -> str:
        """New at every start."""
        raise NotImplementedError

    @property
    def state(self) -> RuntimeState:
        """`draining` from the moment `stop` is called."""
        raise NotImplementedError

    async def run(self) -> None:
        """Every long-lived loop in one task group; returns after `stop`."""
        raise NotImplementedError

    async def stop(self, deadline_s: float) -> None:
        """No new claims, running attempts handed over to other replicas, everything closed within `deadline_s`."""
        raise NotImplementedError

    async def ready(self) -> tuple[bool, str]:
        """Whether traffic should come here, and why not."""
        raise NotImplementedError

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
        raise NotImplementedError

    async def task(self, task_id: str, tenant: Tenant | None) -> TaskView:
        """A task with its text so far. Raises ApiError NOT_FOUND. Tenant None sees every tenant's."""
        raise NotImplementedError

    async def tasks(
        self,
        tenant: Tenant | None,
        *,
        status: TaskStatus | None = None,
        model: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> tuple[list[TaskView], str | None]:
        """A page of tasks, newest first, without text, and the cursor of the next page."""
        raise NotImplementedError

    async def cancel(self, task_id: str, tenant: Tenant | None) -> TaskView:
        """End a task with CANCELLED; a task that ended already stays as it is. Raises ApiError NOT_FOUND."""
        raise NotImplementedError

    def follow(self, task_id: str, tenant: Tenant | None, after: str | None = None) -> AsyncIterator[list[StreamItem]]:
        """The task's events after the position `after`, then live, ending after the terminal event.

        Yields [] after at most 10 s of silence (send a keep-alive comment). Before its first item it raises ApiError:
        NOT_FOUND, GONE (the log was dropped), CONFLICT (`after` is ahead of a finished log), INVALID_PARAMS.
        Ends early when this reader fell too far behind or this replica stops: the client resumes from its last id.
        Close it (`aclose`) when the client goes away, then call `disconnected`.
        """
        raise NotImplementedError

    async def disconnected(self, task_id: str, tenant: Tenant | None) -> None:
        """A streaming client went away: cancels if the task says so and nobody else follows it here."""
        raise NotImplementedError

    async def queue(self) -> list[QueueDepth]:
        """Waiting tasks by model, priority and tenant."""
        raise NotImplementedError

    async def models(self) -> list[ModelView]:
        """Every model ever registered."""
        raise NotImplementedError

    async def workers(self) -> list[WorkerView]:
        """Every registered worker."""
        raise NotImplementedError

    async def worker(self, worker_id: str) -> WorkerView:
        """One worker. Raises ApiError NOT_FOUND."""
        raise NotImplementedError

    async def pools(self) -> list[PoolView]:
        """Workers summed up by pool."""
        raise NotImplementedError

    async def register(self, registration: WorkerRegistration) -> RegisterReply:
        """A worker says that it is there."""
        raise NotImplementedError

    async def heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> HeartbeatReply:
        """A worker says that it is alive. Raises ApiError NOT_FOUND: it must register again."""
        raise NotImplementedError

    async def drain_worker(self, worker_id: str, deadline_ms: int) -> WorkerView:
        """No new work there; what runs finishes, or moves at the deadline. Raises ApiError NOT_FOUND."""
        raise NotImplementedError

    async def undrain_worker(self, worker_id: str) -> WorkerView:
        """Take a drained worker back into service. Raises ApiError NOT_FOUND."""
        raise NotImplementedError

    async def remove_worker(self, worker_id: str) -> None:
        """Forget a worker; what runs there moves. Raises ApiError NOT_FOUND."""
        raise NotImplementedError

    def fleet(self, after: str | None = None) -> AsyncIterator[list[FleetEvent]]:
        """What happens in the fleet, after a position, then live. Yields [] after at most 10 s of silence."""
        raise NotImplementedError
