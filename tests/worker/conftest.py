"""One scripted worker shared by the tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.support.worker_process import WorkerProcess, scripted_model


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scripted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WorkerProcess]:
    """A worker over the scripted engine: 4 slots, 2 ms a step, a context of 256."""
    folder: Path = tmp_path_factory.mktemp("scripted")
    model = scripted_model(folder / "model", slots=4, step_ms=2)
    worker = WorkerProcess.scripted(folder, model, "--orphan-grace-ms", "1500", "--worker-id", "w1")
    try:
        yield await worker.start()
    finally:
        status = await worker.stop()
    assert status == 0


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client without a limit on connections."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        yield client
