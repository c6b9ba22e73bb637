"""arq inside orchestratord: one Worker a replica, its schedule, and how it survives Redis' absence.

Read `Jobs.run` first.

    job                     when                        who
    retention               every 30 s                  one replica a period
    sweep (audit, repair)   every 5 min, for 9 s        one replica a period; goes on where the last one ended
    webhook:<task>:<tries>  when it is due, at 1 s       whichever takes it; another one after its death

arq's habits, and what is done about each: it pickles → JSON; it installs signal handlers → not here; its loop ends at
the first Redis error → it is built anew after a pause; it re-runs a killed job after job_timeout + 10 s → a timeout of
15 s; a period's job may be queued a second time by a replica that is late → SET NX on the period; on closing it warns
and may raise → it is taken down here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from signal import SIGUSR1
from typing import Any

import msgspec
import orjson
import structlog
from arq import Worker, cron
from arq.connections import ArqRedis
from arq.worker import func
from redis.exceptions import RedisError

from llorch_wire.errors import LlorchError
from orchestratord.jobs.retention import Retention
from orchestratord.jobs.webhooks import Webhooks
from orchestratord.logging import describe_exception
from orchestratord.observations import Observations
from orchestratord.patience import end_tasks
from orchestratord.store.audit import AuditPlace
from orchestratord.store.connection import make_client, parse_url
from orchestratord.store.errors import StoreUrlError
from orchestratord.store.store import Store

QUEUE = "arq:llorch"
JOB_TIMEOUT_S = 15
POLL_S = 0.5
WEBHOOK_POLL_S = 1.0
RETENTION_AT = (0, 30)
"""Seconds of each minute."""
SWEEP_BUDGET_S = 9.0
"""Below the jobs' timeout, whose length a killed replica's webhook waits for. What is left over is the next sweep's."""
SWEEP_PLACE = "arq:llorch:sweep-place"
SWEEP_PLACE_S = 86_400
FULL_SHARE = 0.98
"""Of `maxmemory`. From there on a write may be refused."""
PAUSE_S = 1.0
CLOSE_S = 3.0
REDIS_TIMEOUT_S = 5.0
_FAILURES = (RedisError, OSError, TimeoutError, LlorchError)


def serialize(value: dict[str, Any]) -> bytes:
    """A job as JSON; what JSON doesn't know (an exception) by its type's name, never by its message."""
    return orjson.dumps(value, default=lambda thing: type(thing).__name__)


class Jobs:
    """The background jobs of one replica."""

    def __init__(
        self, url: str, store: Store, observations: Observations, webhooks: Webhooks, retention: Retention
    ) -> None:
        """Raises StoreUrlError for a Redis Cluster."""
        self._target = parse_url(url)
        if self._target.kind == "cluster":
            raise StoreUrlError("background jobs don't run on Redis Cluster: give them a single Redis (jobs_redis_url)")
        self._store = store
        self._observations = observations
        self._webhooks = webhooks
        self._retention = retention
        self._log = structlog.get_logger("orchestratord.jobs")

    async def run(self) -> None:
        """Work until cancelled. Redis' absence is waited out."""
        complained = False
        while True:
            redis = self._connect()
            worker = self._worker(redis)
            try:
                async with asyncio.TaskGroup() as group:
                    parts = [group.create_task(worker.async_run()), group.create_task(self._feed_webhooks(redis))]
                    try:
                        await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        await end_tasks(parts)  # a group cancels once, which may get lost
            except* _FAILURES as failures:
                if not complained:
                    self._log.warning("background jobs pause", **describe_exception(failures.exceptions[0]))
                complained = True
            except* Exception as failures:  # the daemon outlives whatever happens here
                self._log.error("background jobs failed", **describe_exception(failures.exceptions[0]))
            finally:
                await _take_down(worker, redis)
            await self._make_room()
            await asyncio.sleep(PAUSE_S)

    async def _make_room(self) -> None:
        """Drop finished tasks where Redis is so full that arq can't write, and so can't start the job that would."""
        with contextlib.suppress(*_FAILURES):
            async with asyncio.timeout(JOB_TIMEOUT_S):
                if await self._store.memory_share() >= FULL_SHARE:
                    await self._retention.run()

    def _connect(self) -> ArqRedis:
        client = make_client(self._target, REDIS_TIMEOUT_S)
        return ArqRedis(
            client.connection_pool, job_serializer=serialize, job_deserializer=orjson.loads, default_queue_name=QUEUE
        )

    def _worker(self, redis: ArqRedis) -> Worker:
        return Worker(
            [func(self._deliver, name="deliver")],
            cron_jobs=[
                cron(self._retain, name="retention", second=set(RETENTION_AT)),
                cron(self._sweep, name="sweep", minute=set(range(0, 60, 5)), second=15),
            ],
            redis_pool=redis,
            queue_name=QUEUE,
            handle_signals=False,
            job_timeout=JOB_TIMEOUT_S,
            keep_result=0,
            poll_delay=POLL_S,
            max_jobs=20,
            job_serializer=serialize,
            job_deserializer=orjson.loads,
            log_results=False,
        )

    async def _feed_webhooks(self, redis: ArqRedis) -> None:
        """Queue what is due. The job's id makes a second queueing of the same try, here or elsewhere, do nothing."""
        while True:
            for task_id, tries in await self._store.due_webhooks():
                await redis.enqueue_job("deliver", task_id, tries, _job_id=f"webhook:{task_id}:{tries}")
            await asyncio.sleep(WEBHOOK_POLL_S)

    async def _deliver(self, ctx: dict[str, Any], task_id: str, tries: int) -> None:
        await self._quietly("deliver", lambda: self._webhooks.deliver(task_id, tries))

    async def _retain(self, ctx: dict[str, Any]) -> None:
        await self._quietly("retention", lambda: _once(ctx, "retention", self._retention.run))

    async def _sweep(self, ctx: dict[str, Any]) -> None:
        await self._quietly("sweep", lambda: _once(ctx, "sweep", lambda: self.audit(ctx["redis"])))

    async def audit(self, redis: ArqRedis) -> None:
        """Check the store's invariants and mend what can be, from where the last sweep ended, here or at another
        replica; each finding is logged and counted."""
        findings, place = await self._store.audit_from(await _place_in(redis), budget_s=SWEEP_BUDGET_S)
        if place is None:
            await redis.delete(SWEEP_PLACE)
        else:
            await redis.set(SWEEP_PLACE, place.encode(), ex=SWEEP_PLACE_S)
        for finding in findings:
            self._observations.count("audit_findings", finding.invariant)
            self._log.warning(
                "broken invariant",
                invariant=finding.invariant,
                key=finding.key,
                detail=finding.detail,
                repaired=finding.repaired,
            )

    async def _quietly(self, name: str, job: Callable[[], Awaitable[object]]) -> None:
        """Run a job; its failure is logged here, by type and place, since arq would log and store its message. One that
        takes too long, as when Redis stands still, fails before arq ends it."""
        try:
            async with asyncio.timeout(JOB_TIMEOUT_S - 1):
                await job()
        except Exception as error:
            self._log.warning("background job failed", job=name, **describe_exception(error))


async def _place_in(redis: ArqRedis) -> AuditPlace | None:
    """Where the last sweep ended; None when it came to the end, or what it left can't be read."""
    text: bytes | None = await redis.get(SWEEP_PLACE)
    with contextlib.suppress(msgspec.MsgspecError):
        return None if text is None else AuditPlace.decode(text)
    return None


async def _once(ctx: dict[str, Any], name: str, job: Callable[[], Awaitable[object]]) -> None:
    """Run a period's job unless somebody has begun it. `score` is the time it was scheduled for, alike everywhere."""
    redis: ArqRedis = ctx["redis"]
    if await redis.set(f"arq:llorch:once:{name}:{ctx['score']}", b"1", nx=True, ex=3600):
        await job()


async def _take_down(worker: Worker, redis: ArqRedis) -> None:
    """End a Worker without its own `close`, which calls a deprecated method and raises when Redis is away.

    Jobs that are cancelled here are run again at once, by another replica.
    """
    worker.handle_sig(SIGUSR1)  # cancels its tasks; no signal is involved
    with contextlib.suppress(*_FAILURES):
        async with asyncio.timeout(CLOSE_S):
            await asyncio.gather(*worker.tasks.values(), return_exceptions=True)
            await redis.delete(worker.health_check_key)
    with contextlib.suppress(*_FAILURES):
        await redis.aclose(close_connection_pool=True)
