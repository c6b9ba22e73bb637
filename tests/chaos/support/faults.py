"""What is done to a town, by name. Each fault heals itself; while it lasts it holds its victim. Read `Fault`.

A fault returns in words what it did, or None when there was nothing to do it to (every victim taken already).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import redis

from tests.chaos.support.clients import Clients
from tests.chaos.support.partition import DATA, REDIS, PartitionedSet
from tests.chaos.support.processes import Part, until
from tests.chaos.support.redis_sets import Missing, RedisSet, SentinelSet, missing_from_files
from tests.chaos.support.town import Town
from tests.support.redis_server import RedisServer

Fault: TypeAlias = Callable[["Scene"], Awaitable[str | None]]


@dataclass
class Scene:
    """What faults work on, and what they find out."""

    town: Town
    clients: Clients
    rng: random.Random
    longest_pause_s: float = 5.0
    missing: list[tuple[str, Missing]] = field(default_factory=list)
    """What Redis' files lacked of what clients held, where nothing may be lacking."""
    rolled_back: list[tuple[str, Missing]] = field(default_factory=list)
    """The same where a failover may undo writes: measured."""
    undone: set[str] = field(default_factory=set)
    """Tasks that an earlier failover undid, after their ends: they are missing ever since."""

    @property
    def redis(self) -> RedisSet:
        return self.town.redis


@contextlib.asynccontextmanager
async def _victim(scene: Scene, parts: Sequence[Part]) -> AsyncGenerator[Part | None]:
    """One of these that is in nobody's hands, never the last such one."""
    free = [part for part in parts if not part.busy.locked() and part.alive]
    if len(free) < min(2, len(parts)):
        yield None
        return
    part = scene.rng.choice(free)
    async with part.busy:
        yield part


async def _again(part: Part, pause_s: float) -> None:
    await asyncio.sleep(pause_s)
    part.spawn()
    # Held until it has had the time to start, so that a kind of fault doesn't only ever hit starting processes.
    await asyncio.sleep(1.0)


# ---- replicas


async def replica_kill(scene: Scene) -> str | None:
    """SIGKILL; comes back after a while."""
    async with _victim(scene, scene.town.replicas) as part:
        if part is None:
            return None
        part.kill()
        await _again(part, pause := scene.rng.uniform(0.2, 3.0))
        return f"{part.name}, back after {pause:.1f} s"


async def replica_stop(scene: Scene) -> str | None:
    """SIGSTOP for longer than its lease, then SIGCONT: it wakes as a zombie."""
    async with _victim(scene, scene.town.replicas) as part:
        if part is None:
            return None
        part.send(signal.SIGSTOP)
        try:
            await asyncio.sleep(pause := scene.rng.uniform(3.0, 6.0))
        finally:
            part.send(signal.SIGCONT)
        return f"{part.name} for {pause:.1f} s"


async def replica_term(scene: Scene) -> str | None:
    """A graceful stop, as in an update."""
    async with _victim(scene, scene.town.replicas) as part:
        if part is None:
            return None
        part.send(signal.SIGTERM)
        status = await part.ended(60)
        await _again(part, scene.rng.uniform(0.1, 1.0))
        return f"{part.name}, exit status {status}"


# ---- workers


async def worker_kill(scene: Scene) -> str | None:
    """SIGKILL; comes back at the same address as another instance."""
    async with _victim(scene, scene.town.workers) as part:
        if part is None:
            return None
        part.kill()
        await _again(part, pause := scene.rng.uniform(0.1, 4.0))
        return f"{part.name}, back after {pause:.1f} s"


async def worker_stop(scene: Scene) -> str | None:
    """SIGSTOP for longer than its lease: sockets stay open, nothing comes; then its late words."""
    async with _victim(scene, scene.town.workers) as part:
        if part is None:
            return None
        part.send(signal.SIGSTOP)
        try:
            await asyncio.sleep(pause := scene.rng.uniform(5.0, 8.0))
        finally:
            part.send(signal.SIGCONT)
        return f"{part.name} for {pause:.1f} s"


async def worker_drain(scene: Scene) -> str | None:
    """Drained with a short deadline, so that what runs there moves; then taken back."""
    async with _victim(scene, scene.town.workers) as part:
        if part is None:
            return None
        with contextlib.suppress(TimeoutError):
            await scene.town.operate(f"/v2/workers/{part.name}/drain", {"deadline_ms": 500})
            await asyncio.sleep(scene.rng.uniform(2.0, 4.0))
        await scene.town.operate(f"/v2/workers/{part.name}/undrain", tries_s=90)
        return part.name


async def engine_kill(scene: Scene) -> str | None:
    """SIGKILL to the engine process of the worker with the real model."""
    real = scene.town.real
    if real is None or real.busy.locked():
        return None
    async with real.busy:
        pid = scene.town.engine_pid()
        if pid is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        await until(lambda: scene.town.engine_pid() not in (None, pid), "another engine")
        return f"engine {pid}"


async def real_worker_kill(scene: Scene) -> str | None:
    """SIGKILL to the worker with the real model, HTTP side and engine."""
    real = scene.town.real
    if real is None or real.busy.locked() or not real.alive:
        return None
    async with real.busy:
        real.kill()
        await _again(real, scene.rng.uniform(0.1, 1.0))
        return real.name


# ---- Redis


@contextlib.asynccontextmanager
async def _redis(scene: Scene) -> AsyncGenerator[bool]:
    if scene.redis.busy.locked():
        yield False
        return
    async with scene.redis.busy:
        yield True


async def redis_kill(scene: Scene) -> str | None:
    """SIGKILL and a start on the same files, which must hold all that clients hold."""
    async with _redis(scene) as mine:
        if not mine:
            return None
        server = scene.redis.holder()
        server.kill()
        await asyncio.sleep(scene.rng.uniform(0.3, 1.5))  # what was on its way to clients arrives
        await _check_files(scene, server, "redis_kill", scene.missing)
        await asyncio.to_thread(server.start)
        return f"port {server.port}"


async def _check_files(scene: Scene, server: RedisServer, name: str, into: list[tuple[str, Missing]]) -> None:
    held = scene.clients.held()
    missing = await asyncio.to_thread(
        missing_from_files, server, [one for one in held if one.task_id not in scene.undone]
    )
    if missing:
        into.append((name, missing))
        scene.undone.update(missing.tasks, missing.ends)


async def redis_pause(scene: Scene) -> str | None:
    """SIGSTOP: connections stay, nothing is answered."""
    async with _redis(scene) as mine:
        if not mine:
            return None
        server = scene.redis.holder()
        server.pause()
        try:
            await asyncio.sleep(pause := scene.rng.uniform(3.0, scene.longest_pause_s))
        finally:
            server.resume()
        return f"port {server.port} for {pause:.1f} s"


async def redis_reset(scene: Scene) -> str | None:
    """Every connection of every client is cut, some times in a row."""
    return await _at_redis(scene, [("CLIENT", "KILL", "TYPE", "normal"), ("CLIENT", "KILL", "TYPE", "pubsub")] * 3)


async def script_flush(scene: Scene) -> str | None:
    """Redis forgets every script."""
    return await _at_redis(scene, [("SCRIPT", "FLUSH")])


async def aof_rewrite(scene: Scene) -> str | None:
    """The append-only file is rewritten under load."""
    return await _at_redis(scene, [("BGREWRITEAOF",)])


async def _at_redis(scene: Scene, commands: Sequence[tuple[str, ...]]) -> str | None:
    async with _redis(scene) as mine:
        if not mine:
            return None
        for words in commands:
            for _ in range(50):
                try:
                    await asyncio.to_thread(scene.redis.command, *words)
                    break
                except redis.RedisError:  # loading, or just failing over
                    await asyncio.sleep(0.2)
            await asyncio.sleep(0.1)
        return " ".join(commands[0])


# ---- Sentinel


async def sentinel_failover(scene: Scene) -> str | None:
    """The master dies while its replica is in step; the replica takes over."""
    return await _fail_over(scene, "sentinel_failover", lag_s=0.0)


async def sentinel_failover_lagging(scene: Scene) -> str | None:
    """The replica was cut off for a second before the master died: what came in that second is at stake."""
    return await _fail_over(scene, "sentinel_failover_lagging", lag_s=1.0)


async def _fail_over(scene: Scene, name: str, lag_s: float) -> str | None:
    sentinel = scene.redis
    assert isinstance(sentinel, SentinelSet)
    async with _redis(scene) as mine:
        if not mine:
            return None
        await until(sentinel.in_step, "a replica in step", 60)
        old, new = sentinel.holder(), sentinel.replica()
        if lag_s:
            # First its connection, then the process itself: it can't ask for another one.
            new.pause()
            await asyncio.to_thread(sentinel.command, "CLIENT", "KILL", "TYPE", "replica")
            await asyncio.sleep(lag_s)
        old.kill()
        if lag_s:
            new.resume()
        await asyncio.sleep(0.3)
        await _check_files(scene, new, name, scene.rolled_back)
        await until(lambda: _is_master(new), "the replica is master", 60)
        old.options["replicaof"] = f"127.0.0.1 {new.port}"
        new.options.pop("replicaof", None)
        await asyncio.to_thread(old.start)
        return f"port {old.port} → {new.port}"


def _is_master(server: RedisServer) -> bool:
    with contextlib.closing(server.client()) as client, contextlib.suppress(redis.RedisError):
        return client.execute_command("ROLE")[0] == b"master"
    return False


async def sentinel_master_pause(scene: Scene) -> str | None:
    """The master stands still until it is replaced, then wakes and doesn't know it: writes it still takes are lost."""
    sentinel = scene.redis
    assert isinstance(sentinel, SentinelSet)
    async with _redis(scene) as mine:
        if not mine:
            return None
        await until(sentinel.in_step, "a replica in step", 60)
        old, new = sentinel.holder(), sentinel.replica()
        old.pause()
        try:
            await until(lambda: _is_master(new), "the replica is master", 60)
        finally:
            old.resume()
        new.options.pop("replicaof", None)
        old.options["replicaof"] = f"127.0.0.1 {new.port}"
        await until(lambda: not _is_master(old), "the old master follows", 60)
        return f"port {old.port} → {new.port}"


# ---- cluster


async def cluster_node_kill(scene: Scene) -> str | None:
    """SIGKILL to any node; without it the cluster answers nobody. Back on its files after a while."""
    async with _redis(scene) as mine:
        if not mine:
            return None
        holder = scene.redis.holder()  # known from now on
        node = scene.rng.choice(scene.redis.servers)
        node.kill()
        await asyncio.sleep(scene.rng.uniform(0.5, 3.0))
        if node is holder:
            await _check_files(scene, node, "cluster_node_kill", scene.missing)
        await asyncio.to_thread(node.start)
        return f"port {node.port}{', which holds the data' if node is holder else ''}"


async def zombies(scene: Scene) -> str | None:
    """A replica stands still, its tasks are adopted, their worker dies, they go on elsewhere: then it wakes, finds the
    worker dead, and would send back attempts that are long over."""
    async with _victim(scene, scene.town.replicas) as replica, _victim(scene, scene.town.workers) as worker:
        if replica is None or worker is None:
            return None
        replica.send(signal.SIGSTOP)
        await asyncio.sleep(3.5)
        worker.kill()
        await asyncio.sleep(2.0)
        replica.send(signal.SIGCONT)
        await _again(worker, 4.0)
        return f"{replica.name} and {worker.name}"


# ---- partitions


async def _cut(
    scene: Scene, parts: Sequence[Part], networks: Sequence[str], seconds: tuple[float, float]
) -> str | None:
    redis = scene.redis
    assert isinstance(redis, PartitionedSet)
    async with _victim(scene, parts) as part:
        if part is None:
            return None
        for network in networks:
            redis.cables.cut(part.name, network)
        try:
            await asyncio.sleep(pause := scene.rng.uniform(*seconds))
        finally:
            for network in networks:
                redis.cables.mend(part.name, network)
        return f"{part.name} for {pause:.1f} s"


async def cut_worker(scene: Scene) -> str | None:
    """A worker is cut off: it goes on generating and nobody hears it."""
    return await _cut(scene, scene.town.workers, (DATA,), (5.0, 9.0))


async def cut_replica_from_redis(scene: Scene) -> str | None:
    """A replica reads its workers and answers its clients, but can't reach Redis: its tasks are adopted meanwhile."""
    return await _cut(scene, scene.town.replicas, (REDIS,), (4.0, 9.0))


async def cut_replica_from_workers(scene: Scene) -> str | None:
    """A replica keeps its lease in Redis, but hears no worker and no client."""
    return await _cut(scene, scene.town.replicas, (DATA,), (4.0, 9.0))


async def cut_replica(scene: Scene) -> str | None:
    """A replica is cut off from everything."""
    return await _cut(scene, scene.town.replicas, (DATA, REDIS), (4.0, 9.0))


REPLICA_FAULTS: dict[str, Fault] = {
    "replica_kill": replica_kill, "replica_stop": replica_stop, "replica_term": replica_term,
}  # fmt: skip
WORKER_FAULTS: dict[str, Fault] = {
    "worker_kill": worker_kill, "worker_stop": worker_stop, "worker_drain": worker_drain,
}  # fmt: skip
REAL_FAULTS: dict[str, Fault] = {"engine_kill": engine_kill, "real_worker_kill": real_worker_kill}
REDIS_FAULTS: dict[str, Fault] = {
    "redis_reset": redis_reset, "script_flush": script_flush, "aof_rewrite": aof_rewrite,
}  # fmt: skip
SINGLE_FAULTS: dict[str, Fault] = {"redis_kill": redis_kill, "redis_pause": redis_pause}
SENTINEL_FAULTS: dict[str, Fault] = {
    "sentinel_failover": sentinel_failover,
    "sentinel_failover_lagging": sentinel_failover_lagging,
    "sentinel_master_pause": sentinel_master_pause,
}
PARTITION_FAULTS: dict[str, Fault] = {
    **SINGLE_FAULTS,
    "cut_worker": cut_worker,
    "cut_replica_from_redis": cut_replica_from_redis,
    "cut_replica_from_workers": cut_replica_from_workers,
    "cut_replica": cut_replica,
}
CLUSTER_FAULTS: dict[str, Fault] = {**SINGLE_FAULTS, "cluster_node_kill": cluster_node_kill}


def faults_of(kind: str, *, real_worker: bool) -> dict[str, Fault]:
    """Every kind of fault that a deployment of Redis goes through."""
    own = {
        "redis": SINGLE_FAULTS, "sentinel": SENTINEL_FAULTS, "cluster": CLUSTER_FAULTS, "partition": PARTITION_FAULTS,
    }[kind]  # fmt: skip
    real = REAL_FAULTS if real_worker else {}
    return {**REPLICA_FAULTS, **WORKER_FAULTS, **real, **REDIS_FAULTS, **own}
