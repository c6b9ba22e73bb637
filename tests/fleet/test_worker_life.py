"""A worker's life over ssh: spawned, used, left alone, stopped, killed, cleaned up; with the real engine."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.conftest import NewMachine
from tests.support.fleet import WORKER_KEY, Orchestrator
from tests.support.sshd import Machine, Operator, wait_for

pytestmark = pytest.mark.e2e


def spawn(op: Operator, house: Orchestrator, *options: str, pool: str = "one", model: str = "demo") -> dict[str, Any]:
    done = op.llorch(
        "worker", "spawn", model, "-p", pool, "--orchestrator", house.url, "--json", *options,
        environ={"LLORCH_WORKER_KEY": WORKER_KEY},
    )  # fmt: skip
    return json.loads(done.stdout)[0]


def listed(op: Operator, pool: str = "one") -> dict[str, dict[str, Any]]:
    found = json.loads(op.llorch("worker", "list", "-p", pool, "--json").stdout)
    return {worker["worker_id"]: worker for worker in found}


def http(op: Operator, house: Orchestrator) -> dict[str, str]:
    return {"LLORCH_URL": house.url, "LLORCH_API_KEY": house.headers["Authorization"].removeprefix("Bearer ")}


@pytest.fixture(autouse=True)
def nothing_left(op: Operator, machine: Machine) -> Any:
    yield
    op.llorch("worker", "stop-all", "-p", "one", "--grace", "0")
    op.llorch("worker", "cleanup", "-p", "one")
    wait_for(lambda: not [line for _, line in machine.processes() if "worker" in line], 10)


def test_a_worker_serves_outlives_the_session_and_is_drained(
    op: Operator, machine: Machine, house: Orchestrator
) -> None:
    worker = spawn(op, house, "--slots", "2")
    worker_id = worker["worker_id"]
    assert worker["state"] == "ready" and worker["slots_total"] == 2 and worker["pool"] == "one"
    assert house.state(worker_id) == "ready" and house.workers()[worker_id]["pool"] == "one"
    op.close()  # every connection to the machine ends
    done = house.finish(house.submit())
    assert done["status"] == "completed" and done["worker_id"] == worker_id
    assert listed(op)[worker_id]["state"] == "ready"
    running = house.submit(max_tokens=60, ignore_eos=True)
    wait_for(lambda: house.task(running)["status"] == "running", 20)
    stopped = json.loads(op.llorch("worker", "stop", worker_id, "-p", "one", "--json").stdout)[0]
    assert stopped["how"] == "drained"
    assert house.finish(running)["status"] == "completed"
    assert listed(op) == {} and not [line for _, line in machine.processes() if "worker" in line]


def test_one_that_is_stopped_without_a_grace_is_not_taken_for_lost(
    op: Operator, machine: Machine, house: Orchestrator
) -> None:
    worker_id = spawn(op, house)["worker_id"]
    stopped = json.loads(op.llorch("worker", "stop", worker_id, "-p", "one", "--grace", "0", "--json").stdout)[0]
    assert stopped["how"] == "terminated"
    assert house.state(worker_id) == "" and listed(op) == {}


def test_the_key_is_on_no_command_line_and_in_no_open_file(op: Operator, machine: Machine, house: Orchestrator) -> None:
    worker = spawn(op, house)
    assert not [line for _, line in machine.processes() if WORKER_KEY in line]
    for path in machine.home.rglob("*"):
        if path.is_file() and path.stat().st_size < 1 << 20 and WORKER_KEY.encode() in path.read_bytes():
            assert path.name == f"{worker['worker_id']}.env" and path.stat().st_mode & 0o077 == 0
    shown = op.llorch("worker", "list", "-p", "one", "--json").stdout + Path(worker["log"]).read_text()
    assert WORKER_KEY not in shown


def test_kill_9_of_the_supervisor_leaves_no_engine_and_is_told_truly(
    op: Operator, machine: Machine, house: Orchestrator
) -> None:
    worker = spawn(op, house)
    os.kill(worker["pid"], signal.SIGKILL)
    wait_for(lambda: not [line for _, line in machine.processes() if "worker" in line], 5, "engine still there")
    assert listed(op)[worker["worker_id"]]["state"] == "exited"
    wait_for(lambda: house.state(worker["worker_id"]) == "lost", 20)
    agreed = op.llorch("doctor", "-p", "one", "--fix", environ=http(op, house), check=None)
    assert worker["worker_id"] in agreed.stdout, agreed.stderr
    assert listed(op) == {}
    op.llorch("doctor", "-p", "one", "--fix", environ=http(op, house), check=None)
    assert house.state(worker["worker_id"]) == ""


def test_a_worker_that_can_not_start_shows_its_log_and_leaves_nothing(
    op: Operator, machine: Machine, house: Orchestrator
) -> None:
    for options, words in (
        (["--host", "203.0.113.7"], "address to bind is not one of this machine"),
        (["--device", "cuda:3"], "no device 'cuda:3'"),
    ):
        failed = op.llorch(
            "worker", "spawn", "demo", "-p", "one", "--orchestrator", house.url, *options,
            environ={"LLORCH_WORKER_KEY": WORKER_KEY}, check=None,
        )  # fmt: skip
        assert failed.returncode in (1, 2) and words in failed.stderr, failed.stderr
        assert listed(op) == {}


def test_an_orchestrator_that_refuses_the_key_is_said(op: Operator, machine: Machine, house: Orchestrator) -> None:
    failed = op.llorch(
        "worker", "spawn", "demo", "-p", "one", "--orchestrator", house.url,
        environ={"LLORCH_WORKER_KEY": "another-key-altogether"}, check=1,
    )  # fmt: skip
    assert "refuses the worker key" in failed.stderr
    assert listed(op) == {} and not [line for _, line in machine.processes() if "worker" in line]


def test_too_little_memory_is_refused_with_figures(op: Operator, machine: Machine, house: Orchestrator) -> None:
    refused = op.llorch(
        "worker", "spawn", "demo", "-p", "one", "--orchestrator", house.url, "--slots", "65536",
        environ={"LLORCH_WORKER_KEY": WORKER_KEY}, check=1,
    )  # fmt: skip
    assert "GiB" in refused.stderr and "weights" in refused.stderr and "usable" in refused.stderr


def test_an_idle_worker_ends_by_itself(op: Operator, machine: Machine, house: Orchestrator) -> None:
    worker = spawn(op, house, "--idle-timeout", "1")
    wait_for(lambda: listed(op)[worker["worker_id"]]["state"] == "exited", 30)
    wait_for(lambda: house.state(worker["worker_id"]) in ("", "lost"), 10)


def test_two_operators_at_once(op: Operator, machine: Machine, house: Orchestrator) -> None:
    command = ["worker", "spawn", "demo", "-p", "one", "--orchestrator", house.url, "--id", "twin"]
    both = [op.start(*command, environ={"LLORCH_WORKER_KEY": WORKER_KEY}) for _ in range(2)]
    outcomes = [process.communicate(timeout=120) for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes == [0, 2], outcomes
    assert [worker["state"] for worker in listed(op).values()] == ["ready"]


def test_a_worker_that_was_spawned_with_on_boot_comes_back(op: Operator, machine: Machine, house: Orchestrator) -> None:
    """A reboot, as far as a process can see it: everything is dead and the kernel's boot id is another one."""
    worker = spawn(op, house, "--on-boot")
    entry = Path(worker["log"]).with_suffix(".json")
    machine.kill_everything()
    record = json.loads(entry.read_text())
    entry.write_text(json.dumps({**record, "boot_id": "an-earlier-boot"}))
    assert listed(op)[worker["worker_id"]]["state"] == "rebooted"
    op.llorch("worker", "restore", "-p", "one")
    assert listed(op)[worker["worker_id"]]["state"] == "ready"
    wait_for(lambda: house.state(worker["worker_id"]) == "ready", 20)
    assert house.finish(house.submit())["status"] == "completed"


def test_logs_are_shown_also_after_the_end(op: Operator, machine: Machine, house: Orchestrator) -> None:
    worker = spawn(op, house)
    op.llorch("worker", "stop", worker["worker_id"], "-p", "one", "--grace", "0")
    assert "engine ready" in op.llorch("worker", "logs", worker["worker_id"], "-p", "one", "-n", "50").stdout


def test_dry_run_starts_nothing(op: Operator, machine: Machine, house: Orchestrator) -> None:
    assert spawn(op, house, "--dry-run")["state"] == "planned"
    assert listed(op) == {}


def test_a_worker_is_found_on_its_pool_without_naming_it(
    op: Operator, machine: Machine, house: Orchestrator, new_machine: NewMachine
) -> None:
    op.add("two", new_machine("m2"))
    worker = spawn(op, house)
    stopped = op.llorch("worker", "stop", worker["worker_id"], "--grace", "0", "-o", "tsv").stdout.split("\t")
    assert stopped[:2] == ["one", worker["worker_id"]]
    missing = op.llorch("worker", "stop", "nobody-has-it", check=2)
    assert "no pool has nobody-has-it" in missing.stderr
    op.llorch("pool", "remove", "two", "-y")
