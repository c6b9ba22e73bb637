"""The store's part that only reads: tasks, queues, logs."""

from __future__ import annotations

from llorch_wire.events import TERMINAL_SEQUENCE, parse_position
from llorch_wire.tasks import TaskStatus
from orchestratord.store import codec
from orchestratord.store.base import StoreBase, moment
from orchestratord.store.keys import encode, key, split
from orchestratord.store.types import LogEntry, QueueDepth, RunningTask, Snapshot, TaskRecord

_LOG_CHUNK = 512


class ReadStore(StoreBase):
    """Reads. See `orchestratord.store.store.Store`."""

    async def models(self) -> list[str]:
        """Every model that was ever registered."""
        client = self._connection.client
        members: set[bytes] = await self._connection.call(lambda: client.smembers(key("models")))
        return sorted(member.decode() for member in members)

    async def model_known(self, model: str) -> bool:
        """Whether a worker ever registered with this model."""
        client = self._connection.client
        return bool(await self._connection.call(lambda: client.sismember(key("models"), model)))

    async def waiting_models(self) -> list[str]:
        """Models with tasks that could be claimed; those that wait out a backoff don't count."""
        client = self._connection.client
        names: list[bytes] = await self._connection.call(lambda: client.hkeys(key("waiting")))
        return sorted(name.decode() for name in names)

    async def snapshot(self, model: str, *, per_queue: int = 16, now_ms: int | None = None) -> Snapshot:
        """One model's queues (the first `per_queue` tasks of each), workers and attempts in flight, all of one instant.
        What waits is in order of admission."""
        version, now, waiting, running, workers, virtual, warm = await self._run(
            "snapshot", moment(now_ms), model, per_queue
        )
        tasks = [codec.queued_task(row, session) for row, session in waiting]
        views = [codec.worker_view(row) for row in workers]
        return Snapshot(
            model=model,
            version=int(version),
            now_ms=int(now),
            waiting=tuple(sorted(tasks, key=lambda task: task.sequence)),
            running=tuple(codec.running_tasks(running)),
            workers=tuple(sorted(views, key=lambda view: view.worker_id)),
            virtual_times={
                tenant.decode(): float(value) for tenant, value in zip(virtual[::2], virtual[1::2], strict=True)
            },
            prefix_workers={
                prefix.decode(): tuple(where.decode().split())
                for prefix, where in zip(warm[::2], warm[1::2], strict=True)
            },
        )

    async def owned(self, replica_id: str) -> list[RunningTask]:
        """Attempts in flight that this replica relays, oldest first; also those whose `claim` it never got the answer
        of."""
        return codec.running_tasks(await self._run("owned", "owned", replica_id))

    async def running_on(self, worker_id: str) -> list[RunningTask]:
        """Attempts in flight at a worker, whoever owns them, oldest first."""
        return codec.running_tasks(await self._run("owned", "running", worker_id))

    async def task(self, task_id: str, tenant: str | None) -> TaskRecord | None:
        """One task; None when it doesn't exist or is another tenant's. `tenant=None` reads anybody's."""
        row = (await self._run("task", tenant or "", task_id))[0]
        return None if row is None else codec.task_record(*row)

    async def list_tasks(
        self,
        tenant: str,
        *,
        status: TaskStatus | None = None,
        model: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> tuple[list[TaskRecord], str | None]:
        """A page of a tenant's tasks, newest first, and the cursor of the next page (None: this was the last). Raises
        ValueError when `after` isn't such a cursor."""
        if after is not None and not (after.isascii() and after.isdigit() and len(after) <= 16):
            raise ValueError(f"not a cursor of this listing: {after[:64]!r}")
        statuses = codec.STATUSES if status is None else (status,)
        rows = await self._run("list_tasks", tenant, model or "", limit + 1, after or "+inf", *statuses)
        records = [codec.task_record(*row) for row in rows[:limit]]
        return records, codec.record_sequence(rows[limit - 1][0]) if len(rows) > limit else None

    async def queue(self, *, now_ms: int | None = None) -> list[QueueDepth]:
        """Waiting tasks by (model, priority, tenant), in that order; none with depth 0."""
        now, rows = await self._run("queue", moment(now_ms))
        depths: dict[tuple[str, str, str], tuple[int, int]] = {}
        for model, tail, depth, created in rows:
            _, (_, priority, tenant, *_) = split(f"{key('queue', model.decode())}:{tail.decode()}")
            group = (model.decode(), priority, tenant)
            before = depths.get(group, (0, int(now)))
            depths[group] = (before[0] + depth, min(before[1], int(created)))
        return [
            QueueDepth(
                model=model,
                priority="interactive" if priority == encode("interactive") else "batch",
                tenant=tenant,
                depth=depth,
                oldest_age_ms=max(0, int(now) - oldest),
            )
            for (model, priority, tenant), (depth, oldest) in sorted(depths.items())
        ]

    async def read_log(self, task_id: str, *, after: str = "0-0", limit: int = 512) -> list[LogEntry]:
        """Entries that end after the position, oldest first; empty when there are none (yet) or no such task. An entry
        may hold tokens at or before `after`, and tokens that an earlier entry held too: readers strip by index. Raises
        ValueError when `after` isn't a position."""
        codec.check_position(after)
        client = self._connection.client
        entries = await self._connection.call(lambda: client.xrange(key("log", task_id), min=f"({after}", count=limit))
        return [codec.log_entry(position, values) for position, values in entries]

    async def log_bounds(self, task_id: str) -> tuple[str, str, bool] | None:
        """First position, last position and whether the log is sealed; None when there is no log."""
        bounds = await self._run("log_bounds", task_id)
        if bounds is None:
            return None
        first, last = (position.decode() for position in bounds)
        return first, last, parse_position(last)[1] == TERMINAL_SEQUENCE

    async def payload(self, task_id: str) -> bytes | None:
        """What the worker needs to run the task; None once it has ended."""
        client = self._connection.client
        return await self._connection.call(lambda: client.get(key("payload", task_id)))

    async def token_ids(self, task_id: str) -> tuple[int, ...]:
        """Ids of every token in the task's log, by index."""
        client = self._connection.client
        ids: list[int] = []
        after = "0-0"
        while True:
            start = f"({after}"
            entries = await self._connection.call(
                lambda start=start: client.xrange(key("log", task_id), min=start, count=_LOG_CHUNK)
            )
            for position, values in entries:
                after = position.decode()
                if b"tokens" in values:
                    first, more = codec.decode_token_ids(values[b"tokens"])
                    ids.extend(more[len(ids) - first :])
            if len(entries) < _LOG_CHUNK:
                return tuple(ids)

    async def finished(self, before_ms: int, *, limit: int = 500, skip: int = 0) -> list[str]:
        """Ids of tasks that ended at or before a time, oldest first, without the first `skip`."""
        client = self._connection.client
        ids: list[bytes] = await self._connection.call(
            lambda: client.zrangebyscore(key("done"), "-inf", before_ms, start=skip, num=limit)
        )
        return [task_id.decode() for task_id in ids]
