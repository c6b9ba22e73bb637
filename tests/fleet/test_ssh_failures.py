"""Every way in which a machine can't be reached: its own exit code, one message, within a deadline."""

from __future__ import annotations

import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.conftest import NewMachine
from tests.support.sshd import Machine, Operator, free_port, keygen

pytestmark = pytest.mark.e2e


def test_a_machine_that_answers(op: Operator, machine: Machine) -> None:
    done = op.llorch("pool", "list", "--json")
    assert '"name": "one"' in done.stdout and "SHA256:" in done.stdout
    assert op.llorch("worker", "list", "-p", "one").stdout == ""


def test_the_host_key_is_shown_and_agreed_to(op: Operator, new_machine: NewMachine) -> None:
    other = new_machine("keyed")
    refused = op.llorch("pool", "add", "keyed", other.address, check=4)
    fingerprint = next(word for word in refused.stderr.split() if word.startswith("SHA256:"))
    assert "keyed" not in op.llorch("pool", "list", "-o", "name").stdout
    wrong = op.llorch("pool", "add", "keyed", other.address, "--fingerprint", "SHA256:wrong", check=4)
    assert fingerprint in wrong.stderr
    op.llorch("pool", "add", "keyed", other.address, "--fingerprint", fingerprint)
    assert "keyed" in op.llorch("pool", "list", "-o", "name").stdout
    twice = op.llorch("pool", "add", "keyed", other.address, "-y", check=2)
    assert "--replace" in twice.stderr


def test_a_changed_host_key_is_refused_until_it_is_replaced(op: Operator, new_machine: NewMachine) -> None:
    changing = new_machine("changing")
    op.add("changing", changing)
    op.close()
    changing.stop()
    (changing.folder / "host_key").unlink()
    (changing.folder / "host_key.pub").unlink()
    changing.start()
    refused = op.llorch("worker", "list", "-p", "changing", check=4)
    assert "host key is not the one that was pinned" in refused.stderr and "@@@" not in refused.stderr
    assert f"llorch pool add --replace changing {changing.address}" in refused.stderr
    op.add("changing", changing, "--replace")
    op.llorch("worker", "list", "-p", "changing")


def test_a_key_that_is_not_accepted(op: Operator, new_machine: NewMachine, ground: Path) -> None:
    other = keygen(ground / "other_key")
    stranger = new_machine("stranger")
    shutil.copy(other.with_suffix(".pub"), stranger.folder / "authorized_keys")
    refused = op.llorch("pool", "add", "stranger", stranger.address, "-y", check=4)
    assert "accepts none of the keys" in refused.stderr and "--identity" in refused.stderr
    op.llorch("pool", "add", "--replace", "stranger", stranger.address, "-y", "--identity", str(other))
    op.llorch("worker", "list", "-p", "stranger")


def test_nobody_listens(op: Operator) -> None:
    refused = op.llorch("pool", "add", "nobody", f"root@127.0.0.1:{free_port()}", "-y", check=5)
    assert "connection refused" in refused.stderr


def test_a_name_that_is_not_known(op: Operator) -> None:
    refused = op.llorch("pool", "add", "nowhere", "no-such-host.invalid", "-y", check=5)
    assert "its name is not known" in refused.stderr


@pytest.fixture
def mute() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        listener.settimeout(0.1)
        over = threading.Event()
        kept: list[socket.socket] = []

        def accept() -> None:
            while not over.is_set():
                try:
                    kept.append(listener.accept()[0])
                except TimeoutError:
                    continue

        thread = threading.Thread(target=accept)
        thread.start()
        yield listener.getsockname()[1]
        over.set()
        thread.join(5)
        for connection in kept:
            connection.close()


def test_a_host_that_accepts_and_says_nothing(op: Operator, mute: int) -> None:
    """`SshMachine(connect_timeout=...)` deadlocked here."""
    began = time.monotonic()
    refused = op.llorch("pool", "add", "mute", f"root@127.0.0.1:{mute}", "-y", check=5)
    assert "does not answer" in refused.stderr
    assert time.monotonic() - began < 30


def test_a_bare_machine_is_told_apart(op: Operator, new_machine: NewMachine) -> None:
    bare = new_machine("bare", environ={"PATH": "/usr/bin:/bin"})
    added = op.llorch("pool", "add", "bare", bare.address, "-y")
    assert "llorch pool bootstrap bare" in added.stderr
    missing = op.llorch("worker", "list", "-p", "bare", check=1)
    assert "no llorch-pool on it" in missing.stderr and "llorch pool bootstrap bare" in missing.stderr


def test_a_noisy_login_shell_does_no_harm(op: Operator, new_machine: NewMachine) -> None:
    noisy = new_machine("noisy", extra_config="SetEnv BASH_ENV=/dev/null\n")
    (noisy.home / ".bashrc").write_text(
        'echo "Welcome to {\\"event\\": noise}"; echo warning >&2; printf "no newline "\n'
    )
    (noisy.home / ".profile").write_text("echo profile\n")
    op.add("noisy", noisy)
    assert op.llorch("worker", "list", "-p", "noisy", "--json").stdout.strip() == "[]"


HELLO = '{"event":"hello","version":"%s","protocol":%d,"host":"h","pid":1}'


def put_in_place(op: Operator, machine: Machine, name: str, *lines: str) -> None:
    """Make pool `name` call a shell script instead of llorch-pool (the real one answers `pool add`)."""
    program = machine.home / f"{name}-pool"
    program.symlink_to(Path(sys.executable).parent / "llorch-pool")
    op.add(name, machine, "--command", str(program))
    program.unlink()
    program.write_text("\n".join(["#!/bin/sh", "read -r line", *lines, ""]))
    program.chmod(0o755)


def test_another_version_is_said_at_every_contact(op: Operator, machine: Machine) -> None:
    answer = ('{"event":"result","value":[]}', '{"event":"end","rc":0}')
    put_in_place(op, machine, "old", *(f"echo '{line}'" for line in (HELLO % ("0.0.1", 1), *answer)))
    done = op.llorch("worker", "list", "-p", "old")
    assert "has llorch-pool 0.0.1" in done.stderr and "llorch pool bootstrap old" in done.stderr


def test_another_protocol_is_refused(op: Operator, machine: Machine) -> None:
    end = '{"event":"end","rc":1,"failure":{"code":"version","message":"other protocol","next_step":"bootstrap"}}'
    put_in_place(op, machine, "ancient", f"echo '{HELLO % ('0.0.1', 9)}'", f"echo '{end}'")
    assert "other protocol" in op.llorch("worker", "list", "-p", "ancient", check=1).stderr


def test_a_connection_that_dies_in_mid_answer(op: Operator, machine: Machine) -> None:
    put_in_place(op, machine, "broken", f"echo '{HELLO % ('0.1.0', 1)}'")
    refused = op.llorch("worker", "list", "-p", "broken", check=5)
    assert "ended before the answer" in refused.stderr


def test_the_commands_own_deadline(op: Operator, machine: Machine) -> None:
    put_in_place(op, machine, "slow", "cat >/dev/null")
    began = time.monotonic()
    refused = op.llorch("worker", "list", "-p", "slow", "--timeout", "0.5", check=124)
    assert "no answer within 0.5 s" in refused.stderr and time.monotonic() - began < 15


def test_a_part_of_a_fleet_that_fails(op: Operator, machine: Machine, new_machine: NewMachine) -> None:
    dead = new_machine("dead")
    op.add("dead", dead)
    op.close()
    dead.stop()
    partly = op.llorch("model", "list", "-p", "one", "-p", "dead", check=3)
    assert "1 of 2 pools failed: dead" in partly.stderr and "connection refused" in partly.stderr
    op.llorch("model", "list", "-p", "dead", check=5)


def test_usage(op: Operator, machine: Machine) -> None:
    for arguments, words in (
        (["model", "list", "-p", "nope"], "no pool 'nope'"),
        (["model", "list", "-p", "one", "--all"], "exclude each other"),
        (["pool", "add", "a b", "host"], "can't be the name of a pool"),
        (["pool", "add", "ok", "-oProxyCommand=touch /tmp/owned"], "No such option"),
        (["pool", "add", "ok", "--", "-oProxyCommand=x"], "is not [user@]host[:port]"),
        (["pool", "add", "ok", "host; id"], "is not [user@]host[:port]"),
        (["pool", "add", "ok", "host:99999"], "is not [user@]host[:port]"),
        (["worker", "stop", "nothing", "-p", "one"], "no worker 'nothing'"),
        (["worker", "spawn", "demo", "-p", "one"], "which orchestratord?"),
        (["pool", "bootstrap", "one", "--torch", "rm -rf"], "--torch"),
    ):
        refused = op.llorch(*arguments, check=2)
        assert words.lower() in refused.stderr.lower(), refused.stderr
        assert "next:" in refused.stderr
