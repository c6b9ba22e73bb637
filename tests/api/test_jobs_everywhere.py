"""Background jobs with several replicas, and beside a Redis Cluster, on which they can't run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import cast

import pytest
from redis.asyncio import Redis

from orchestratord.jobs import runner
from orchestratord.jobs.retention import Retention
from orchestratord.jobs.runner import Jobs
from orchestratord.jobs.webhooks import WebhookPolicy, Webhooks
from orchestratord.observations import Observations
from orchestratord.patience import end_tasks
from orchestratord.store.errors import StoreUrlError
from tests.api.harness import DEADLINE_S, until
from tests.api.test_jobs import SECRET, Receiver
from tests.api.test_jobs import receiver as receiver
from tests.integration.house import RedisProcess, Town
from tests.support.redis_server import cluster_group, redis_server


class CountingRetention(Retention):
    """Counts its runs."""

    runs = 0

    async def run(self) -> int:
        self.runs += 1
        return await super().run()


@contextlib.asynccontextmanager
async def working(*all_jobs: Jobs) -> AsyncGenerator[None]:
    """They run meanwhile."""
    running = [asyncio.create_task(jobs.run()) for jobs in all_jobs]
    try:
        yield
    finally:
        await end_tasks(running)


async def jobs_of(town: Town, url: str, retention: Retention | None = None) -> Jobs:
    """One more replica with its jobs."""
    orchestrator = await town.replica()
    store, observations = town.replicas[-1].store, orchestrator.observations
    webhooks = Webhooks(store, orchestrator, observations, WebhookPolicy(SECRET, 3, allow_private=True))
    return Jobs(url, store, observations, webhooks, retention or _retention(town, 1_000))


def _retention(town: Town, keep_count: int) -> CountingRetention:
    return CountingRetention(town.replicas[-1].store, Observations(), keep_s=3_600, keep_count=keep_count)


async def test_each_period_is_one_replicas(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three replicas whose schedules come round every second: each period's run is one's, whichever it is."""
    monkeypatch.setattr(runner, "RETENTION_AT", tuple(range(60)))
    await town.replica()
    retentions = [_retention(town, 1_000) for _ in range(3)]
    client = Redis.from_url(town.redis.url)
    periods: list[bytes] = []
    async with working(*[await jobs_of(town, town.redis.url, each) for each in retentions]), asyncio.timeout(60):
        while len(periods) < 4:
            periods = [key async for key in client.scan_iter(match="arq:llorch:once:retention:*")]
            await asyncio.sleep(0.05)
    periods = [key async for key in client.scan_iter(match="arq:llorch:once:retention:*")]
    await client.aclose()
    assert sum(each.runs for each in retentions) == len(periods) >= 4


async def test_beside_a_cluster_they_have_a_redis_of_their_own(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks, webhooks that are due and what has finished are in the cluster; arq's queue is in the other Redis."""
    monkeypatch.setattr(runner, "RETENTION_AT", tuple(range(60)))
    with cluster_group(3) as group, redis_server() as own:
        town = Town(cast(RedisProcess, group))
        orchestrator = await town.replica()
        await town.worker(token_ms=1)
        with pytest.raises(StoreUrlError, match="jobs_redis_url"):
            await jobs_of(town, group.url)
        jobs = await jobs_of(town, own.url, _retention(town, 2))
        async with working(jobs):
            ids = [await town.submit(callback_url=receiver.url, max_tokens=3) for _ in range(5)]
            for task_id in ids:
                await town.finished(task_id)
            await until(lambda: len({headers["X-Llorch-Delivery"] for headers, _ in receiver.got}) == 5)
            store = town.replicas[0].store
            async with asyncio.timeout(DEADLINE_S):
                while await store.finished_count() > 2:
                    await asyncio.sleep(0.05)
            redis = jobs._connect()
            await jobs.audit(redis)
            await redis.aclose(close_connection_pool=True)
        assert not [name async for name in store._connection.client.scan_iter(match="arq:*")]
        client = Redis.from_url(own.url)
        names = [name async for name in client.scan_iter()]
        await client.aclose()
        assert names and all(name.startswith(b"arq:") for name in names)
        assert orchestrator.observations.counters["audit_findings", "task-in-one-place"] == 0
        await town.audit()
        await town.close()
