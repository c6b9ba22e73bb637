"""Values that go into and come out of the store. Plain, immutable, no redis here.

Read `NewTask` (what admission hands over), `Snapshot` (what the planner sees) and `TaskRecord` (what is known of a
task) first.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from llorch_wire.events import EndEvent, ErrorEvent, TokenEvent
from llorch_wire.tasks import OnDisconnect, Priority, TaskStatus

RequeueReason: TypeAlias = Literal["worker_lost", "worker_error", "preempted", "drained", "handover", "engine_restart"]


class PlacementSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Validated placement of a task."""

    mode: Literal["auto", "prefer", "pin"] = "auto"
    pin_pool: str | None = None
    pin_worker: str | None = None
    prefer_pools: tuple[str, ...] = ()
    avoid_pools: tuple[str, ...] = ()
    allow_fallback: bool = True


class NewTask(msgspec.Struct, frozen=True, kw_only=True):
    """A task as admission accepted it. `payload` is JSON of what the worker needs (input, sampling), opaque here."""

    task_id: str
    tenant: str
    weight: float = 1.0
    model: str
    priority: Priority
    payload: bytes
    seed: int
    max_tokens: int
    prompt_tokens_estimate: int
    deadline_at_ms: int | None = None
    session_id: str | None = None
    placement: PlacementSpec = PlacementSpec()
    on_disconnect: OnDisconnect = "continue"
    callback_url: str | None = None
    metadata: dict[str, str] = {}
    idempotency_key: str | None = None
    own_id: bool = False
    """The client named `task_id`; it wasn't drawn."""
    attended_by: str | None = None
    """The replica that streams it to a client, for one that is to end when that client leaves."""
    body_hash: str
    """sha256 of the canonical request, without task_id and seed where they were drawn."""
    prefix_hashes: tuple[str, ...] = ()
    """Chained hashes of the prompt's leading pieces, longest prefix last (see orchestratord.routing)."""
    correlation_id: str = ""


class QueueLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on waiting tasks. `drop_oldest_batch` makes room for an interactive task by failing a batch one."""

    per_model: int = 10_000
    per_tenant: int = 5_000
    total: int = 50_000
    policy: Literal["reject", "drop_oldest_batch"] = "reject"


class Admitted(msgspec.Struct, frozen=True, kw_only=True):
    """The task is in the queue; or, with `created` false, it was already known under this id or idempotency key."""

    task_id: str
    created: bool
    seed: int
    created_at_ms: int
    queue_position: int
    status: TaskStatus
    model: str


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing was written. `conflict`: same id or key, another body. `conflict_pair`: id and key are of two tasks.
    `conflict_keys`: the task has as many keys as it may have."""

    reason: Literal[
        "conflict",
        "conflict_pair",
        "conflict_keys",
        "queue_full_total",
        "queue_full_model",
        "queue_full_tenant",
        "memory",
        "model_unknown",
    ]
    limit: int = 0


class QueuedTask(msgspec.Struct, frozen=True, kw_only=True):
    """A waiting task as the planner sees it."""

    task_id: str
    model: str
    priority: Priority
    tenant: str
    weight: float
    sequence: int
    """Place in the queue: admission order, kept over every requeue."""
    created_at_ms: int
    prompt_tokens_estimate: int
    max_tokens: int
    attempt: int
    """Attempts so far; the next claim makes it attempt + 1."""
    tokens_kept: int
    required_digest: str | None
    required_dtype: str | None
    """Set once tokens were generated: a continuation on other weights or another dtype is forbidden."""
    session_worker: str | None
    placement: PlacementSpec
    avoid_worker: str | None
    """Where the last attempt failed; used elsewhere first, but not forbidden when it is the only one."""
    prefix_hashes: tuple[str, ...]
    deadline_at_ms: int | None
    waiting_since_ms: int = 0
    """When it came into the queue this time: admission, or the last requeue (ageing counts from here). 0: unknown."""


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as registered, plus what runs there according to Redis."""

    worker_id: str
    instance_id: str
    url: str
    pool: str
    model: str
    model_digest: str
    dtype: str
    device: str
    determinism: Literal["exact", "prefix"]
    context_length: int
    slots_total: int
    slots_used: int
    """Running attempts plus cancelled ones whose slot the worker hasn't confirmed free yet."""
    kv_blocks_total: int
    kv_blocks_free: int
    tokens_per_second: float
    state: Literal["ready", "draining", "failed", "lost"]
    """`lost`: lease expired or probed dead. Draining is remembered across restarts of everything."""
    drain_deadline_at_ms: int | None
    lease_expires_at_ms: int
    registered_at_ms: int
    version: str
    attention: str
    vram_total_bytes: int
    vram_used_bytes: int


class RunningTask(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt in flight. Everything a relay needs to start, continue or re-attach it."""

    task_id: str
    tenant: str
    model: str
    priority: Priority
    attempt: int
    worker_id: str
    worker_url: str
    instance_id: str
    """The worker's engine instance at claim: re-attachment names it."""
    owner: str
    """Replica that relays it."""
    seed: int
    claimed_at_ms: int
    created_at_ms: int
    deadline_at_ms: int | None
    on_disconnect: OnDisconnect
    tokens_logged: int
    correlation_id: str
    waiting_since_ms: int | None = None
    """When the wait that this attempt ended had begun."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One model's queue and workers at one instant."""

    model: str
    version: int
    """Changes with every claim, requeue and worker change of this model; claim refuses a plan made from another one."""
    now_ms: int
    waiting: tuple[QueuedTask, ...]
    """The first tasks of every (priority, tenant, pin) queue, in order within each."""
    running: tuple[RunningTask, ...]
    workers: tuple[WorkerView, ...]
    virtual_times: dict[str, float]
    """Weighted tokens served per tenant (Virtual Token Counter)."""
    prefix_workers: dict[str, tuple[str, ...]]
    """Workers that lately served a prefix, by prefix hash, newest first."""


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """One decision of the planner. `charge` is what the tenant's virtual time is advanced by, in tokens."""

    task_id: str
    worker_id: str
    charge: float


class Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """An assignment that took effect: lease, attempt and `started`/`migrated` event are written."""

    task: RunningTask
    payload: bytes
    resume_token_ids: tuple[int, ...]


class TokenBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens to append to a task's log, contiguous, all of one attempt."""

    task_id: str
    attempt: int
    tokens: tuple[TokenEvent, ...]


AppendOutcome: TypeAlias = Literal["appended", "covered", "stale"]
"""`covered`: the log had these tokens (another owner of the same attempt). `stale`: another attempt, or ended."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of a task; `tokens_in` is 0 until a worker has counted."""

    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens: int = 0


class TaskRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a task, without its prompt and without its text."""

    task_id: str
    tenant: str
    model: str
    priority: Priority
    status: TaskStatus
    seed: int
    max_tokens: int
    attempt: int
    failures: int
    worker_id: str | None
    created_at_ms: int
    started_at_ms: int | None
    finished_at_ms: int | None
    deadline_at_ms: int | None
    queue_position: int | None
    usage: Usage
    end: EndEvent | None
    error: ErrorEvent | None
    metadata: dict[str, str]
    on_disconnect: OnDisconnect
    session_id: str | None
    callback_url: str | None
    placement: PlacementSpec = PlacementSpec()


class CancelOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """`running`: the attempt that must be stopped at its worker (its log is sealed already), if there was one."""

    status: TaskStatus
    changed: bool
    running: RunningTask | None = None


class RequeueOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """Where the task went. `failed`: its failures reached the limit and its log is sealed with RETRIES_EXHAUSTED."""

    state: Literal["queued", "retry", "failed", "stale"]
    failures: int = 0


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a task's log. Exactly one of `tokens` and `data` is set."""

    position: str
    kind: Literal["queued", "started", "migrated", "tokens", "end", "error"]
    tokens: tuple[TokenEvent, ...] = ()
    data: bytes = b""
    """JSON of the event, as `llorch_wire.events.decode_task_event(kind, data)` reads it."""


class HeartbeatOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """`known` false: register again. `cancel`: (task_id, attempt) that the worker runs but Redis doesn't want there."""

    known: bool
    drain: bool = False
    cancel: tuple[tuple[str, int], ...] = ()


class QueueDepth(msgspec.Struct, frozen=True, kw_only=True):
    """Waiting tasks of one (model, priority, tenant)."""

    model: str
    priority: Priority
    tenant: str
    depth: int
    oldest_age_ms: int


class SweepReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one sweep did: `expired_running` must be stopped at their workers, their logs are sealed already."""

    retried: int = 0
    expired_queued: int = 0
    expired_running: tuple[RunningTask, ...] = ()
    workers_lost: tuple[str, ...] = ()


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One broken invariant. `repaired` says whether audit(repair=True) mended it."""

    invariant: str
    key: str
    detail: str
    repaired: bool = False


class ReplicaView(msgspec.Struct, frozen=True, kw_only=True):
    """One orchestratord as the others see it."""

    replica_id: str
    url: str
    lease_expires_at_ms: int


class FleetEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the fleet feed; `position` is the cursor for `read_fleet(after=...)`."""

    position: str
    at_ms: int
    kind: str
    subject: str
    text: str


class ServiceRates(msgspec.Struct, frozen=True, kw_only=True):
    """Measured service of one model: exponentially weighted means and variances over attempts that ended by themselves.

    An attempt's service time runs from its claim to its end; it is `service_ms`, and divided by the tokens that the
    attempt generated it is `ms_per_token` (prefill is spread over them).
    """

    samples: int = 0
    service_ms: float = 0.0
    service_ms_variance: float = 0.0
    tokens_out: float = 0.0
    tokens_out_variance: float = 0.0
    ms_per_token: float = 0.0
    ms_per_token_variance: float = 0.0
    updated_at_ms: int = 0
