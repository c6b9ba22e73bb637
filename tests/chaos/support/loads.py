"""Loads for tests of scheduling: closed and open loops over HTTP, as tenants with keys of their own. Read `Tenants`."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from llorch_wire.sse import SseParser
from orchestratord.patience import end_tasks
from tests.chaos.support.town import ADMIN_KEY, SCRIPTED, WORKER_KEY, Town


def keys(weights: dict[str, float]) -> dict[str, str]:
    """Environment of replicas that know these tenants."""
    tenants = ",".join(f"{name}:{weight:g}={key_of(name)}" for name, weight in weights.items())
    return {"LLORCH_API_KEYS": f"{tenants},admin={ADMIN_KEY}", "LLORCH_WORKER_KEY": WORKER_KEY}


def key_of(tenant: str) -> str:
    """A tenant's key."""
    return f"key-of-tenant-{tenant}"


@dataclass
class Tenants:
    """Submits as tenants and remembers whose task is whose."""

    town: Town
    owner: dict[str, str] = field(default_factory=dict)
    """Tenant by task id."""
    live: dict[str, str] = field(default_factory=dict)
    """The same, of tasks that weren't seen to end."""

    async def submit(self, tenant: str, **fields: Any) -> str:
        """A new task; its id."""
        task_id = str(uuid.uuid4())
        self.owner[task_id] = self.live[task_id] = tenant
        body = {"task_id": task_id, "model": SCRIPTED, "prompt": "p", "ignore_eos": True, **fields}
        url = random.choice(self.town.urls)
        async with self.town.session.post(f"{url}/v2/tasks", json=body, headers=self._headers(tenant)) as reply:
            assert reply.status == 202, await reply.text()
        return task_id

    async def end_of(self, tenant: str, task_id: str) -> dict[str, Any]:
        """Follow a task to its end; the data of its terminal event."""
        url = f"{random.choice(self.town.urls)}/v2/tasks/{task_id}/events"
        timeout = aiohttp.ClientTimeout(total=120)
        async with self.town.session.get(url, headers=self._headers(tenant), timeout=timeout) as reply:
            assert reply.status == 200, await reply.text()
            parser = SseParser()
            async for chunk in reply.content.iter_any():
                for frame in parser.feed(chunk):
                    if frame.event in ("end", "error"):
                        assert frame.event == "end", frame.data
                        self.live.pop(task_id, None)
                        return orjson.loads(frame.data)
        raise AssertionError(f"the stream of {task_id} ended without an end")

    async def cancel_all(self) -> None:
        """Cancel what isn't known to have ended."""
        for task_id, tenant in list(self.live.items()):
            url = f"{self.town.urls[0]}/v2/tasks/{task_id}/cancel"
            async with self.town.session.post(url, headers=self._headers(tenant)) as reply:
                assert reply.status in (200, 404), await reply.text()
        self.live.clear()

    async def flood(self, tenant: str, count: int, **fields: Any) -> None:
        """So many tasks as fast as they are taken."""
        async with asyncio.TaskGroup() as group:
            for _ in range(16):
                group.create_task(self._submit_some(tenant, count // 16, fields))

    async def _submit_some(self, tenant: str, count: int, fields: dict[str, Any]) -> None:
        for _ in range(count):
            await self.submit(tenant, **fields)

    async def closed_loop(self, tenant: str, outstanding: int, **fields: Any) -> None:
        """So many tasks at any time, for ever."""

        async def one() -> None:
            while True:
                await self.end_of(tenant, await self.submit(tenant, **fields))

        async with asyncio.TaskGroup() as group:
            for _ in range(outstanding):
                group.create_task(one())

    async def open_loop(
        self, tenant: str, per_s: float, seconds: float, seed: int, waits_ms: list[int], **fields: Any
    ) -> None:
        """Tasks that come at random times (Poisson), however long they take; adds each one's wait."""
        rng = random.Random(seed)

        async def one() -> None:
            end = await self.end_of(tenant, await self.submit(tenant, **fields))
            waits_ms.append(end["queue_time_ms"])

        begun, at = time.monotonic(), 0.0
        async with asyncio.TaskGroup() as group:
            while (at := at + rng.expovariate(per_s)) < seconds:
                await asyncio.sleep(max(0.0, begun + at - time.monotonic()))
                group.create_task(one())

    async def generated(self) -> dict[str, int]:
        """Tokens generated so far for each tenant, by the workers' own count."""
        counts: dict[str, int] = {}
        for number in range(len(self.town.workers)):
            for task_id, _, first, end in await self.town.worker_says(number, "/scripted/computed"):
                tenant = self.owner.get(task_id, "")
                counts[tenant] = counts.get(tenant, 0) + end - first
        return counts

    @staticmethod
    def _headers(tenant: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key_of(tenant)}"}


@contextlib.asynccontextmanager
async def running(*work: Any) -> Any:
    """These loads run while the body does; a load that fails fails the body."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
        yield
        await end_tasks(tasks)  # a group waits for them, and one cancellation alone may get lost
