"""Redis as a chaos run uses it: one server, Sentinel with a replica, or a cluster; and what may befall each.

Every server is append-only with `appendfsync always`, as the embedded one. Read `RedisSet` first.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from llorch_wire.events import parse_position
from tests.support.redis_server import (
    ClusterGroup,
    RedisServer,
    SentinelGroup,
    cluster_group,
    redis_server,
    sentinel_group,
)

ANCHOR = "{o}:anchor"
"""Any key of the product's hash tag: on a cluster, the node that holds it holds everything."""


@dataclass
class Held:
    """What a client holds of a task: its last SSE id, and whether the task was acknowledged."""

    task_id: str
    position: str | None


@dataclass
class Missing:
    """What a copy of Redis' files lacks of what clients held."""

    tasks: list[str] = field(default_factory=list)
    """Acknowledged, and unknown there."""
    events: int = 0
    """Tokens (and starts) that were delivered and aren't there."""
    ends: list[str] = field(default_factory=list)
    """Tasks whose delivered terminal event isn't there."""

    def __bool__(self) -> bool:
        return bool(self.tasks or self.events or self.ends)


class RedisSet:
    """One deployment of Redis. `url` and `jobs_url` are what orchestratord gets."""

    name = "redis"
    may_roll_back = False
    """Whether acknowledged writes may be undone by this deployment's own failover."""

    def __init__(self, servers: list[RedisServer], url: str, jobs_url: str | None = None) -> None:
        self.servers, self.url, self.jobs_url = servers, url, jobs_url
        self.busy = asyncio.Lock()
        """Held by the fault that has Redis in its hands."""

    def holder(self) -> RedisServer:
        """The server that holds the data now."""
        return self.servers[0]

    def command(self, *words: str) -> Any:
        """One command at the holder; blocking."""
        with contextlib.closing(self.holder().client()) as client:
            return client.execute_command(*words)


class SentinelSet(RedisSet):
    """A master, a replica, three Sentinels."""

    name = "sentinel"
    may_roll_back = True

    def __init__(self, group: SentinelGroup) -> None:
        super().__init__(group.data, group.url)
        self.group = group

    def holder(self) -> RedisServer:
        return self.group.master()

    def replica(self) -> RedisServer:
        """The server that isn't master."""
        master = self.group.master()
        return next(server for server in self.servers if server is not master)

    def in_step(self) -> bool:
        """Whether the master has a replica that follows it."""
        with contextlib.suppress(redis.RedisError, StopIteration):
            return any("online" in str(value) for value in self.command("INFO", "replication").values())
        return False


class ClusterSet(RedisSet):
    """Three masters; jobs have a server of their own, as arq needs."""

    name = "cluster"

    def __init__(self, group: ClusterGroup, jobs: RedisServer) -> None:
        super().__init__(group.nodes, group.url, jobs.url)
        self.group = group
        self._holder: RedisServer | None = None

    def holder(self) -> RedisServer:
        # Slots don't move in these runs, and a node that is down can't be asked.
        self._holder = self._holder or self.group.holder(ANCHOR)
        return self._holder


@contextlib.contextmanager
def plain(bind: str = "127.0.0.1") -> Generator[RedisSet]:
    """One durable server; with `bind`, also on another address than loopback."""
    options = {} if bind == "127.0.0.1" else {"bind": f"127.0.0.1 {bind}", "protected_mode": "no"}
    with redis_server(port=True, durable=True, **options) as server:
        yield RedisSet([server], f"redis://{bind}:{server.port}/0")


@contextlib.contextmanager
def sentinel(*, min_replicas: int = 0) -> Generator[SentinelSet]:
    """`min_replicas` of 1 lets the master take writes only while a replica follows it closely."""
    with sentinel_group() as group:
        wanted = {"appendfsync": "always", "min-replicas-to-write": str(min_replicas), "min-replicas-max-lag": "1"}
        for server in group.data:
            server.options.update(wanted)
            with contextlib.closing(server.client()) as client:
                for name, value in wanted.items():
                    client.config_set(name, value)
        yield SentinelSet(group)


@contextlib.contextmanager
def cluster() -> Generator[ClusterSet]:
    """Three masters."""
    with cluster_group(3) as group, redis_server(port=True, durable=True) as jobs:
        for node in group.nodes:
            node.options["appendfsync"] = "always"
            with contextlib.closing(node.client()) as client:
                client.config_set("appendfsync", "always")
        yield ClusterSet(group, jobs)


def missing_from_files(server: RedisServer, held: Iterable[Held]) -> Missing:
    """What the files of a dead (or frozen) server lack of what clients hold; its files are copied and loaded apart.

    Nobody can write to it meanwhile, so this is exact: everything a client holds must have been on disk before.
    """
    scratch = Path(tempfile.mkdtemp(prefix="llorch-copy-", dir="/tmp"))  # short: it holds a socket
    shutil.copytree(server.options["dir"] + "/appendonlydir", scratch / "appendonlydir")
    options = {
        "port": "0", "unixsocket": str(scratch / "s"), "dir": str(scratch), "save": "", "appendonly": "yes",
        "appendfsync": "no",
    }  # fmt: skip
    copy = RedisServer(scratch, options)
    try:
        copy.start()
        with contextlib.closing(copy.client()) as client:
            return _compare(client, list(held))
    finally:
        copy.kill()
        shutil.rmtree(scratch, ignore_errors=True)


def _compare(client: redis.Redis, held: list[Held]) -> Missing:
    pipe = client.pipeline(transaction=False)
    for one in held:
        pipe.exists(f"{{o}}:task:{one.task_id}")
        pipe.xrevrange(f"{{o}}:log:{one.task_id}", count=1)
    answers = pipe.execute()
    missing = Missing()
    for one, exists, last in zip(held, answers[::2], answers[1::2], strict=True):
        if not exists:
            missing.tasks.append(one.task_id)
            continue
        if one.position is None:
            continue
        wanted, there = parse_position(one.position), parse_position(last[0][0].decode() if last else "0-0")
        if wanted <= there:
            continue
        if wanted[1] > 2**53:
            missing.ends.append(one.task_id)
        else:
            missing.events += max(1, wanted[1] - there[1])
    return missing
