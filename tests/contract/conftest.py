"""The stores that the contract is checked on. A test with `store` ends with a clean audit."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Generator

import fakeredis
import pytest

from orchestratord.store.connection import Connection
from orchestratord.store.store import Store
from tests.support.redis_server import ClusterGroup, RedisServer, cluster_group, redis_server


@pytest.fixture(scope="session")
def server() -> Generator[RedisServer]:
    """A plain server, shared; `store` empties it."""
    with redis_server() as running:
        yield running


@pytest.fixture(scope="session")
def cluster() -> Generator[ClusterGroup]:
    """A cluster of three masters, shared."""
    with cluster_group() as running:
        yield running


@pytest.fixture(params=["fakeredis", "real"])
async def store(request: pytest.FixtureRequest) -> AsyncGenerator[Store]:
    """A store on an empty Redis, audited at the end."""
    async with open_store(request) as made:
        yield made
        assert await made.audit() == []


@pytest.fixture(params=["fakeredis", "real"])
async def breakable_store(request: pytest.FixtureRequest) -> AsyncGenerator[Store]:
    """A store on an empty Redis that a test may leave broken."""
    async with open_store(request) as made:
        yield made


@pytest.fixture
async def real_store(server: RedisServer) -> AsyncGenerator[Store]:
    """A store on a real, empty server: for what fakeredis doesn't have."""
    async with real(server) as made:
        yield made
        assert await made.audit() == []


@contextlib.asynccontextmanager
async def open_store(request: pytest.FixtureRequest) -> AsyncGenerator[Store]:
    if request.param == "real":
        async with real(request.getfixturevalue("server")) as made:
            yield made
        return
    made = Store(Connection(fakeredis.FakeAsyncRedis(), "fakeredis", 5.0))
    try:
        yield made
    finally:
        await made.aclose()


@contextlib.asynccontextmanager
async def real(server: RedisServer) -> AsyncGenerator[Store]:
    with contextlib.closing(server.client()) as client:
        client.flushall()
    made = await Store.connect(server.url)
    try:
        yield made
    finally:
        await made.aclose()
