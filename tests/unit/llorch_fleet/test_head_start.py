"""What is started before a command has been read: for whom, and how it ends when nobody wants it."""

from __future__ import annotations

import shutil
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


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"pools": {"up": {"name": "up", "host": "h\\u0000"}}}'])
def test_a_registry_that_can_not_be_read_is_the_commands_to_tell(pools: Pools, content: str) -> None:
    pools.file.write_text(content)
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


def test_those_that_nobody_took_share_their_time_to_end(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each hears of the end before any is waited for: the second to be asked ends only when the first has."""
    turns = iter(range(3))
    processes: list[subprocess.Popen[bytes]] = []

    def open_rpc(*_: object) -> subprocess.Popen[bytes]:
        turn = next(turns)
        others = " ".join(f"{tmp_path}/{other}" for other in range(3) if other != turn)
        await_others = f"for f in {others}; do until test -e $f; do sleep 0.02; done; done"
        script = f"cat >/dev/null; touch {tmp_path}/{turn}; {await_others}"
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(["sh", "-c", script], stdin=pipe, stdout=pipe, stderr=pipe))
        return processes[-1]

    monkeypatch.setattr(connection, "open_rpc_early", open_rpc)
    monkeypatch.setattr(head_start, "LEAVE_S", 20.0)
    waiting = HeadStart()
    for _ in range(3):
        waiting.start(pools.get("up"), pools)
    waiting.close()
    assert [process.returncode for process in processes] == [0, 0, 0]


def test_a_runtime_folder_that_nobody_made_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    short = Path(tempfile.mkdtemp(prefix="lh", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short / "none"))
    assert connection.control_folder().parent == short
    assert not (short / "none").exists()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    assert connection.control_folder() == short / "llorch"


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh here")
def test_a_configuration_for_tunnels_does_not_keep_commands_from_running(pools: Pools, tmp_path: Path) -> None:
    configuration = tmp_path / "ssh_config"
    configuration.write_text(
        "IgnoreUnknown UseKeychain\nUseKeychain yes\n"
        "StdinNull yes\nForkAfterAuthentication yes\nSessionType none\nRequestTTY force\n"
    )
    command = ["ssh", "-F", str(configuration), *connection.options(pools.get("down"), pools), "-G", "h"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    for line in ("stdinnull no", "forkafterauthentication no", "sessiontype default"):
        assert line in shown or not any(other.startswith(line.split()[0]) for other in shown), line
    assert "requesttty false" in shown
