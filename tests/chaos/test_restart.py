"""Everything is killed at once, Redis included, and started again: what was known is known still."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson

from tests.chaos.support import redis_sets
from tests.chaos.support.loads import Tenants, keys
from tests.chaos.support.town import Plan, town_of
from tests.support.scripted_tokens import expected

PLAN = Plan(replicas=2, workers=3, slots=6, token_ms=20, env=keys({"acme": 1}))
SESSIONS = 6
DRAINED = "worker2"


async def test_sessions_keep_their_worker_and_drained_workers_stay_drained(tmp_path: Path) -> None:
    with redis_sets.plain() as redis:
        async with town_of(redis, PLAN, tmp_path) as town:
            tenants = Tenants(town)
            assert (await town.operate(f"/v2/workers/{DRAINED}/drain", {"deadline_ms": 60_000}))["state"] == "draining"
            before = {f"session-{number}": f"worker{number % 2}" for number in range(SESSIONS)}
            for session, worker in before.items():
                pinned = {"mode": "pin", "pin_worker": worker}
                await tenants.end_of(
                    "acme", await tenants.submit("acme", max_tokens=5, session_id=session, placement=pinned)
                )
            assert await served_by(tenants) == before, "without a pin, a session stays where it began"
            running = [await tenants.submit("acme", max_tokens=150, seed=seed) for seed in range(6)]
            await until_running(tenants, len(running))

            for part in town.parts:
                part.kill()
            redis.servers[0].kill()
            await asyncio.to_thread(redis.servers[0].start)
            for part in town.parts:
                part.spawn()
            await until_ready(tenants)
            await until_states(tenants, {"worker0": "ready", "worker1": "ready", DRAINED: "draining"})

            for seed, task_id in enumerate(running):
                end = await tenants.end_of("acme", task_id)
                assert (end["stop_reason"], end["tokens_out"]) == ("MAX_TOKENS", 150)
                assert await tokens_of(tenants, task_id) == [
                    token.id for token in expected(seed, 150, ignore_eos=True)[0]
                ]
            assert await served_by(tenants) == before
            await until_states(tenants, {"worker0": "ready", "worker1": "ready", DRAINED: "draining"})
            assert await town.store.audit() == []


async def served_by(tenants: Tenants) -> dict[str, str]:
    """Which worker serves each session's next task."""
    served: dict[str, str] = {}
    for number in range(SESSIONS):
        task_id = await tenants.submit("acme", max_tokens=5, session_id=f"session-{number}")
        await tenants.end_of("acme", task_id)
        record = await tenants.town.store.task(task_id, "acme")
        assert record is not None and record.worker_id is not None
        served[f"session-{number}"] = record.worker_id
    return served


async def tokens_of(tenants: Tenants, task_id: str) -> list[int]:
    """Ids of the tokens in a task's log."""
    return [token.id for entry in await tenants.town.store.read_log(task_id) for token in entry.tokens]


async def until_running(tenants: Tenants, count: int) -> None:
    """Wait until so many tasks have tokens."""
    async with asyncio.timeout(30):
        while True:
            pages = [await tenants.town.store.owned(view.replica_id) for view in await tenants.town.store.replicas()]
            if sum(task.tokens_logged > 5 for page in pages for task in page) >= count:
                return
            await asyncio.sleep(0.05)


async def until_ready(tenants: Tenants) -> None:
    """Wait until every replica takes requests."""
    async with asyncio.timeout(60):
        for url in tenants.town.urls:
            while True:
                try:
                    async with tenants.town.session.get(f"{url}/ready") as reply:
                        if reply.status == 200:
                            break
                except OSError:
                    pass
                await asyncio.sleep(0.1)


async def until_states(tenants: Tenants, wanted: dict[str, str]) -> None:
    """Wait until the workers are in these states, as the API tells it."""
    headers = {"Authorization": "Bearer admin-key-of-the-chaos-run"}
    async with asyncio.timeout(60):
        while True:
            try:
                async with tenants.town.session.get(f"{tenants.town.urls[0]}/v2/workers", headers=headers) as reply:
                    workers = orjson.loads(await reply.read()).get("workers", [])
            except OSError:
                workers = []
            if {worker["worker_id"]: worker["state"] for worker in workers} == wanted:
                return
            await asyncio.sleep(0.1)
