"""Every way in which a machine can't be reached: its own exit code, one message, within a deadline."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llorch.fleet.pools import Pools
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
    put_in_place(op, machine, "slow", f"echo '{HELLO % ('0.1.0', 1)}'", "cat >/dev/null")
    began = time.monotonic()
    refused = op.llorch("worker", "list", "-p", "slow", "--timeout", "2", check=124)
    assert "no answer within 2 s" in refused.stderr and time.monotonic() - began < 15


def test_a_command_that_the_pool_gave_up(op: Operator, machine: Machine) -> None:
    """llorch-pool ends in this way when a command doesn't react to its deadline."""
    put_in_place(op, machine, "stuck", f"echo '{HELLO % ('0.1.0', 1)}'", "exit 124")
    assert "no answer within 30 s" in op.llorch("worker", "list", "-p", "stuck", check=124).stderr


def test_the_deadline_counts_for_a_host_that_says_nothing(op: Operator, mute: int) -> None:
    registry = Path(op.environ["XDG_CONFIG_HOME"]) / "llorch" / "pools.json"
    content = json.loads(registry.read_text())
    content["pools"]["silent"] = {"name": "silent", "host": "127.0.0.1", "user": "me", "port": mute}
    registry.write_text(json.dumps(content))
    refused = op.llorch("worker", "list", "-p", "silent", "--timeout", "2", check=5)
    assert "it does not answer [not a word within 2 s]" in refused.stderr
    assert f"ssh -p {mute} " in refused.stderr
    op.llorch("pool", "remove", "silent", "-y")


def test_a_pool_that_was_refused_is_kept_and_this_is_said(op: Operator, new_machine: NewMachine, ground: Path) -> None:
    other = keygen(ground / "kept_key")
    kept = new_machine("kept")
    shutil.copy(other.with_suffix(".pub"), kept.folder / "authorized_keys")
    refused = op.llorch("pool", "add", "kept", kept.address, "-y", check=4)
    assert "kept is kept: correct it with --replace, or llorch pool remove kept" in refused.stderr
    assert "kept" in op.llorch("pool", "list", "-o", "name").stdout.split()


def test_what_is_to_be_typed_next_has_every_option_that_was_given(op: Operator, new_machine: NewMachine) -> None:
    given = new_machine("given")
    (op.folder / "my key").write_bytes(op.key.read_bytes())
    (op.folder / "my key").chmod(0o600)
    options = ["--replace", "-i", "my key", "--command", "/no/llorch pool", "--orchestrator", "http://house:8080/"]
    refused = op.llorch("pool", "add", *options, "given", given.address, check=4)
    typed = shlex.split(refused.stderr.splitlines()[-1].removeprefix("next:"))
    assert typed[0] == "llorch"
    op.llorch(*typed[1:])
    kept = Pools(Path(op.environ["XDG_CONFIG_HOME"]) / "llorch").get("given")
    assert kept.identity_file == str(op.folder / "my key"), "a relative path means nothing in another folder"
    assert (kept.command, kept.orchestrator) == ("/no/llorch pool", "http://house:8080")
    op.add("given", given, "--replace")
    assert Pools(Path(op.environ["XDG_CONFIG_HOME"]) / "llorch").get("given").command == "/no/llorch pool"
    op.add("given", given, "--replace", "--command", "llorch-pool", "-i", "", "--orchestrator", "")
    reset = Pools(Path(op.environ["XDG_CONFIG_HOME"]) / "llorch").get("given")
    assert (reset.identity_file, reset.command, reset.orchestrator) == ("", "llorch-pool", "")


def test_a_configuration_for_tunnels_does_no_harm(op: Operator, new_machine: NewMachine) -> None:
    """What people set for a host that they use for port forwarding; and unknown words that they let pass."""
    tunnel = new_machine("tunnel")
    wrapper = op.folder / "bin" / "ssh"
    kept = wrapper.read_text()
    configuration = next(Path(word.strip("\"'")) for word in kept.split() if "config" in word)
    before = configuration.read_text()
    configuration.write_text(
        "IgnoreUnknown UseKeychain\nUseKeychain yes\n"
        f"StdinNull yes\nForkAfterAuthentication yes\nSessionType none\n{before}"
    )
    try:
        op.add("tunnel", tunnel)
        assert op.llorch("worker", "list", "-p", "tunnel", "--json").stdout.strip() == "[]"
    finally:
        configuration.write_text(before)


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
