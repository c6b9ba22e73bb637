"""A fleet of three machines with real ssh, networks that can be cut, and power that can fail. Needs root."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fleet import WORKER_KEY, Orchestrator, orchestrator
from tests.support.hub import Hub
from tests.support.namespaces import GATEWAY, NamespaceMachine, Network
from tests.support.sshd import Operator, wait_for

pytestmark = pytest.mark.e2e
KEY = {"LLORCH_WORKER_KEY": WORKER_KEY}


@pytest.fixture(scope="module")
def house(ground: Path, net: Network) -> Iterator[Orchestrator]:
    with orchestrator(ground / "o", GATEWAY) as running:
        yield running


@pytest.fixture(scope="module")
def fleet(net: Network, op: Operator, house: Orchestrator) -> dict[str, NamespaceMachine]:
    """Three machines that have been added, each knowing the orchestrator's address."""
    machines = {name: net.machine(name) for name in ("gpu1", "gpu2", "gpu3")}
    for name, made in machines.items():
        op.add(name, made, "--orchestrator", house.url)
    return machines


def rows(op: Operator, *arguments: str, **options: Any) -> list[dict[str, Any]]:
    return json.loads(op.llorch(*arguments, "--json", **options).stdout)


def test_a_fleet_from_download_to_the_last_stop(
    op: Operator, fleet: dict[str, NamespaceMachine], house: Orchestrator, ground: Path
) -> None:
    """Download with a cut and a resume, spawn, prompt, one machine cut off, healed, all stopped, nothing left."""
    import llorch_demo

    repository = ground / "hub" / "acme" / "demo"
    shutil.copytree(llorch_demo.MODEL_DIR, repository)
    with Hub(ground / "hub", GATEWAY) as hub:
        hub.faults.cut_after, hub.faults.cuts = 1_000_000, 3
        downloaded = rows(op, "model", "download", "hf:acme/demo", "--all", environ={"HF_ENDPOINT": hub.url})
        assert {row["pool"] for row in downloaded} == set(fleet)
        assert len({row["digest"] for row in downloaded}) == 1
        assert any(request.range and request.if_range for request in hub.requests)
    op.llorch("model", "verify", "demo", "--all")

    spawned = rows(op, "worker", "spawn", "demo", "--all", environ=KEY, timeout=300)
    by_pool = {row["pool"]: row["worker_id"] for row in spawned}
    assert {row["state"] for row in spawned} == {"ready"} and set(by_pool) == set(fleet)
    assert all(row["url"].startswith(f"http://{fleet[row['pool']].host}:") for row in spawned)
    assert {worker["state"] for worker in house.workers().values()} == {"ready"}
    prompt = op.llorch("run", "--url", house.url, "Once upon a time", environ={"LLORCH_API_KEY": key_of(house)})
    assert prompt.stdout.strip()

    task = house.submit(max_tokens=400, ignore_eos=True)
    wait_for(lambda: house.task(task)["status"] == "running", 30)
    alone = house.task(task)["worker_id"]
    pool = next(name for name, worker_id in by_pool.items() if worker_id == alone)
    fleet[pool].cut()
    try:
        wait_for(lambda: house.task(task)["worker_id"] not in (alone, None), 30, "the task did not move")
        partly = op.llorch("worker", "list", "--all", "--json", check=3, timeout=90)
        assert {row["pool"] for row in json.loads(partly.stdout)} == set(fleet) - {pool}
        assert house.finish(task, 120)["status"] == "completed" and house.task(task)["attempt"] > 1
    finally:
        fleet[pool].heal()
    wait_for(lambda: house.state(alone) == "ready", 60, "the healed machine's worker did not come back")
    agreed = op.llorch("doctor", environ={"LLORCH_URL": house.url, "LLORCH_API_KEY": key_of(house)}, check=None)
    assert agreed.returncode == 0, agreed.stdout

    stopped = rows(op, "worker", "stop-all", "--all", "--grace", "20", timeout=120)
    assert {row["worker_id"] for row in stopped} == set(by_pool.values())
    wait_for(lambda: not any(machine.processes() for machine in fleet.values()), 10, "a process is left")
    wait_for(lambda: not house.workers(), 10)


def key_of(house: Orchestrator) -> str:
    return house.headers["Authorization"].removeprefix("Bearer ")


def test_a_rebooted_machine_brings_its_worker_back(
    op: Operator, fleet: dict[str, NamespaceMachine], house: Orchestrator
) -> None:
    spawned = rows(op, "worker", "spawn", "demo", "-p", "gpu1", "-p", "gpu2", "--on-boot", environ=KEY, timeout=300)
    worker_id = next(row["worker_id"] for row in spawned if row["pool"] == "gpu1")
    fleet["gpu1"].power_off()
    wait_for(lambda: house.state(worker_id) == "lost", 30)
    fleet["gpu1"].power_on()
    assert rows(op, "worker", "list", "-p", "gpu1")[0]["state"] == "rebooted"
    # What the systemd unit does at boot where there is a user manager: these machines have none, and say so.
    assert [row["worker_id"] for row in rows(op, "worker", "restore", "-p", "gpu1", timeout=300)] == [worker_id]
    wait_for(lambda: house.state(worker_id) == "ready", 30)
    assert house.finish(house.submit())["status"] == "completed"
    op.llorch("worker", "stop-all", "--all", "--grace", "5", timeout=120)


def test_a_command_that_is_cut_off_ends_on_the_far_side_too(
    op: Operator, fleet: dict[str, NamespaceMachine], ground: Path
) -> None:
    """Nobody tells a machine that its network is gone: the silence of the lifeline does."""
    repository = ground / "hub2" / "acme" / "slow"
    shutil.copytree(ground / "hub" / "acme" / "demo", repository)
    machine = fleet["gpu2"]
    with Hub(ground / "hub2", GATEWAY) as hub:
        hub.faults.cut_after, hub.faults.hold = 1_000_000, True
        process = op.start("model", "download", "hf:acme/slow", "-p", "gpu2", environ={"HF_ENDPOINT": hub.url})
        wait_for(lambda: any(machine.models.glob(".partial/slow/*.part")), 30)
        machine.cut()
        try:
            wait_for(lambda: not [line for _, line in machine.processes() if "rpc" in line], 60, "it lives on")
            assert process.wait(90) == 5
        finally:
            machine.heal()
            process.kill()
            process.communicate(timeout=10)


def test_a_bare_machine_is_bootstrapped_and_gets_the_key(
    op: Operator,
    net: Network,
    house: Orchestrator,
    fleet: dict[str, NamespaceMachine],
    snapshot: dict[str, str],
) -> None:
    """A machine with nothing but ssh and a Python: no index is reachable, so everything is carried over."""
    bare = net.machine("bare", environ={"PATH": "/usr/local/bin:/usr/bin:/bin", "PIP_NO_INDEX": "1"})
    op.llorch("pool", "add", "bare", bare.address, "-y", "--orchestrator", house.url)
    planned = op.llorch("pool", "bootstrap", "bare", "--dry-run", "--source", "carry", "--extras", "none")
    assert "carried over from here" in planned.stderr and not (bare.home / ".local").exists()
    install = ("pool", "bootstrap", "bare", "-y", "--source", "carry", "--extras", "none")
    op.llorch(*install, timeout=300, environ=snapshot)
    known = next(row for row in rows(op, "pool", "list") if row["name"] == "bare")
    assert known["command"] == str(bare.home / ".local/share/llorch/pool/current/bin/llorch-pool")
    doctor = op.llorch("pool", "doctor", "-p", "bare", check=1)
    assert "torch" in doctor.stdout and "not installed" in doctor.stdout
    # torch is the one thing that is too large to carry in a test: lend it what this machine has.
    venv = (bare.home / ".local/share/llorch/pool/current").resolve()
    site = next(venv.glob("lib/python3*/site-packages"))
    import torch

    (site / "lent.pth").write_text(f"{Path(torch.__file__).resolve().parents[1]}\n")
    spawned = rows(op, "worker", "spawn", "demo", "-p", "bare", environ=KEY, timeout=300)[0]
    assert spawned["state"] == "ready" and house.state(spawned["worker_id"]) == "ready"
    command = next(line for _, line in bare.processes() if "-m worker " in line)
    assert str(bare.home) in command and WORKER_KEY not in command
    assert house.finish(house.submit(placement={"mode": "pin", "pin_pool": "bare"}))["status"] == "completed"
    again = op.llorch(*install, timeout=300, environ=snapshot)
    assert "installed already" in again.stderr
    op.llorch("worker", "stop-all", "-p", "bare", "--grace", "5")
    wait_for(lambda: not bare.processes(), 10)


def test_a_model_goes_from_pool_to_pool(op: Operator, fleet: dict[str, NamespaceMachine]) -> None:
    import llorch_demo

    op.llorch("model", "download", f"file:{llorch_demo.MODEL_DIR}", "--name", "tale", "-p", "gpu1")
    copied = rows(op, "model", "copy", "tale", "--from", "gpu1", "--to", "gpu2", "--to", "gpu3")
    digest = rows(op, "model", "show", "tale", "-p", "gpu1")[0]["digest"]
    assert {(row["pool"], row["digest"]) for row in copied} == {("gpu2", digest), ("gpu3", digest)}
    op.llorch("model", "verify", "tale", "-p", "gpu2", "-p", "gpu3")
    missing = op.llorch("model", "copy", "nothing", "--from", "gpu1", "--to", "gpu2", check=2)
    assert "no model 'nothing'" in missing.stderr


def test_a_copy_goes_on_where_it_was_cut(op: Operator, fleet: dict[str, NamespaceMachine]) -> None:
    whole = fleet["gpu1"].models / "tale" / "model.safetensors"
    shutil.rmtree(fleet["gpu2"].models / "tale")
    partial = fleet["gpu2"].models / ".partial"
    info = json.loads((fleet["gpu1"].models / "tale" / "model.json").read_text())
    (partial / "tale").mkdir()
    (partial / "tale.source").write_text(info["digest"])
    (partial / "tale" / "model.safetensors.part").write_bytes(whole.read_bytes()[:1_000_000])
    op.llorch("model", "copy", "tale", "--from", "gpu1", "--to", "gpu2")
    op.llorch("model", "verify", "tale", "-p", "gpu2")
