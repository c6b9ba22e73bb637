"""The processes of a chaos run: replicas by their real command line, scripted workers, one real worker. Read `Town`.

Ports are fixed for a run: what is started again comes back at its address, as a service does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from orchestratord.store.errors import StoreUnavailableError
from orchestratord.store.store import Store
from tests.chaos.support.processes import Part, children_of, until
from tests.chaos.support.redis_sets import RedisSet
from tests.support.redis_server import free_port

CLIENT_KEY = "client-key-of-the-chaos-run"
ADMIN_KEY = "admin-key-of-the-chaos-run"
WORKER_KEY = "worker-key-of-the-chaos-run"
SCRIPTED = "scripted"
DEMO = "demo"
KEYS = {"LLORCH_API_KEYS": f"chaos={CLIENT_KEY},admin={ADMIN_KEY}", "LLORCH_WORKER_KEY": WORKER_KEY}


@dataclass(frozen=True)
class Place:
    """Where a process runs: an address to listen on, and what its command line is put behind (a namespace)."""

    host: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """How big a town is."""

    replicas: int = 3
    workers: int = 4
    slots: int = 16
    token_ms: float = 60.0
    real_worker: bool = False
    launcher: tuple[str, ...] = ("orchestratord",)
    """Module of a replica's program and its own arguments: a saboteur's, where a test shows that a check bites."""
    worker_module: str = "tests.support.scripted_worker"
    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=lambda: dict(KEYS))


class Town:
    """Everything that runs beside Redis, and what must be asked of it."""

    def __init__(self, redis: RedisSet, plan: Plan, folder: Path, places: dict[str, Place] | None = None) -> None:
        self.redis, self.plan, self.folder = redis, plan, folder
        self._places = places or {}
        self.replicas: list[Part] = []
        self.urls: list[str] = []
        self.workers: list[Part] = []
        self.worker_urls: list[str] = []
        self.real: Part | None = None
        self._store: Store | None = None
        self._session: aiohttp.ClientSession | None = None
        for number in range(plan.replicas):
            self._add_replica(number)
        for number in range(plan.workers):
            self._add_worker(number)
        if plan.real_worker:
            self._add_real_worker()

    def _add_replica(self, number: int) -> None:
        name, port = f"replica{number}", free_port()
        place = self._places.get(name, Place())
        command = [
            *place.prefix, sys.executable, "-m", *self.plan.launcher, "--host", place.host, "--port", str(port),
            "--redis-url", self.redis.url, "--keep-alive-ms", "1000", "--log-format", "json", "--retention-s", "3600",
            *self.plan.flags,
        ]  # fmt: skip
        if number == 0:  # one replica keeps its name over restarts: it finds its own tasks again
            command += ["--replica-id", "replica-0"]
        if self.redis.jobs_url is not None:
            command += ["--jobs-redis-url", self.redis.jobs_url]
        self.replicas.append(Part(name, command, self.folder, self.plan.env))
        self.urls.append(f"http://{place.host}:{port}")

    def _add_worker(self, number: int) -> None:
        name, port = f"worker{number}", free_port()
        place = self._places.get(name, Place())
        command = [
            *place.prefix, sys.executable, "-m", self.plan.worker_module, "--worker-id", name,
            "--host", place.host, "--port", str(port), "--slots", str(self.plan.slots),
            "--token-ms", str(self.plan.token_ms), "--model", SCRIPTED,
        ]  # fmt: skip
        for url in self.urls:
            command += ["--orchestrator", url]
        env = {name: value for name, value in self.plan.env.items() if name == "LLORCH_WORKER_KEY"}
        self.workers.append(Part(name, command, self.folder, env))
        self.worker_urls.append(f"http://{place.host}:{port}")

    def _add_real_worker(self) -> None:
        command = [
            sys.executable, "-m", "worker", "--model", DEMO, "--worker-id", "real", "--port", str(free_port()),
            "--slots", "4", "--threads", "1", "--log-format", "json", "--orchestrator", ",".join(self.urls),
        ]  # fmt: skip
        env = {name: value for name, value in self.plan.env.items() if name == "LLORCH_WORKER_KEY"}
        self.real = Part("real", command, self.folder, env)

    @property
    def parts(self) -> list[Part]:
        """Every process, Redis' apart."""
        return [*self.replicas, *self.workers, *([self.real] if self.real else [])]

    @property
    def store(self) -> Store:
        """The test's own way to the state."""
        assert self._store is not None
        return self._store

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None
        return self._session

    async def start(self) -> None:
        """Start everything; returns when every worker takes work."""
        for part in self.parts:
            part.spawn()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=10, sock_connect=2),
        )
        self._store = await Store.connect(self.redis.url)
        await self.all_ready()

    async def all_ready(self, deadline_s: float = 120.0) -> None:
        """Wait until every replica answers and every worker is ready."""
        wanted = {part.name for part in [*self.workers, *([self.real] if self.real else [])]}
        missing: list[str] = ["everything"]
        try:
            async with asyncio.timeout(deadline_s):
                while missing:
                    missing = await self._missing(wanted)
                    for part in self.parts:
                        assert part.alive, f"{part.name} ended:\n{part.tail()}"
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise TimeoutError(f"not ready: {', '.join(missing)}") from None

    async def _missing(self, wanted: set[str]) -> list[str]:
        """What isn't ready, in words."""
        try:
            states = {view.worker_id: view.state for view in await self.store.workers()}
        except StoreUnavailableError as error:
            return [str(error)]
        lacking = [f"{name} is {states.get(name, 'unknown')}" for name in sorted(wanted) if states.get(name) != "ready"]
        return lacking + [url for url in self.urls if not await self._is_ready(url)]

    async def _is_ready(self, url: str) -> bool:
        try:
            async with self.session.get(f"{url}/ready") as reply:
                return reply.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def operate(self, path: str, body: dict[str, Any] | None = None, *, tries_s: float = 15.0) -> Any:
        """POST as an operator at whichever replica answers."""
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        async with asyncio.timeout(tries_s):
            while True:
                for url in self.urls:
                    try:
                        async with self.session.post(url + path, json=body or {}, headers=headers) as reply:
                            if reply.status == 200:
                                return await reply.json()
                    except (aiohttp.ClientError, OSError, TimeoutError):
                        continue
                await asyncio.sleep(0.1)

    async def worker_says(self, number: int, path: str) -> Any:
        """GET at a scripted worker."""
        headers = {"Authorization": f"Bearer {WORKER_KEY}"}
        async with self.session.get(self.worker_urls[number] + path, headers=headers) as reply:
            reply.raise_for_status()
            return await reply.json()

    def engine_pid(self) -> int | None:
        """Process id of the real worker's engine, None while there is none."""
        assert self.real is not None
        if not self.real.alive:
            return None
        return next((pid for pid, command in children_of(self.real.pid) if b"--fd" in command), None)

    async def close(self) -> None:
        """End everything."""
        for part in self.parts:
            part.kill()
        if self._session is not None:
            await self._session.close()
        if self._store is not None:
            with contextlib.suppress(StoreUnavailableError):
                await self._store.aclose()

    def complaints(self) -> list[str]:
        """Lines in the logs that no fault excuses: failed loops, unexpected exceptions, a worker's assertions."""
        found: list[str] = []
        for part in self.parts:
            if not part.log_file.exists():
                continue
            for line in part.log_file.read_text(errors="replace").splitlines():
                if _is_complaint(line, errors=part in self.replicas):
                    found.append(f"{part.name}: {line[:600]}")
        return found


def _is_complaint(line: str, *, errors: bool) -> bool:
    """`errors`: nothing that befalls it is an error to this program. To the worker, the death of its engine is one."""
    if line.startswith("{"):
        with contextlib.suppress(ValueError):
            return errors and json.loads(line).get("level") in ("error", "critical")
    return "Traceback" in line or "AssertionError" in line or "never awaited" in line


@contextlib.asynccontextmanager
async def town_of(
    redis: RedisSet, plan: Plan, folder: Path, places: dict[str, Place] | None = None
) -> AsyncGenerator[Town]:
    """A running town; nothing of it is left afterwards."""
    town = Town(redis, plan, folder, places)
    try:
        await town.start()
        yield town
    finally:
        await town.close()


async def gone(part: Part) -> None:
    """Wait until a process has ended."""
    await until(lambda: not part.alive, f"{part.name} has ended")
