"""One request to a pool, with a shell script in place of ssh: which failure each way to end comes to."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llorch.errors import CliError, ExitCode
from llorch.fleet import connection, failures, ssh
from llorch.fleet.pools import Pool, Pools
from llorch_wire import pool as wire

POOL = Pool(name="gpu1", host="h")
HELLO = f"""echo '{{"event":"hello","version":"{wire.VERSION}","protocol":{wire.POOL_PROTOCOL},"host":"h","pid":1}}'"""
InPlace = Callable[[str], None]


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[InPlace]:
    """Makes a shell script stand in for ssh."""
    groups: list[int] = []

    def use(script: str) -> None:
        def start(*_: Any, **__: Any) -> subprocess.Popen[bytes]:
            pipe = subprocess.PIPE
            arguments = ["sh", "-c", script]
            process = subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
            groups.append(process.pid)
            return process

        monkeypatch.setattr(connection, "open_rpc", start)
        monkeypatch.setattr(connection, "popen", start)

    yield use
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def fails(tmp_path: Path, *, name: str = "tale", timeout_s: float = 20) -> CliError:
    with pytest.raises(CliError) as raised:
        ssh.call(POOL, Pools(tmp_path), wire.ModelShow(name=name), timeout_s=timeout_s)
    return raised.value


@pytest.mark.parametrize(
    ("script", "kind", "code"),
    [
        (f"read -r line; {HELLO}; exit 124", "deadline", ExitCode.TIMEOUT),
        (f"read -r line; {HELLO}; echo 'llorch-pool: not found' >&2; exit 127", "broken", ExitCode.UNREACHABLE),
        (f"read -r line; {HELLO}; echo 'x: No such file or directory' >&2; exit 1", "broken", ExitCode.UNREACHABLE),
        ("read -r line; echo 'sh: llorch-pool: not found' >&2; exit 127", "missing", ExitCode.FAILED),
        ("read -r line; exit 124", "broken", ExitCode.UNREACHABLE),
    ],
)
def test_how_it_ends(tmp_path: Path, in_place: InPlace, script: str, kind: str, code: int) -> None:
    in_place(script)
    error = fails(tmp_path)
    assert (failures.kind_of(error), error.exit_code) == (kind, code)


def test_a_host_that_says_nothing_has_the_time_given_and_no_more(tmp_path: Path, in_place: InPlace) -> None:
    in_place("exec sleep 20")
    error = fails(tmp_path, timeout_s=0.2)
    assert error.exit_code == ExitCode.UNREACHABLE and "it does not answer [not a word within 0.2 s]" in error.message


def test_who_said_hello_may_say_itself_that_it_was_too_slow(
    tmp_path: Path, in_place: InPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "GRACE_S", 0.1)
    in_place(f"{HELLO}; exec sleep 20")
    assert failures.kind_of(fails(tmp_path, timeout_s=0.2)) == "deadline"


def test_a_request_that_nobody_takes_has_a_deadline(tmp_path: Path, in_place: InPlace) -> None:
    """A pipe holds 64 KiB."""
    ended = tmp_path / "ended"
    in_place(f"sleep 20; touch {ended}")
    assert failures.kind_of(fails(tmp_path, name="x" * 1_000_000, timeout_s=0.2)) == "timeout"
    assert not ended.exists()


def test_a_long_request_arrives_whole(tmp_path: Path, in_place: InPlace) -> None:
    end = '{"event":"end","rc":1,"failure":{"code":"x","message":"%s","next_step":"y"}}'
    in_place(f"{HELLO}; sleep 0.3; length=$(head -n 1 | wc -c); printf '{end}\\n' $length")
    name = "x" * 1_000_000
    request = wire.Request(command=wire.ModelShow(name=name), version=wire.VERSION, timeout_s=20)
    assert fails(tmp_path, name=name).message == f"gpu1: {len(wire.encode_line(request))}"


def run_script(tmp_path: Path, payload: Path, timeout_s: float) -> tuple[tuple[int, str], list[str]]:
    lines: list[str] = []
    cancel = threading.Event()
    done = ssh.run_script(POOL, Pools(tmp_path), "x", payload, timeout_s=timeout_s, on_line=lines.append, cancel=cancel)
    return done, lines


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    path = tmp_path / "payload"
    path.write_bytes(bytes(range(256)) * 4096)
    return path


def test_a_payload_arrives_and_stdin_stays_open(tmp_path: Path, in_place: InPlace, payload: Path) -> None:
    in_place("head -c 1048576 | sha256sum; echo words >&2; exit 3")
    done, lines = run_script(tmp_path, payload, 20)
    assert done == (3, "words\n") and lines[0].split()[0] == hashlib.sha256(payload.read_bytes()).hexdigest()


def test_a_payload_that_nobody_takes_has_a_deadline(tmp_path: Path, in_place: InPlace, payload: Path) -> None:
    ended = tmp_path / "ended"
    in_place(f"sleep 20; touch {ended}")
    with pytest.raises(CliError, match="no answer within"):
        run_script(tmp_path, payload, 0.2)
    assert not ended.exists()
