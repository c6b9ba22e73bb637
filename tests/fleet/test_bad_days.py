"""Bad days: ports that are taken, workers that hang, full disks, two operators at once, Ctrl-C anywhere."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.bare import add_bare, bare_path
from tests.fleet.conftest import NewMachine
from tests.fleet.test_ctrl_c import WITHIN_S, busy, interrupt
from tests.support.fleet import WORKER_KEY, Orchestrator
from tests.support.sshd import Machine, Operator, operator, wait_for

pytestmark = pytest.mark.e2e
KEY = {"LLORCH_WORKER_KEY": WORKER_KEY}


def spawn(op: Operator, house: Orchestrator, *options: str) -> dict[str, Any]:
    command = ["worker", "spawn", "demo", "-p", "one", "--orchestrator", house.url, "--json", *options]
    return json.loads(op.llorch(*command, environ=KEY).stdout)[0]


def listed(op: Operator) -> list[dict[str, Any]]:
    return json.loads(op.llorch("worker", "list", "-p", "one", "--json").stdout)


def test_a_port_that_is_taken(op: Operator, machine: Machine, house: Orchestrator) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        command = ["worker", "spawn", "demo", "-p", "one", "--orchestrator", house.url, "--port", port]
        failed = op.llorch(*command, environ=KEY, check=1)
    assert "the port is in use" in failed.stderr, failed.stderr
    assert "next:" in failed.stderr and listed(op) == []
    wait_for(lambda: not busy(machine), 10)


def test_a_worker_that_hangs_is_killed_and_its_engine_with_it(
    op: Operator, machine: Machine, house: Orchestrator
) -> None:
    worker = spawn(op, house)
    os.kill(worker["pid"], signal.SIGSTOP)
    assert listed(op)[0]["state"] == "unresponsive"
    stopped = json.loads(op.llorch("worker", "stop", worker["worker_id"], "-p", "one", "--grace", "1", "--json").stdout)
    assert stopped[0]["how"] == "killed"
    wait_for(lambda: not busy(machine), 5, "its engine lives on")
    assert listed(op) == []


def test_ctrl_c_while_a_worker_drains_leaves_only_the_worker(
    op: Operator, machine: Machine, house: Orchestrator
) -> None:
    worker = spawn(op, house)
    task = house.submit(max_tokens=900, ignore_eos=True)
    wait_for(lambda: house.task(task)["status"] == "running", 20)
    process = op.start("worker", "stop", worker["worker_id"], "-p", "one", "--grace", "60")
    wait_for(lambda: listed(op)[0]["state"] == "stopping", 10)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: not [line for line in busy(machine) if "rpc" in line], WITHIN_S, "the remote command lives on")
    assert process.wait(10) == 130
    process.communicate()
    assert listed(op)[0]["state"] == "stopping"
    op.llorch("worker", "stop", worker["worker_id"], "-p", "one", "--grace", "0")
    assert listed(op) == []
    house.call("POST", f"/v2/tasks/{task}/cancel")


def install(name: str, wheels: Path) -> list[str]:
    return ["pool", "bootstrap", name, "-y", "--extras", "none", "--wheels", str(wheels)]


def test_ctrl_c_during_a_bootstrap(
    op: Operator, new_machine: NewMachine, ground: Path, wheels: Path, snapshot: dict[str, str]
) -> None:
    folder = ground / "tmp-left"
    folder.mkdir()
    path = bare_path(ground / "bin-left", python3=sys.executable)
    left = add_bare(op, new_machine, "left", {"PATH": path, "TMPDIR": str(folder)})
    process = op.start(*install("left", wheels), environ=snapshot)
    wait_for(lambda: any("pip" in line for line in busy(left)), 60, "pip did not start")
    assert interrupt(process, [left]) < WITHIN_S
    wait_for(lambda: not list(folder.iterdir()), 5, "what was unpacked stays")
    op.llorch(*install("left", wheels), timeout=300, environ=snapshot)
    assert json.loads(op.llorch("pool", "devices", "-p", "left", "--json").stdout)[0]["device"] == "cpu"


def test_two_bootstraps_of_one_machine(
    op: Operator, new_machine: NewMachine, ground: Path, wheels: Path, snapshot: dict[str, str]
) -> None:
    both = add_bare(op, new_machine, "both", {"PATH": bare_path(ground / "bin-both", python3=sys.executable)})
    processes = [op.start(*install("both", wheels), environ=snapshot) for _ in range(2)]
    outcomes = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outcomes
    said = b"".join(stderr for _, stderr in outcomes)
    assert b"another bootstrap works on this machine" in said and b"the same version is installed already" in said
    assert json.loads(op.llorch("pool", "devices", "-p", "both", "--json").stdout)[0]["device"] == "cpu"
    assert len(list((both.home / ".local/share/llorch/pool/venvs").iterdir())) == 1


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """`folder` on a file system of that size."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True, timeout=10)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)


@pytest.mark.skipif(os.geteuid() != 0, reason="making a small disk needs root")
def test_a_disk_that_fills_up_during_a_bootstrap(
    op: Operator, new_machine: NewMachine, ground: Path, wheels: Path, snapshot: dict[str, str]
) -> None:
    path = bare_path(ground / "bin-full", python3=sys.executable)
    full = add_bare(op, new_machine, "full", {"PATH": path, "XDG_DATA_HOME": str(ground / "small")})
    with small_disk(ground / "small", "12m"):
        failed = op.llorch(*install("full", wheels), timeout=300, environ=snapshot, check=1)
        assert "No space left on device" in failed.stderr and "Traceback" not in failed.stderr, failed.stderr
        assert "free space there" in failed.stderr.splitlines()[-1], failed.stderr
        assert not list((ground / "small/llorch/pool/venvs").iterdir()), "half an installation stays"
    wait_for(lambda: not busy(full), 10)


def test_ctrl_c_at_the_question_adds_nothing(op: Operator, new_machine: NewMachine) -> None:
    asked = new_machine("asked")
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "llorch", "pool", "add", "asked", asked.address],
        stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=op.environ, cwd=op.folder,
    )  # fmt: skip
    assert process.stderr is not None
    said = b""
    while b"[y/N]" not in said:
        data = os.read(process.stderr.fileno(), 4096)
        assert data, said
        said += data
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    process.communicate()
    os.close(leader)
    os.close(follower)
    assert "asked" not in op.llorch("pool", "list", "-o", "name").stdout.split()


def test_a_jump_host_and_a_name_of_the_ssh_config(op: Operator, new_machine: NewMachine) -> None:
    gate, behind = new_machine("gate"), new_machine("behind")
    known = op.folder / "gate_hosts"
    known.write_text(f"[{gate.host}]:{gate.port} {(gate.folder / 'host_key.pub').read_text()}")
    with (op.folder / "ssh_config").open("a") as config:
        config.write(f"Host gate\n  HostName {gate.host}\n  Port {gate.port}\n  UserKnownHostsFile {known}\n")
        config.write(f"Host behind\n  HostName {behind.host}\n  Port {behind.port}\n  ProxyJump {gate.user}@gate\n")
    op.llorch("pool", "add", "behind", f"{behind.user}@behind", "-y")
    assert op.llorch("worker", "list", "-p", "behind", "--json").stdout.strip() == "[]"
    gate.stop()
    op.close()
    cut = op.llorch("worker", "list", "-p", "behind", check=5)
    assert "next:" in cut.stderr and "Traceback" not in cut.stderr


def test_a_key_that_only_the_agent_has(op: Operator, new_machine: NewMachine, ground: Path) -> None:
    guarded = new_machine("guarded")
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(ground / "agent")], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: (ground / "agent").exists())
        environ = {"SSH_AUTH_SOCK": str(ground / "agent")}
        subprocess.run(["ssh-add", "-q", str(op.key)], env={**os.environ, **environ}, check=True, timeout=10)
        with operator(ground / "op2") as other:
            (other.folder / "ssh_config").write_text("IdentityFile none\n")
            other.llorch("pool", "add", "guarded", guarded.address, "-y", check=4)
            other.llorch("pool", "add", "--replace", "guarded", guarded.address, "-y", environ=environ)
            assert other.llorch("worker", "list", "-p", "guarded", "--json").stdout.strip() == "[]"
    finally:
        agent.terminate()
        agent.wait(5)
