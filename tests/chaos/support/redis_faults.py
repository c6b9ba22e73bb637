"""Redis is killed, paused, disturbed and fails over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

import redis

from tests.chaos.support.processes import until
from tests.chaos.support.redis_sets import Missing, SentinelSet, missing_from_files
from tests.chaos.support.scene import Scene
from tests.support.redis_server import RedisServer

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
