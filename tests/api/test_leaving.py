"""Clients that leave, over real sockets, an orchestrator and Redis: in each way, before and after the first token."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.api.harness import DEADLINE_S, until
from tests.api.test_real import daemon as daemon
from tests.api.test_real import worker as worker
from tests.support.scripted_worker import ScriptedWorker

BODY = {"model": "scripted", "max_tokens": 100_000, "ignore_eos": True}
REQUESTS = {
    "/v2/tasks": {**BODY, "prompt": "hello", "on_disconnect": "cancel"},
    "/v1/completions": {**BODY, "prompt": "hello", "stream": True},
    "/v1/chat/completions": {**BODY, "messages": [{"role": "user", "content": "hello"}], "stream": True},
    "/v1/completions without a stream": {**BODY, "prompt": "hello"},
}


@contextlib.asynccontextmanager
async def asked(url: str, path: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A request on a socket of its own, of which nothing has been read."""
    body = json.dumps(REQUESTS[path]).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\nContent-Length: %d\r\n\r\n%b"
        % (path.partition(" ")[0].encode(), len(body), body)
    )
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def leave(writer: asyncio.StreamWriter, way: str) -> None:
    if way == "reset":
        writer.transport.abort()
    elif way == "closed":
        writer.close()
    else:
        writer.write_eof()


async def tasks(http: aiohttp.ClientSession, url: str) -> list[str]:
    async with http.get(f"{url}/v2/tasks") as reply:
        return [task["status"] for task in (await reply.json())["tasks"]]


async def until_tasks(http: aiohttp.ClientSession, url: str, wanted: list[str]) -> None:
    seen: list[str] = []
    try:
        async with asyncio.timeout(DEADLINE_S):
            while (seen := await tasks(http, url)) != wanted:
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{seen} instead of {wanted}") from None


@pytest.mark.parametrize("way", ["closed", "reset", "half-closed"])
@pytest.mark.parametrize("path", list(REQUESTS))
async def test_leaving_ends_the_generation(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession, path: str, way: str
) -> None:
    async with asked(daemon, path) as (reader, writer):
        await until(lambda: worker.counts["tokens"] > 3)
        if "without" not in path:
            await reader.readuntil(b"data: ")
        leave(writer, way)
        await until(lambda: not worker.running)
        await until_tasks(http, daemon, ["cancelled"])


@pytest.mark.parametrize("way", ["closed", "reset", "half-closed"])
@pytest.mark.parametrize("path", list(REQUESTS))
async def test_leaving_before_the_first_token_leaves_the_queue(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession, path: str, way: str
) -> None:
    """Every slot is taken; the task waits, and nothing will come for it for a long time."""
    held = {**BODY, "prompt": "held", "on_disconnect": "continue"}
    for _ in range(4):
        async with http.post(f"{daemon}/v2/tasks", json=held) as reply:
            assert reply.status == 202
    await until(lambda: len(worker.running) == 4)
    async with asked(daemon, path) as (_, writer):
        await until_tasks(http, daemon, ["queued", *["running"] * 4])
        leave(writer, way)
        await until_tasks(http, daemon, ["cancelled", *["running"] * 4])
    async with http.get(f"{daemon}/v2/queue") as reply:
        assert not any(row["depth"] for row in (await reply.json())["queues"])
