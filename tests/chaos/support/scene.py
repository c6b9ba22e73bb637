"""What faults work on: the town, who is in whose hands. Read `Fault`.

A fault returns in words what it did, or None when there was nothing to do it to (every victim taken already). It heals
itself; while it lasts it holds its victim.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from tests.chaos.support.clients import Clients
from tests.chaos.support.processes import Part
from tests.chaos.support.redis_sets import Missing, RedisSet
from tests.chaos.support.town import Town

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
async def victim(scene: Scene, parts: Sequence[Part]) -> AsyncGenerator[Part | None]:
    """One of these that is in nobody's hands, never the last such one."""
    free = [part for part in parts if not part.busy.locked() and part.alive]
    if len(free) < min(2, len(parts)):
        yield None
        return
    part = scene.rng.choice(free)
    async with part.busy:
        yield part


async def again(part: Part, pause_s: float) -> None:
    await asyncio.sleep(pause_s)
    part.spawn()
    # Held until it has had the time to start, so that a kind of fault doesn't only ever hit starting processes.
    await asyncio.sleep(1.0)
