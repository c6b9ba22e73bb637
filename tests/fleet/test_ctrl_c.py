"""Ctrl-C during downloads, spawns and fleet commands: nothing runs remotely 2 s later, and nothing half-made stays."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest

from tests.fleet.conftest import NewMachine
from tests.support.fleet import WORKER_KEY, Orchestrator
from tests.support.hub import Hub
from tests.support.sshd import Machine, Operator, wait_for
from tests.unit.llorch_pool.conftest import write_model

pytestmark = pytest.mark.e2e
WITHIN_S = 2.0


def busy(machine: Machine) -> list[str]:
    """What runs on a machine, as `ps` would show it."""
    return [line for _, line in machine.processes()]


def interrupt(process: subprocess.Popen[bytes], machines: list[Machine]) -> float:
    """Send SIGINT; seconds until nothing runs there any more. The exit code must be 130."""
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    wait_for(lambda: not any(busy(machine) for machine in machines), 10, "something still runs")
    if not machines:
        process.wait(10)
    took = time.monotonic() - began
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130, stderr
    return took


def test_during_a_download(op: Operator, machine: Machine, hub: Hub) -> None:
    hub.faults.cut_after, hub.faults.hold = 300_000, True
    process = op.start("model", "download", "hf:acme/tiny", "-p", "one", environ={"HF_ENDPOINT": hub.url})
    wait_for(
        lambda: any(path.stat().st_size >= 300_000 for path in machine.models.glob(".partial/tiny/model*.part")), 30
    )
    assert interrupt(process, [machine]) < WITHIN_S
    assert not (machine.models / "tiny").exists()
    hub.faults.hold = False
    op.llorch("model", "download", "hf:acme/tiny", "-p", "one", environ={"HF_ENDPOINT": hub.url})
    assert any(request.range for request in hub.requests), "it did not go on where it had stopped"
    op.llorch("model", "verify", "tiny", "-p", "one")


def test_during_a_spawn(op: Operator, machine: Machine, house: Orchestrator) -> None:
    process = op.start(
        "worker", "spawn", "demo", "-p", "one", "--orchestrator", house.url, environ={"LLORCH_WORKER_KEY": WORKER_KEY}
    )
    wait_for(lambda: any("worker.engine" in line for line in busy(machine)), 30)
    assert interrupt(process, [machine]) < WITHIN_S
    assert json.loads(op.llorch("worker", "list", "-p", "one", "--json").stdout) == []


def test_during_a_fleet_command(op: Operator, machine: Machine, new_machine: NewMachine, hub: Hub) -> None:
    machines = [new_machine(f"c{number}") for number in range(3)]
    for number, made in enumerate(machines):
        op.add(f"c{number}", made)
    hub.faults.cut_after, hub.faults.hold = 300_000, True
    names = [word for number in range(3) for word in ("-p", f"c{number}")]
    process = op.start("model", "download", "hf:acme/tiny", *names, environ={"HF_ENDPOINT": hub.url})
    wait_for(lambda: all(any(made.models.glob(".partial/tiny/model*.part")) for made in machines), 30)
    assert interrupt(process, machines) < WITHIN_S


def test_following_a_log(op: Operator, machine: Machine) -> None:
    log = machine.state / "x"
    log.parent.mkdir(parents=True, exist_ok=True)
    op.llorch("worker", "list", "-p", "one")
    folder = next(path for path in machine.state.iterdir() if path.is_dir()) if machine.state.exists() else log
    (folder / "workers").mkdir(exist_ok=True)
    path = folder / "workers" / "past.log"
    path.write_text("a line\n")
    process = op.start("worker", "logs", "past", "-p", "one", "-f")
    assert process.stdout is not None and process.stdout.readline() == b"a line\n"
    with path.open("a") as stream:
        stream.write("another\n")
    assert process.stdout.readline() == b"another\n"
    assert interrupt(process, [machine]) < WITHIN_S


def test_killing_llorch_itself_ends_the_remote_command(op: Operator, machine: Machine, hub: Hub) -> None:
    hub.faults.cut_after, hub.faults.hold = 300_000, True
    process = op.start(
        "model", "download", "hf:acme/tiny", "-p", "one", "--name", "t2", environ={"HF_ENDPOINT": hub.url}
    )
    wait_for(lambda: any(machine.models.glob(".partial/t2/model*.part")), 30)
    process.kill()
    process.communicate(timeout=5)
    wait_for(lambda: not busy(machine), 5, "the remote command lives on")


def large_model(folder: Path) -> Path:
    """A model folder whose weights take a while to be copied and read: 400 MB of zeros, sparse."""
    write_model(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    size = 400 << 20
    header = json.dumps({"b": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (folder / "model-00002-of-00002.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + size)
    return folder


def test_during_a_copy_from_pool_to_pool(
    op: Operator, machine: Machine, new_machine: NewMachine, tmp_path: Path
) -> None:
    there = new_machine("copied")
    op.add("copied", there)
    op.llorch("model", "download", f"file:{large_model(tmp_path / 'large')}", "--name", "large", "-p", "one")
    process = op.start("model", "copy", "large", "--from", "one", "--to", "copied")
    parts = there.models / ".partial" / "large"
    wait_for(lambda: any(path.stat().st_size > 20 << 20 for path in parts.glob("*00002*")), 30, "no byte came")
    assert interrupt(process, [machine, there]) < WITHIN_S
    assert not (there.models / "large").exists()
    op.llorch("model", "copy", "large", "--from", "one", "--to", "copied")
    op.llorch("model", "verify", "large", "-p", "copied")
    for name in ("one", "copied"):
        op.llorch("model", "remove", "large", "-p", name, "-y")


def test_while_connecting_to_a_host_that_says_nothing(op: Operator, new_machine: NewMachine) -> None:
    mute = new_machine("mute")
    op.add("mute", mute)
    op.close()
    mute.stop()
    with socket.create_server((mute.host, mute.port)) as listener:
        listener.settimeout(20)
        process = op.start("worker", "list", "-p", "mute")
        connection, _ = listener.accept()
        with connection:
            assert interrupt(process, []) < WITHIN_S


def test_what_was_started_ahead_for_a_mistake_ends_with_it(op: Operator, machine: Machine) -> None:
    """The far side starts while this side still reads its arguments: a wrong one must leave nothing there."""
    op.llorch("worker", "list", "-p", "one")
    refused = op.llorch("worker", "list", "-p", "one", "--no-such-option", check=2)
    assert "no such option" in refused.stderr
    wait_for(lambda: not busy(machine), WITHIN_S, "the far side waits for a request")
