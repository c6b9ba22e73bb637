"""Replicas and workers are killed, stopped, drained and cut off."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence

from tests.chaos.support.partition import DATA, REDIS, PartitionedSet
from tests.chaos.support.processes import Part, until
from tests.chaos.support.scene import Scene, again, victim

# ---- replicas


async def replica_kill(scene: Scene) -> str | None:
    """SIGKILL; comes back after a while."""
    async with victim(scene, scene.town.replicas) as part:
        if part is None:
            return None
        part.kill()
        await again(part, pause := scene.rng.uniform(0.2, 3.0))
        return f"{part.name}, back after {pause:.1f} s"


async def replica_stop(scene: Scene) -> str | None:
    """SIGSTOP for longer than its lease, then SIGCONT: it wakes as a zombie."""
    async with victim(scene, scene.town.replicas) as part:
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
    async with victim(scene, scene.town.replicas) as part:
        if part is None:
            return None
        part.send(signal.SIGTERM)
        status = await part.ended(60)
        await again(part, scene.rng.uniform(0.1, 1.0))
        return f"{part.name}, exit status {status}"


# ---- workers


async def worker_kill(scene: Scene) -> str | None:
    """SIGKILL; comes back at the same address as another instance."""
    async with victim(scene, scene.town.workers) as part:
        if part is None:
            return None
        part.kill()
        await again(part, pause := scene.rng.uniform(0.1, 4.0))
        return f"{part.name}, back after {pause:.1f} s"


async def worker_stop(scene: Scene) -> str | None:
    """SIGSTOP for longer than its lease: sockets stay open, nothing comes; then its late words."""
    async with victim(scene, scene.town.workers) as part:
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
    async with victim(scene, scene.town.workers) as part:
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
        await again(real, scene.rng.uniform(0.1, 1.0))
        return real.name


async def zombies(scene: Scene) -> str | None:
    """A replica stands still, its tasks are adopted, their worker dies, they go on elsewhere: then it wakes, finds the
    worker dead, and would send back attempts that are long over."""
    async with victim(scene, scene.town.replicas) as replica, victim(scene, scene.town.workers) as worker:
        if replica is None or worker is None:
            return None
        replica.send(signal.SIGSTOP)
        await asyncio.sleep(3.5)
        worker.kill()
        await asyncio.sleep(2.0)
        replica.send(signal.SIGCONT)
        await again(worker, 4.0)
        return f"{replica.name} and {worker.name}"


# ---- partitions


async def _cut(
    scene: Scene, parts: Sequence[Part], networks: Sequence[str], seconds: tuple[float, float]
) -> str | None:
    redis = scene.redis
    assert isinstance(redis, PartitionedSet)
    async with victim(scene, parts) as part:
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
