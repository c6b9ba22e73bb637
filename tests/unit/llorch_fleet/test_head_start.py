"""What is started before a command has been read: for whom, and how it ends when nobody wants it."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from llorch.fleet import connection, head_start
from llorch.fleet.head_start import HeadStart, begun, current, named_pools
from llorch.fleet.pools import Pool, Pools


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("worker list -p a", ["a"]),
        ("workers list --json --pool a -p b", ["a", "b"]),
        ("model show tale -p a", ["a"]),
        ("pool doctor -p a --fix", ["a"]),
        ("worker list --help -p a", []),
        ("worker list -p a --all", []),
        ("worker list -p", []),
        ("worker logs -- -p a", []),
        ("worker spawn demo -p a", []),
        ("model download demo -p a", []),
        ("worker list -p a -p b -p c -p d -p e", []),
        ("task list -p a", []),
    ],
)
def test_for_whom(typed: str, names: list[str]) -> None:
    assert named_pools(typed.split()) == names


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Pool, subprocess.Popen[bytes]]]]:
    """Pools whose remote side was started; in its place runs a program that waits for the end of its stdin."""
    processes: list[tuple[Pool, subprocess.Popen[bytes]]] = []

    def open_rpc(pool: Pool, _: Pools) -> subprocess.Popen[bytes]:
        code = "import sys; sys.stdin.read()"
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe)
        processes.append((pool, process))
        return process

    monkeypatch.setattr(connection, "open_rpc_early", open_rpc)
    yield processes
    for _, process in processes:
        connection.finish(process)


@pytest.fixture
def pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pools:
    """Two pools, `up` with a control socket and `down` without."""
    short = tempfile.mkdtemp(prefix="lh", dir="/tmp")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", short)
    found = Pools.open()
    for name in ("up", "down"):
        found.put(Pool(name=name, host="h", host_key="SHA256:x"))
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        option = connection.options(found.get("up"), found)
        path = next(word for word in option if word.startswith("ControlPath=")).removeprefix("ControlPath=")
        listener.bind(path.replace("%C", "0" * 40))
    return found


def test_only_where_the_connection_is_up(pools: Pools, started: list[tuple[Pool, subprocess.Popen[bytes]]]) -> None:
    with begun(["worker", "list", "-p", "up", "-p", "down", "-p", "unknown"]):
        assert [pool.name for pool, _ in started] == ["up"]
        waiting = current()
        assert waiting is not None and waiting.take(pools.get("down")) is None
        taken = waiting.take(pools.get("up"))
        assert taken is started[0][1] and waiting.take(pools.get("up")) is None
    assert current() is None
    assert taken.poll() is None, "what was taken is the taker's to end"


def test_what_nobody_took_is_ended(pools: Pools, started: list[tuple[Pool, subprocess.Popen[bytes]]]) -> None:
    with pytest.raises(KeyboardInterrupt), begun(["worker", "list", "-p", "up", "--wrong"]):
        raise KeyboardInterrupt
    assert started[0][1].returncode == 0


def test_a_pool_that_was_changed_meanwhile_is_another_one(
    pools: Pools, started: list[tuple[Pool, subprocess.Popen[bytes]]]
) -> None:
    with begun(["worker", "list", "-p", "up"]):
        waiting = current()
        assert isinstance(waiting, HeadStart)
        pools.update("up", command="/elsewhere/llorch-pool")
        assert waiting.take(pools.get("up")) is None


def test_a_registry_that_can_not_be_read_is_the_commands_to_tell(pools: Pools) -> None:
    pools.file.write_text("{")
    with begun(["worker", "list", "-p", "up"]):
        assert head_start.current() is not None


def test_plumbum_comes_without_an_http_client() -> None:
    code = (
        "import sys; from llorch.fleet.connection import finish, popen; finish(popen(['-V']));"
        "assert 'plumbum' in sys.modules and not {'ssl', 'urllib.request'} & set(sys.modules);"
        "from plumbum import local; assert local.path('/a b').as_uri() == 'file:///a%20b';"
        "import urllib.request; urllib.request.Request"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_process_is_seen_off_when_it_ends_and_killed_when_it_does_not() -> None:
    pipe = subprocess.PIPE
    ends = subprocess.Popen(["sh", "-c", "read line; exit 7"], stdin=pipe, stdout=pipe, stderr=pipe)
    assert connection.finish(ends, 20) == 7
    stays = subprocess.Popen(["sleep", "60"], stdin=pipe, stdout=pipe, stderr=pipe)
    assert connection.finish(stays, 0.1) is None and stays.returncode == -9
