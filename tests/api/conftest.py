"""A server over an orchestrator in memory, and an HTTP client."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.api.harness import MemoryOrchestrator, serving


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
