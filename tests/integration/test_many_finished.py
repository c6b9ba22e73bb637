"""Finished tasks by the thousand: memory has a bound, a view costs what its page costs, and retention takes only what
has ended, and all of it, while new tasks come and go."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any, cast

import aiohttp
import pytest
from redis.asyncio import Redis

from orchestratord.jobs.retention import PAGE, Retention
from orchestratord.jobs.runner import Jobs
from orchestratord.jobs.webhooks import WebhookPolicy, Webhooks
from orchestratord.observations import Observations
from orchestratord.patience import end_tasks
from orchestratord.runtime import Orchestrator
from orchestratord.store.store import Store
from tests.api.harness import serving
from tests.integration.house import TENANT, RedisProcess, Town, check_stream, read_all, tokens_of, until
from tests.support.redis_server import RedisServer, redis_server
from tests.support.redis_work import Work, counted
from tests.support.seeding import MODEL, seed_finished

FEW = 500
LISTED = 50
NOISE = 600
"""Elements that the loops of an idle orchestrator and its workers' heartbeats may read meanwhile."""


@pytest.fixture
def server(missing_service: Any) -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture
async def town(server: RedisServer) -> AsyncIterator[Town]:
    town = Town(cast(RedisProcess, server))
    yield town
    await town.close()


class Living:
    """Tasks that live all the time: some wait for a worker that never comes, some run for ever."""

    def __init__(self, town: Town) -> None:
        self.town = town
        self.waiting: list[str] = []
        self.running: list[str] = []

    async def begin(self) -> None:
        await self.town.worker("slow", model="slow", token_ms=150, slots=4)
        placement = {"mode": "pin", "pin_worker": "nobody"}
        self.waiting = [await self.town.submit(model="slow", placement=placement) for _ in range(4)]
        self.running = [await self.town.submit(model="slow", max_tokens=5_000, ignore_eos=True) for _ in range(4)]
        for task_id in self.running:
            await until(lambda task_id=task_id: self.has(task_id, "running"), f"{task_id} runs")

    async def has(self, task_id: str, status: str) -> bool:
        return (await self.town.any.task(task_id, None)).record.status == status

    async def end(self) -> None:
        """All of them are as they were; cancelled, each ends once, after every token that it had."""
        assert all([await self.has(task_id, "queued") for task_id in self.waiting])
        assert all([await self.has(task_id, "running") for task_id in self.running])
        for task_id in self.waiting + self.running:
            assert (await self.town.any.cancel(task_id, None)).record.status == "cancelled"
        for task_id in self.running:
            items = await read_all(self.town.any.follow(task_id, None))
            indices = [token.i for token in tokens_of(items)]
            assert len(indices) > 1 and indices == list(range(len(indices)))


@contextlib.asynccontextmanager
async def retaining(town: Town, store: Store, *, keep_count: int) -> AsyncGenerator[Observations]:
    """The real jobs, whose retention is asked for again and again instead of every 30 s."""
    observations = Observations()
    webhooks = Webhooks(store, town.any, observations, WebhookPolicy(None, 1, allow_private=False))
    retention = Retention(store, observations, keep_s=3_600, keep_count=keep_count)
    jobs = Jobs(town.redis.url, store, observations, webhooks, retention)
    redis = jobs._connect()

    async def ask() -> None:
        while True:
            await redis.enqueue_job("retention", _job_id="asked-for")  # nothing while the last one is at it
            await asyncio.sleep(0.1)

    parts = [asyncio.create_task(jobs.run()), asyncio.create_task(ask())]
    try:
        yield observations
    finally:
        await end_tasks(parts)
        await redis.aclose(close_connection_pool=True)


async def seeded(server: RedisServer, count: int) -> list[str]:
    """So many finished tasks more, while nobody else is there who would take them on."""
    store = await Store.connect(server.url)
    task_ids = await seed_finished(store, count)
    await store.aclose()
    return task_ids


async def views(town: Town, server: RedisServer, task_id: str) -> dict[str, Work]:
    """What Redis does for each view of an orchestrator that has nothing else to do."""
    orchestrator = await town.replica()
    async with serving(orchestrator) as url:
        done = await viewed(url, server, task_id)
    await town.kill(orchestrator)
    return done


async def viewed(url: str, server: RedisServer, task_id: str) -> dict[str, Work]:
    listing = f"/v2/tasks?limit={LISTED}"
    async with aiohttp.ClientSession(url) as http:

        async def get(path: str) -> Any:
            async with http.get(path) as reply:
                assert reply.status == 200, await reply.text()
                return await reply.json() if "json" in reply.content_type else await reply.read()

        page = await get(listing)
        assert len(page["tasks"]) == LISTED
        paths = {
            "first page": listing,
            "second page": f"{listing}&after={page['next']}",
            "page of a status and a model": f"{listing}&status=completed&model={MODEL}",
            "task": f"/v2/tasks/{task_id}",
            "events": f"/v2/tasks/{task_id}/events",
            "queue": "/v2/queue",
            "models": "/v1/models",
            "workers": "/v2/workers",
            "metrics": "/metrics",
        }
        done: dict[str, Work] = {}
        with contextlib.closing(server.client()) as client:
            for name, path in paths.items():
                with counted(client) as work:
                    await get(path)
                done[name] = work
        return done


def memory_of(server: RedisServer) -> int:
    with contextlib.closing(server.client()) as client:
        return int(cast(dict[str, Any], client.info("memory"))["used_memory"])


async def serve_new_tasks(orchestrator: Orchestrator, town: Town, served: list[str]) -> None:
    """Admit, follow, compare with an undisturbed run; for ever."""
    while True:
        seed = len(served)
        task_id = await town.submit(seed=seed, at=orchestrator)
        check_stream(await read_all(orchestrator.follow(task_id, TENANT)), seed, 20)
        served.append(task_id)


@pytest.mark.parametrize("count", [6_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
async def test_finished_tasks_by_the_thousand(town: Town, server: RedisServer, count: int) -> None:
    keep = count // 20
    empty = memory_of(server)
    first = await seeded(server, FEW)
    few = await views(town, server, first[0])
    await seeded(server, count - FEW)
    full = memory_of(server)
    many = await views(town, server, first[0])
    for name, work in many.items():
        assert work.elements <= few[name].elements + NOISE, (name, work.elements, few[name].elements)
        assert work.largest[0] <= 4 * LISTED, (name, work.largest)

    orchestrator = await town.replica()
    store = town.replicas[-1].store
    await town.worker("w1", token_ms=1)
    living = Living(town)
    await living.begin()
    served: list[str] = []
    begun = time.monotonic()
    async with retaining(town, store, keep_count=keep) as observations, asyncio.TaskGroup() as group:
        serving_new = [group.create_task(serve_new_tasks(orchestrator, town, served)) for _ in range(3)]

        async def is_retained() -> bool:
            return await store.finished_count() <= keep + PAGE

        await until(is_retained, "the surplus is gone", 120)
        took_s = time.monotonic() - begun
        before = len(served)
        await until(
            lambda: len(served) >= before + 20 and observations.counters["tasks_retired", ""] > 0, "tasks go on"
        )
        await end_tasks(serving_new)
    print(f"{count} tasks, {(full - empty) / count:.0f} bytes each, dropped in {took_s:.0f} s; {len(served)} served")
    assert memory_of(server) - empty <= (full - empty) * (0.05 + keep / count) * 1.25
    await nothing_is_left_of(server, first)
    await living.end()
    await town.audit()


async def nothing_is_left_of(server: RedisServer, task_ids: list[str]) -> None:
    """No key holds one of these tasks' ids in its name. (What is inside of sets and indexes, `audit` looks at.)"""
    gone = set(task_ids)
    client = Redis.from_url(server.url)
    async for name in client.scan_iter(count=1000):
        assert not gone & set(name.decode().replace("%20", ":").split(":")), name
    await client.aclose()
