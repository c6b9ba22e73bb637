"""Redis' disk is full: nothing new is admitted, nothing admitted is lost, and all goes on when there is room again."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import aiohttp
import pytest

from tests.chaos.support import ledger as ledgers
from tests.chaos.support.clients import Clients, Load
from tests.chaos.support.ledger import Ledger
from tests.chaos.support.processes import Part, until
from tests.chaos.support.town import CLIENT_KEY, KEYS, SCRIPTED
from tests.chaos.support.verdict import judge
from tests.support.redis_server import RedisServer, free_port

DISK_MIB = 24
LOAD = Load(min_tokens=40, max_tokens=120, cancels=0.0, leaves=0.0, batch=0.0)


@pytest.fixture
def disk(tmp_path: Path, missing_service: Callable[[str], NoReturn]) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        missing_service(f"mounting a tmpfs: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def parts(folder: Path, flags: list[str]) -> Iterator[tuple[str, list[Part]]]:
    """One replica and one worker."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    replica = [sys.executable, "-m", "orchestratord", "--port", str(port), "--keep-alive-ms", "1000", *flags]
    worker = [sys.executable, "-m", "tests.support.scripted_worker", "--orchestrator", url, "--slots", "8"]
    made = [
        Part("replica", [*replica, "--log-format", "json"], folder, KEYS),
        Part("worker", [*worker, "--token-ms", "40"], folder, KEYS),
    ]
    try:
        for part in made:
            part.spawn()
        yield url, made
    finally:
        for part in made:
            part.kill()


def fill(disk: Path) -> Path:
    """Leave no byte free."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x")
    return filler


async def post(session: aiohttp.ClientSession, url: str) -> tuple[int, dict[str, str]]:
    """Status and headers of one admission."""
    body = {"model": SCRIPTED, "prompt": "is there room?", "max_tokens": 1}
    headers = {"Authorization": f"Bearer {CLIENT_KEY}"}
    async with session.post(f"{url}/v2/tasks", json=body, headers=headers) as reply:
        await reply.read()
        return reply.status, dict(reply.headers)


async def until_status(
    session: aiohttp.ClientSession, url: str, wanted: int, deadline_s: float = 60.0
) -> dict[str, str]:
    """Wait for an admission that is answered so; every other answer must be one of the two that are expected."""
    async with asyncio.timeout(deadline_s):
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                status, headers = await post(session, url)
                if status == wanted:
                    return headers
                assert status in (202, 503, 404), status  # 404: the worker hasn't registered its model yet
            await asyncio.sleep(0.1)


async def a_full_disk_is_lived_through(url: str, disk: Path, folder: Path, server: RedisServer | None) -> None:
    """Load, fill, refuse, free, go on. `server` is started again where nobody else does it."""
    ledger = Ledger(folder / "ledger.jsonl")
    clients = Clients([url], ledger, 1, LOAD)
    committing = asyncio.create_task(ledger.run())
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=8)) as session:
        await until_status(session, url, 202)
        running = asyncio.create_task(clients.run(12))
        await until(lambda: clients.streams_in_flight() >= 6, "streams flow")
        filler = fill(disk)
        headers = await until_status(session, url, 503)
        assert int(headers["Retry-After"]) >= 1
        await asyncio.sleep(3)  # long enough for a supervisor to have tried again
        assert (await post(session, url))[0] == 503
        assert not running.done()
        filler.unlink()
        if server is not None:
            server.kill()
            await asyncio.to_thread(server.start)
        await until_status(session, url, 202)
        clients.stopping.set()
        await asyncio.wait({running}, timeout=90)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    committing.cancel()
    await asyncio.gather(committing, return_exceptions=True)
    ledger.close()
    verdict = judge(ledgers.read(ledger.path), {}, may_roll_back=False)
    print(f"{verdict.acknowledged} tasks acknowledged, {clients.posts_refused} admissions refused meanwhile")
    assert verdict.clean, verdict
    assert verdict.acknowledged >= 12 and clients.posts_refused > 0 and not clients.unexpected, clients.unexpected


async def test_the_embedded_redis(disk: Path, tmp_path: Path) -> None:
    """With `appendfsync always` the server ends itself when it can't write; the daemon starts it again and again."""
    with parts(tmp_path, ["--data-dir", str(disk / "data")]) as (url, made):
        await a_full_disk_is_lived_through(url, disk, tmp_path, None)
        assert made[0].alive and made[0].starts == 1, made[0].tail()


@pytest.mark.parametrize("fsync", ["always", "everysec"])
async def test_a_redis_of_ones_own(disk: Path, tmp_path: Path, fsync: str) -> None:
    """With `everysec` the server lives on and refuses writes (MISCONF); with `always` somebody must start it again."""
    options = {
        "port": str(free_port()), "dir": str(disk), "save": "", "appendonly": "yes", "appendfsync": fsync,
        "maxmemory-policy": "noeviction",
    }  # fmt: skip
    server = RedisServer(tmp_path, options)
    try:
        server.start()
        with parts(tmp_path, ["--redis-url", server.url]) as (url, _):
            again = server if fsync == "always" else None
            await a_full_disk_is_lived_through(url, disk, tmp_path, again)
    finally:
        server.kill()
