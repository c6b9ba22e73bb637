"""A daemon that is told to stop while a `/v1` call runs: its client is told to send it again, so it must not go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from tests.api.harness import until
from tests.api.test_real import registered
from tests.support.scripted_worker import ScriptedWorker

BODY = {"model": "scripted", "prompt": "hello", "max_tokens": 100_000, "ignore_eos": True}


@pytest.fixture
async def many() -> AsyncIterator[list[ScriptedWorker]]:
    workers: list[ScriptedWorker] = []
    yield workers
    for worker in workers:
        await worker.die()


@pytest.mark.parametrize("stream", [True, False])
async def test_sigterm_ends_v1_calls_down_to_the_worker_and_leaves_v2_streams(
    start: Callable[..., Any], many: list[ScriptedWorker], http: aiohttp.ClientSession, stream: bool
) -> None:
    daemon = await start()
    worker = ScriptedWorker([daemon.url], "w1", slots=4, token_ms=5)
    many.append(worker)
    await worker.start()
    await registered(http, daemon.url, "w1")
    v2: dict[str, Any] = {"json": {**BODY, "on_disconnect": "cancel"}, "headers": {"Accept": "text/event-stream"}}
    resumable = asyncio.ensure_future(http.post(f"{daemon.url}/v2/tasks", **v2))
    await until(lambda: len(worker.running) == 1)

    async def call() -> tuple[int, bytes]:
        async with http.post(f"{daemon.url}/v1/completions", json={**BODY, "n": 2, "stream": stream}) as reply:
            return reply.status, await reply.read()

    calling = asyncio.ensure_future(call())
    await until(lambda: len(worker.running) == 3)
    assert await daemon.stop() == 0, daemon.log()
    status, answer = await calling
    assert (status, b"draining" in answer) == (200 if stream else 503, True)
    assert len(worker.running) == 1
    (await resumable).close()
