"""What the runtime gives to `api/` and takes from it: plain values, no I/O.

Read `RuntimeSettings` (what the caller configures) and `StreamItem` (what a reader of a stream gets) first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from llorch_wire.events import TaskEvent
from llorch_wire.tasks import TaskStatus
from orchestratord.settings import Tenant
from orchestratord.store.types import QueueLimits, TaskRecord

__all__ = [
    "ModelView",
    "PoolView",
    "RuntimeSettings",
    "RuntimeState",
    "StreamItem",
    "Submitted",
    "TaskView",
    "Tenant",
]

RuntimeState: TypeAlias = Literal["starting", "ready", "draining"]


class Submitted(msgspec.Struct, frozen=True, kw_only=True):
    """An admitted task. `created` is false where the same id or key and body had been admitted before."""

    task_id: str
    created: bool
    status: TaskStatus
    model: str
    seed: int
    queue_position: int
    predicted_start_ms: int | None
    """Milliseconds from now until the predicted start (median), None while nothing has been measured."""
    predicted_start_p90_ms: int | None
    created_at_ms: int


class TaskView(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a task. `text` is what has been generated so far; None in listings, which don't read logs."""

    record: TaskRecord
    text: str | None = None
    predicted_start_ms: int | None = None


class StreamItem(NamedTuple):
    """One event for a reader. `position` is its SSE id, None for events without one (`metrics`, `queued` refreshes)."""

    event: TaskEvent
    position: str | None


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A model that was ever registered, and what serves it now."""

    model: str
    workers_ready: int
    slots_total: int
    slots_free: int
    context_length: int
    """The smallest among its ready workers, 0 while none is ready."""


class PoolView(msgspec.Struct, frozen=True, kw_only=True):
    """The workers of one pool, summed up."""

    pool: str
    workers_total: int
    workers_ready: int
    slots_total: int
    slots_used: int
    models: tuple[str, ...]


READER_GRACE_S = 10.0
"""How long a task that is to end with its reader goes on after the replica that it was read at has gone."""


@dataclass(frozen=True)
class RuntimeSettings:
    """What the runtime needs of the settings. Times are in the unit their name says."""

    replica_id: str | None = None
    """None: made up, new at every start."""
    replica_url: str = "http://127.0.0.1:8080"
    """Where workers and other replicas reach this one."""
    worker_key: str | None = field(default=None, repr=False)
    replica_lease_ms: int = 2_000
    replica_renew_s: float = 0.5
    worker_lease_ms: int = 4_000
    worker_heartbeat_ms: int = 1_000
    sweep_s: float = 0.5
    dispatch_s: float = 0.5
    stall_s: float = 2.5
    probe_s: float = 1.0
    connect_s: float = 2.0
    keep_alive_s: float = 10.0
    reader_grace_s: float = READER_GRACE_S
    default_max_tokens: int = 1_024
    max_prompt_bytes: int = 4 * 2**20
    max_failures: int = 5
    age_limit_ms: int = 30_000
    preempt: bool = True
    wait_for_workers: bool = True
    """False: a model with no live worker refuses with NO_WORKERS instead of letting tasks wait."""
    limits: QueueLimits = field(default_factory=QueueLimits)
