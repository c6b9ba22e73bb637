"""Background jobs on a real Redis: retention, one run a period, webhooks that survive the replica that sends them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from orchestratord.jobs import runner
from orchestratord.jobs.retention import Retention
from orchestratord.jobs.runner import Jobs
from orchestratord.jobs.webhooks import WebhookPolicy, Webhooks, delivery_id, sign
from orchestratord.observations import Observations
from orchestratord.runtime import Orchestrator
from orchestratord.store.store import Store
from tests.api.daemon import Daemon
from tests.api.harness import DEADLINE_S, until
from tests.integration.house import RedisProcess, Town
from tests.support.scripted_worker import ScriptedWorker

SECRET = "webhook-secret-1"
TASK = "scripted"


class Receiver:
    """A webhook receiver that answers as told and keeps what came."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.hold: asyncio.Event | None = None
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.got.append((dict(request.headers), await request.read()))
        if self.hold is not None:
            await self.hold.wait()
        status = self.statuses.pop(0) if self.statuses else 200
        return web.Response(status=status, headers={"Location": self.url} if status == 302 else {})


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hook", receiver.handle)
    served = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await served.setup()
    site = web.TCPSite(served, "127.0.0.1", 0)
    await site.start()
    receiver.url = f"http://127.0.0.1:{served.addresses[0][1]}/hook"
    yield receiver
    if receiver.hold is not None:
        receiver.hold.set()
    await served.cleanup()


@contextlib.asynccontextmanager
async def working(
    town: Town, *, attempts: int = 3, **keep: Any
) -> AsyncIterator[tuple[Orchestrator, Store, Observations]]:
    """An orchestrator with its jobs running beside it."""
    orchestrator = await town.replica()
    store = town.replicas[-1].store
    observations = orchestrator.observations
    policy = WebhookPolicy(SECRET, attempts, allow_private=True)
    webhooks = Webhooks(store, orchestrator, observations, policy, jitter=lambda: 0.0)
    retention = Retention(store, observations, **{"keep_s": 3600, "keep_count": 1000, **keep})
    jobs = Jobs(town.redis.url, store, observations, webhooks, retention)
    running = asyncio.create_task(jobs.run())
    try:
        yield orchestrator, store, observations
    finally:
        running.cancel()
        await asyncio.wait({running}, timeout=DEADLINE_S)


async def test_a_webhook_is_signed_and_sent_once(town: Town, receiver: Receiver) -> None:
    async with working(town) as (orchestrator, store, observations):
        await town.worker()
        task_id = await town.submit(callback_url=receiver.url, seed=4)
        await until(lambda: observations.counters["webhooks", "delivered"] == 1)
        ((headers, body),) = receiver.got
        assert headers["X-Llorch-Delivery"] == delivery_id(task_id)
        signature = sign(SECRET, int(headers["X-Llorch-Timestamp"]), delivery_id(task_id), body)
        assert headers["X-Llorch-Signature"] == signature
        said = json.loads(body)
        text = (await orchestrator.task(task_id, None)).text
        assert (said["type"], said["task"]["task_id"], said["task"]["text"]) == ("task.completed", task_id, text)
        assert await store.due_webhooks(now_ms=2**52) == []
        assert await store.webhook_tries(task_id) is None


async def test_a_cancelled_task_tells_too_and_failures_are_tried_again(
    town: Town,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("orchestratord.jobs.webhooks.FIRST_DELAY_MS", 10)
    receiver.statuses = [500, 302]
    async with working(town) as (orchestrator, _, observations):
        await (await town.worker()).die()
        task_id = await town.submit(callback_url=receiver.url)
        await orchestrator.cancel(task_id, None)
        await until(lambda: observations.counters["webhooks", "delivered"] == 1)
        assert observations.counters["webhooks", "failed"] == 2, "a redirect is not followed"
        assert len({headers["X-Llorch-Delivery"] for headers, _ in receiver.got}) == 1
        assert len(receiver.got) == 3
        assert json.loads(receiver.got[-1][1])["type"] == "task.cancelled"


async def test_a_webhook_is_given_up_in_the_end(
    town: Town,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("orchestratord.jobs.webhooks.FIRST_DELAY_MS", 10)
    receiver.statuses = [500] * 9
    async with working(town, attempts=2) as (orchestrator, store, observations):
        await (await town.worker()).die()
        await orchestrator.cancel(await town.submit(callback_url=receiver.url), None)
        await until(lambda: observations.counters["webhooks", "given_up"] == 1)
        assert len(receiver.got) == 2
        receiver.statuses = [410]
        await orchestrator.cancel(await town.submit(callback_url=receiver.url), None)
        await until(lambda: observations.counters["webhooks", "refused"] == 1)
        assert await store.due_webhooks(now_ms=2**52) == []


async def test_two_replicas_deliver_each_webhook_once(town: Town, receiver: Receiver) -> None:
    async with working(town) as (first, _, seen_a), working(town) as (_, _, seen_b):
        await (await town.worker()).die()
        for _ in range(20):
            await first.cancel(await town.submit(callback_url=receiver.url), None)
        await until(lambda: seen_a.counters["webhooks", "delivered"] + seen_b.counters["webhooks", "delivered"] >= 20)
        assert len(receiver.got) == 20
        assert len({headers["X-Llorch-Delivery"] for headers, _ in receiver.got}) == 20


async def test_a_private_address_is_blocked_although_it_was_admitted(town: Town, receiver: Receiver) -> None:
    orchestrator = await town.replica()
    store = town.replicas[-1].store
    await (await town.worker()).die()
    task_id = await town.submit(callback_url=receiver.url)
    await orchestrator.cancel(task_id, None)
    policy = WebhookPolicy(SECRET, 3, allow_private=False)
    await Webhooks(store, orchestrator, orchestrator.observations, policy).deliver(task_id, 0)
    assert orchestrator.observations.counters["webhooks", "blocked"] == 1
    assert receiver.got == [] and await store.webhook_tries(task_id) is None


async def test_jobs_wait_out_redis(town: Town, receiver: Receiver) -> None:
    async with working(town) as (orchestrator, _, observations):
        await (await town.worker()).die()
        town.redis.kill()
        town.redis.start()
        async with asyncio.timeout(DEADLINE_S):
            while True:
                with contextlib.suppress(Exception):
                    await orchestrator.cancel(await town.submit(callback_url=receiver.url), None)
                    break
                await asyncio.sleep(0.05)
        await until(lambda: observations.counters["webhooks", "delivered"] >= 1)


async def test_retention_drops_the_old_and_the_surplus(town: Town) -> None:
    orchestrator = await town.replica()
    store = town.replicas[-1].store
    await (await town.worker()).die()
    ids = [await town.submit() for _ in range(12)]
    for task_id in ids[:10]:
        await orchestrator.cancel(task_id, None)
    client = Redis.from_url(town.redis.url)

    async def kept() -> list[str]:
        return [task_id for task_id in ids if await store.task(task_id, None) is not None]

    seen = Observations()
    assert await Retention(store, seen, keep_s=3600, keep_count=10).run() == 0
    assert await Retention(store, seen, keep_s=3600, keep_count=4).run() == 6
    assert await kept() == ids[6:]
    in_an_hour = Retention(store, seen, keep_s=3600, keep_count=10, now_s=lambda: time.time() + 3700)
    assert await in_an_hour.run() == 4
    assert await kept() == ids[10:], "what has not ended is never dropped"
    assert seen.counters["tasks_retired", ""] == 10
    left = [key async for key in client.scan_iter(match="{o}:log:*")]
    assert len(left) == 2
    await client.aclose()
    await town.audit()


async def test_finished_tasks_go_early_while_memory_is_short(town: Town) -> None:
    """The alternative would be to refuse every admission until they are old enough."""
    orchestrator = await town.replica()
    store = town.replicas[-1].store
    await (await town.worker()).die()
    ids = [await town.submit() for _ in range(6)]
    for task_id in ids[:5]:
        await orchestrator.cancel(task_id, None)
    seen = Observations()
    in_two_minutes = Retention(store, seen, keep_s=3600, keep_count=1000, now_s=lambda: time.time() + 120)
    assert await in_two_minutes.run() == 0
    client = Redis.from_url(town.redis.url)
    used = (await client.info("memory"))["used_memory"]
    await client.config_set("maxmemory", int(used / 0.85))
    assert await Retention(store, seen, keep_s=3600, keep_count=1000).run() == 0, "none of them is a minute old"
    assert await in_two_minutes.run() == 5
    assert await store.task(ids[5], None) is not None
    await client.config_set("maxmemory", 0)
    await client.aclose()
    await town.audit()


async def test_a_redis_that_takes_no_write_at_all_is_relieved_too(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where jobs can't be queued, the one that makes room would never run. Accepted tasks' tokens may fill Redis."""
    monkeypatch.setattr(runner, "RETENTION_AT", range(60))
    later = time.time() + 120
    async with working(town, now_s=lambda: later) as (orchestrator, store, _):
        await (await town.worker()).die()
        ids = [await town.submit() for _ in range(4)]
        for task_id in ids[:3]:
            await orchestrator.cancel(task_id, None)
        client = Redis.from_url(town.redis.url)
        await client.config_set("maxmemory", (await client.info("memory"))["used_memory"] // 2)
        with pytest.raises(OutOfMemoryError):
            await client.set("x", "1")
        async with asyncio.timeout(DEADLINE_S):
            while await store.finished_count():
                await asyncio.sleep(0.05)
        assert await store.task(ids[3], None) is not None, "what has not ended is never dropped"
        await client.config_set("maxmemory", 0)
        await client.aclose()
    await town.audit()


async def test_a_sweep_that_is_cut_short_goes_on_elsewhere(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    orchestrator = await town.replica()
    await (await town.worker()).die()
    for _ in range(3):
        await town.submit()
    client = Redis.from_url(town.redis.url)
    for number in range(450):
        await client.zadd("{o}:done", {f"ghost{number}": number})
    monkeypatch.setattr(runner, "SWEEP_BUDGET_S", 0.0)
    both = [jobs_of(town, orchestrator), jobs_of(town, orchestrator)]
    redis = both[0]._connect()
    for times in range(40):
        await both[times % 2].audit(redis)
        if not await redis.exists(runner.SWEEP_PLACE):
            break
    assert 1 < times < 39
    found = [jobs._observations.counters["audit_findings", "member"] for jobs in both]
    assert sum(found) == 450 and all(found)
    await redis.aclose(close_connection_pool=True)
    await client.aclose()
    await town.audit()


async def test_a_period_runs_once_whatever_is_queued_twice(redis: RedisProcess) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with contextlib.suppress(Exception):
                store = await Store.connect(redis.url, timeout_s=1)
                break
            await asyncio.sleep(0.02)
    client = Redis.from_url(redis.url)
    ran: list[int] = []
    for score in (5, 5, 6):

        async def job(score: int = score) -> None:
            ran.append(score)

        await runner._once({"redis": client, "score": score}, "retention", job)
    assert ran == [5, 6]
    await client.aclose()
    await store.aclose()


def test_a_job_is_json_and_an_exception_shows_its_type_only() -> None:
    assert json.loads(runner.serialize({"r": ValueError("a secret"), "a": ("x", 1)})) == {
        "r": "ValueError",
        "a": ["x", 1],
    }


async def test_a_webhook_outlives_the_replica_that_was_sending_it(
    start: Callable[..., Any],
    receiver: Receiver,
    redis: RedisProcess,
) -> None:
    """kill -9 in mid-webhook: another replica delivers within 40 s under the same delivery id."""
    receiver.hold = asyncio.Event()
    env = {"LLORCH_WEBHOOK_SECRET": SECRET}
    flags = ("--redis-url", redis.url, "--allow-private-callbacks")
    daemons: list[Daemon] = [await start(*flags, name=name, env=env) for name in "ab"]
    worker = ScriptedWorker([daemon.url for daemon in daemons], "w1", token_ms=1)
    await worker.start()
    body = {"model": TASK, "prompt": "x", "max_tokens": 2, "callback_url": receiver.url}
    async with aiohttp.ClientSession() as http, asyncio.timeout(120):
        while True:
            async with http.post(f"{daemons[0].url}/v2/tasks", json=body) as reply:
                if reply.status == 202:
                    break
                assert reply.status in (404, 503), await reply.text()
            await asyncio.sleep(0.05)
        while not receiver.got:
            await asyncio.sleep(0.01)
        client = Redis.from_url(redis.url)
        assert [key async for key in client.scan_iter(match="arq:in-progress:webhook:*")]
        await client.aclose()
        sending = [daemon for daemon in daemons if _is_connected(daemon, receiver)]
        assert len(sending) == 1 and sending[0].process is not None
        sending[0].process.kill()
        killed_at = time.monotonic()
        held, receiver.hold = receiver.hold, None
        held.set()
        while len(receiver.got) < 2:
            await asyncio.sleep(0.05)
        took_s = time.monotonic() - killed_at
    await worker.die()
    assert took_s <= 40
    assert receiver.got[0][0]["X-Llorch-Delivery"] == receiver.got[1][0]["X-Llorch-Delivery"]


def _is_connected(daemon: Daemon, receiver: Receiver) -> bool:
    import psutil

    assert daemon.process is not None
    port = int(receiver.url.rpartition(":")[2].partition("/")[0])
    connections = psutil.Process(daemon.process.pid).net_connections(kind="tcp4")
    return any(one.raddr and one.raddr.port == port for one in connections)


async def test_the_jobs_outlive_an_error_that_nobody_thought_of(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """A RuntimeError out of the Redis client ended the jobs, and with them the whole daemon."""
    orchestrator, store = await town.replica(), town.replicas[-1].store
    calls = 0

    async def due_webhooks() -> list[tuple[str, int]]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("unable to perform operation; the handler is closed")
        return []

    monkeypatch.setattr(runner, "PAUSE_S", 0.01)
    monkeypatch.setattr(store, "due_webhooks", due_webhooks)
    running = asyncio.create_task(jobs_of(town, orchestrator).run())
    await until(lambda: calls >= 2)
    running.cancel()
    assert await asyncio.wait({running}, timeout=DEADLINE_S) == ({running}, set())


async def test_a_job_that_takes_too_long_is_ended_and_said_by_type_only(
    town: Town, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when Redis stands still. arq ended it, and logged an error."""
    ended = asyncio.Event()

    async def deliver(self: Webhooks, task_id: str, tries: int) -> None:
        try:
            await asyncio.sleep(DEADLINE_S)
        finally:
            ended.set()

    async def due_webhooks() -> list[tuple[str, int]]:
        return [] if ended.is_set() else [("a", 0)]

    orchestrator = await town.replica()
    monkeypatch.setattr(runner, "JOB_TIMEOUT_S", 2)
    monkeypatch.setattr(Webhooks, "deliver", deliver)
    monkeypatch.setattr(town.replicas[-1].store, "due_webhooks", due_webhooks)
    running = asyncio.create_task(jobs_of(town, orchestrator).run())
    await until(ended.is_set)
    running.cancel()
    await asyncio.wait({running}, timeout=DEADLINE_S)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_the_jobs_end_although_a_cancellation_got_lost(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """redis-py may swallow one (python/cpython#86296): a daemon that was told to stop stayed."""
    orchestrator = await town.replica()
    waits = asyncio.Event()

    async def due_webhooks() -> list[tuple[str, int]]:
        if not waits.is_set():
            waits.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(DEADLINE_S)
        return []

    monkeypatch.setattr(town.replicas[-1].store, "due_webhooks", due_webhooks)
    running = asyncio.create_task(jobs_of(town, orchestrator).run())
    await waits.wait()
    running.cancel()
    assert await asyncio.wait({running}, timeout=DEADLINE_S) == ({running}, set())


def jobs_of(town: Town, orchestrator: Orchestrator) -> Jobs:
    store, observations = town.replicas[-1].store, Observations()
    webhooks = Webhooks(store, orchestrator, observations, WebhookPolicy(SECRET, 1, allow_private=True))
    retention = Retention(store, observations, keep_s=3600, keep_count=1000)
    return Jobs(town.redis.url, store, observations, webhooks, retention)
