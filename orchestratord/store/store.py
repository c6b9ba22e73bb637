"""The state of every task, worker and replica. One async method a transition, each one Lua script in `lua/`.

Nothing outside of this package knows Redis. `now_ms=None` means Redis' own clock; tests give a time. Every method may
raise StoreUnavailableError, and every method may be called again after it: a transition recognises its own second call.

Read `admit`, `claim`, `append`, `complete` in this order: it is a task's way. docs/redis-state.md lists keys, log
layout and invariants.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from llorch_wire.errors import ErrorCode
from llorch_wire.events import EndEvent, ErrorEvent, encode_data
from orchestratord.patience import all_of
from orchestratord.store import codec, connection
from orchestratord.store.audit import AuditPlace, audit, audit_from
from orchestratord.store.base import moment
from orchestratord.store.errors import LogGapError
from orchestratord.store.errors import StoreUnavailableError as StoreUnavailableError
from orchestratord.store.errors import StoreUrlError as StoreUrlError
from orchestratord.store.fleet import FleetStore
from orchestratord.store.hints import HintReader
from orchestratord.store.housekeeping import HousekeepingStore
from orchestratord.store.reads import ReadStore
from orchestratord.store.types import (
    Admitted,
    AppendOutcome,
    Assignment,
    CancelOutcome,
    Claimed,
    Finding,
    NewTask,
    QueueLimits,
    Refused,
    RequeueOutcome,
    RequeueReason,
    RunningTask,
    SweepReport,
    TokenBatch,
)

_DROPPED = ErrorEvent(
    code=ErrorCode.QUEUE_FULL,
    message="the queue was full and the task made room for interactive work: submit it again later",
    retriable=True,
)
_APPEND_OUTCOMES: dict[int, AppendOutcome] = {-1: "appended", -2: "covered", -3: "stale"}
_APPEND_CHUNK = 64
_DELETE_CHUNK = 32
"""Tasks a script: some milliseconds, in which Redis does nothing else."""
_MEMORY_READ_S = 1.0


class Store(ReadStore, FleetStore, HousekeepingStore):
    """Every transition of a task; reads, the fleet and housekeeping come from the bases."""

    @classmethod
    async def connect(
        cls, url: str, *, jobs: bool = False, timeout_s: float = 5.0, memory_watermark: float = 0.9
    ) -> Store:
        """A store that has reached Redis once.

        `url` is redis://, rediss://, unix:///path, redis+sentinel://host:port,host:port/service/db or
        redis+cluster://host:port,host:port. `jobs` says that background jobs are to run on it too, which Redis Cluster
        can't. `memory_watermark` is the share of `maxmemory` from which admissions are refused. Raises StoreUrlError,
        StoreUnavailableError.
        """
        if jobs and connection.parse_url(url).kind == "cluster":
            raise StoreUrlError("background jobs don't run on Redis Cluster: give them a single Redis (jobs_redis_url)")
        return cls(await connection.connect(url, timeout_s), memory_watermark=memory_watermark)

    async def admit(self, task: NewTask, limits: QueueLimits, *, now_ms: int | None = None) -> Admitted | Refused:
        """Queues a task. The same task_id or idempotency key with the same body gives the task that exists, with
        `created` false; with another body, or under another tenant's id, it is a conflict. A key whose task was
        cancelled because its reader left goes to a new one. Raises ValueError for a prefix hash with spaces."""
        reply = await self._run(
            "admit",
            moment(now_ms),
            uuid.uuid4().hex,
            limits.per_model,
            limits.per_tenant,
            limits.total,
            int(limits.policy == "drop_oldest_batch"),
            int(await self._is_memory_full()),
            task.payload,
            encode_data(_DROPPED),
            int(task.own_id),
            *codec.task_fields(task),
        )
        if reply[0] == b"refused":
            return codec.refused(reply)
        return codec.admitted(reply)

    async def _is_memory_full(self) -> bool:
        if self._memory_read_at is None or time.monotonic() - self._memory_read_at > _MEMORY_READ_S:
            self._memory_read_at = time.monotonic()
            self._memory_full = await self.memory_share() >= self._memory_watermark
        return self._memory_full

    async def claim(
        self,
        replica_id: str,
        model: str,
        version: int,
        assignments: Sequence[Assignment],
        *,
        now_ms: int | None = None,
    ) -> list[Claimed]:
        """Starts attempts, all in one step, for the assignments that still hold: task waiting and within its deadline,
        worker ready with a free slot, pin respected, the same weights and dtype when tokens were kept. Empty when
        `version` is no longer the model's: take a new snapshot and plan again. Charges the tenants."""
        if not assignments:
            return []
        flat = [part for pair in assignments for part in (pair.task_id, pair.worker_id, repr(float(pair.charge)))]
        rows = await self._run("claim", moment(now_ms), replica_id, model, version, uuid.uuid4().hex, *flat)
        claimed = await all_of(self._claimed(codec.running_task(row), payload) for row, payload in rows)
        return [one for one in claimed if one is not None]

    async def _claimed(self, task: RunningTask, payload: bytes | None) -> Claimed | None:
        ids = await self.token_ids(task.task_id) if task.tokens_logged else ()
        if payload is None or len(ids) != task.tokens_logged:
            return None  # cancelled and deleted since; a live one is found through `owned`
        return Claimed(task=task, payload=payload, resume_token_ids=ids)

    async def append(self, batches: Sequence[TokenBatch]) -> list[AppendOutcome]:
        """Appends tokens to their tasks' logs, in order, and wakes the followers. A batch that the log has in part is
        appended whole. Raises LogGapError, after the other batches were appended, when a batch starts beyond the end
        of its log; ValueError, before anything is, when a batch is empty or its indices aren't contiguous."""
        chunks = [batches[start : start + _APPEND_CHUNK] for start in range(0, len(batches), _APPEND_CHUNK)]
        outcomes: list[int] = []
        for arguments in [[part for batch in chunk for part in _batch_arguments(batch)] for chunk in chunks]:
            outcomes += await self._run("append", *arguments)
        for batch, outcome in zip(batches, outcomes, strict=True):
            if outcome >= 0:
                raise LogGapError(batch.task_id, outcome, batch.tokens[0].i)
        return [_APPEND_OUTCOMES[outcome] for outcome in outcomes]

    async def record_prompt_tokens(self, task_id: str, attempt: int, tokens_in: int) -> None:
        """Notes how many tokens the worker counted in the prompt; nothing when the attempt isn't the running one."""
        await self._run("record_prompt_tokens", task_id, attempt, tokens_in)

    async def complete(
        self, task_id: str, attempt: int, event: EndEvent | ErrorEvent, *, tokens: int = 0, now_ms: int | None = None
    ) -> bool:
        """Ends a running attempt's task: seals its log, frees the slot, settles virtual time, measures the service.
        False, and nothing changed, when the attempt isn't the running one. Raises LogGapError, and nothing changed,
        when the log holds fewer than `tokens` tokens: a failover has undone the end of it."""
        if isinstance(event, EndEvent):
            state = "cancelled" if event.stop_reason == "CANCELLED" else "completed"
            counts = (event.tokens_in, event.cached_tokens, int(state == "completed"))
        else:
            state, counts = "failed", (0, 0, 0)
        reply = await self._run(
            "complete",
            moment(now_ms),
            uuid.uuid4().hex,
            task_id,
            attempt,
            state,
            event.EVENT,
            encode_data(event),
            *counts,
            tokens,
        )
        if reply < 0:
            raise LogGapError(task_id, -1 - reply, tokens)
        return bool(reply)

    async def cancel(
        self,
        task_id: str,
        tenant: str | None,
        *,
        abandoned: bool = False,
        left: str | None = None,
        now_ms: int | None = None,
    ) -> CancelOutcome | None:
        """Ends a task that hasn't ended, with `end` CANCELLED; None when the tenant has no such task. `running` is the
        attempt to stop at its worker, whose slot stays taken until `release`. `abandoned`: nobody reads it; a
        repeat under its key begins anew. `left`: the same, as far as the replica whose reader left can know; nothing
        changes where a later reader is at another one."""
        given = int(abandoned or left is not None), left or ""
        reply = await self._run("cancel", moment(now_ms), uuid.uuid4().hex, task_id, tenant or "", *given)
        if reply is None:
            return None
        state, changed, row = reply
        running = codec.running_task(row) if row else None
        return CancelOutcome(status=codec.status(state.decode()), changed=bool(changed), running=running)

    async def attend(self, task_id: str, tenant: str | None, replica_id: str, *, now_ms: int | None = None) -> bool:
        """A client reads the task at this replica. False for one that has ended, or goes on whoever reads it."""
        return bool(await self._run("attend", moment(now_ms), task_id, tenant or "", replica_id))

    async def readers_lost(self, replica_id: str, *, now_ms: int | None = None) -> None:
        """Nobody who read at this replica until now does so any more."""
        await self._run("readers_lost", moment(now_ms), replica_id)

    async def unattended(
        self, grace_ms: int, *, limit: int = 1_000, now_ms: int | None = None
    ) -> list[tuple[str, bool]]:
        """Tasks that are to end with their reader, whose replica has gone; each with whether the grace is over."""
        flat = await self._run("unattended", moment(now_ms), grace_ms, limit)
        return [(flat[at].decode(), bool(flat[at + 1])) for at in range(0, len(flat), 2)]

    async def release(self, worker_id: str, task_id: str, attempt: int) -> None:
        """The worker has said that a stopped attempt holds its slot no more."""
        await self._run("release", worker_id, task_id, attempt)

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
    ) -> RequeueOutcome:
        """Sends a running attempt back to its old place, with its tokens; after `backoff_ms` where that isn't 0.

        `failure` counts it against the task, whose `max_failures`-th failure ends it with RETRIES_EXHAUSTED, naming
        `error`; `progressed` (tokens came in this attempt) forgives earlier ones first. A task whose deadline has
        passed ends too. "stale": the attempt isn't the running one, and nothing changed.
        """
        state, failures = await self._run(
            "requeue",
            moment(now_ms),
            uuid.uuid4().hex,
            task_id,
            attempt,
            reason,
            int(failure),
            int(progressed),
            avoid_worker or "",
            backoff_ms,
            max_failures,
            encode_data(_exhausted(max_failures, reason, error)),
        )
        return codec.requeue_outcome(state, failures)

    async def adopt(
        self, replica_id: str, *, limit: int = 64, healthy_ms: int | None = None, now_ms: int | None = None
    ) -> list[RunningTask]:
        """Takes over attempts that have no living owner: handed over, or owned by a replica whose lease has ended. Each
        goes to exactly one adopter. Leases are judged only once Redis has been reachable for as long as they last
        (`healthy_ms=None`: by this store's own experience)."""
        (rows,) = await self._run_judging("adopt", now_ms, healthy_ms, replica_id, limit)
        return codec.running_tasks(rows)

    async def sweep(self, *, limit: int = 64, healthy_ms: int | None = None, now_ms: int | None = None) -> SweepReport:
        """What time alone changes, up to `limit` of each: due retries wait again, missed deadlines end tasks, workers
        that were silent for a whole lease are lost (judged as `adopt` does). What ran on a lost worker is
        `running_on` it until it is requeued."""
        retried, expired, running, lost = await self._run_judging("sweep", now_ms, healthy_ms, uuid.uuid4().hex, limit)
        return SweepReport(
            retried=retried,
            expired_queued=expired,
            expired_running=tuple(codec.running_tasks(running)),
            workers_lost=tuple(worker.decode() for worker in lost),
        )

    async def delete_task(self, task_id: str) -> bool:
        """Forgets a task that has ended, its log and its idempotency record. False when it isn't there, lives, or has a
        webhook that is still to be delivered."""
        return await self.delete_tasks([task_id]) == 1

    async def delete_tasks(self, task_ids: Sequence[str]) -> int:
        """The same for many at once, each step a few; how many there were to forget."""
        deleted = 0
        for start in range(0, len(task_ids), _DELETE_CHUNK):
            deleted += await self._run("delete_task", *task_ids[start : start + _DELETE_CHUNK])
        return deleted

    def hints(self) -> HintReader:
        """Wake-ups by name: `log:<task_id>`, `queue`, `fleet`, `cancel:<task_id>`. An async context manager."""
        return HintReader(self._connection.client)

    async def audit(self, *, repair: bool = False, logs: bool = True) -> list[Finding]:
        """Every broken invariant of docs/redis-state.md, each judged at one instant of its own, so that it may run
        beside live traffic. `repair` mends what can be: places and indexes are made to say what the tasks say. `logs`
        reads every log whole, which takes a while where there are many."""
        return await audit(self._connection, repair=repair, logs=logs)

    async def audit_from(self, place: AuditPlace | None, *, budget_s: float) -> tuple[list[Finding], AuditPlace | None]:
        """The same with `repair` and without `logs`, for as long as the budget lasts, at half speed. A place is where
        the next call goes on; None at the beginning and, returned, at the end."""
        return await audit_from(self._connection, place or AuditPlace(), repair=True, logs=False, budget_s=budget_s)


def _batch_arguments(batch: TokenBatch) -> tuple[str | int | bytes, ...]:
    tokens = batch.tokens
    if not tokens or any(token.i != tokens[0].i + offset for offset, token in enumerate(tokens)):
        raise ValueError(f"task {batch.task_id}: a batch must hold tokens with contiguous indices")
    return batch.task_id, batch.attempt, tokens[0].i, tokens[-1].i, codec.encode_tokens(tokens)


def _exhausted(max_failures: int, reason: RequeueReason, error: ErrorEvent | None) -> ErrorEvent:
    last = reason if error is None else f"{error.code}: {error.message}"
    return ErrorEvent(
        code=ErrorCode.RETRIES_EXHAUSTED,
        message=f"given up after {max_failures} failed attempts without progress; the last one failed with {last}",
    )
