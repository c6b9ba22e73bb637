"""`--on-boot` where systemd's user manager runs: the unit brings a worker back at boot, without anybody's command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet import booted
from tests.fleet.booted import BootedMachine
from tests.support.fleet import WORKER_KEY, Orchestrator, orchestrator
from tests.support.namespaces import GATEWAY, SUBNET, Network
from tests.support.sshd import Operator, wait_for

pytestmark = pytest.mark.e2e
KEY = {"LLORCH_WORKER_KEY": WORKER_KEY}


@pytest.fixture(scope="module", autouse=True)
def user_manager() -> None:
    if reason := booted.missing_tools():
        pytest.skip(reason)  # a real systemd user manager is started here, and containers may not let it


@pytest.fixture(scope="module")
def house(ground: Path, net: Network) -> Iterator[Orchestrator]:
    with orchestrator(ground / "o", GATEWAY) as running:
        yield running


def boot(net: Network, name: str, *, lingers: bool) -> BootedMachine:
    host = f"{SUBNET}.{11 + len(net.machines)}"
    made = BootedMachine(net.folder / name, host, 22, net.authorized_key, name=name, lingers=lingers)
    net.machines[name] = made
    made.plug_in()
    return made


def spawn(op: Operator, pool: str) -> tuple[dict[str, Any], str]:
    done = op.llorch("worker", "spawn", "demo", "-p", pool, "--on-boot", "--json", environ=KEY, timeout=300)
    return json.loads(done.stdout)[0], done.stderr


def test_the_unit_brings_a_worker_back_at_boot(op: Operator, net: Network, house: Orchestrator) -> None:
    machine = boot(net, "boots", lingers=True)
    op.add("boots", machine, "--orchestrator", house.url)
    worker, said = spawn(op, "boots")
    assert "will not come back" not in said
    assert f"llorch-worker-{worker['worker_id']}.scope" in machine.user_manager("list-units", "--type=scope", "--plain")
    assert "enabled" in machine.user_manager("is-enabled", "llorch-pool-restore.service")
    machine.power_off()
    wait_for(lambda: house.state(worker["worker_id"]) == "lost", 30)
    machine.power_on()
    wait_for(lambda: house.state(worker["worker_id"]) == "ready", 60, machine.user_manager("status", "--no-pager"))
    listed = json.loads(op.llorch("worker", "list", "-p", "boots", "--json").stdout)
    assert [(row["worker_id"], row["state"]) for row in listed] == [(worker["worker_id"], "ready")]
    assert listed[0]["pid"] != worker["pid"]
    assert house.finish(house.submit())["status"] == "completed"
    machine.user_manager("stop", "llorch-pool-restore.service")
    assert json.loads(op.llorch("worker", "list", "-p", "boots", "--json").stdout)[0]["state"] == "ready"
    op.llorch("worker", "stop-all", "-p", "boots", "--grace", "0")


def test_without_lingering_it_says_what_an_administrator_does(op: Operator, net: Network, house: Orchestrator) -> None:
    machine = boot(net, "plain", lingers=False)
    op.add("plain", machine, "--orchestrator", house.url)
    worker, said = spawn(op, "plain")
    assert worker["state"] == "ready"
    assert "will not come back by itself" in said and f"loginctl enable-linger {machine.user}" in said
    op.llorch("worker", "stop-all", "-p", "plain", "--grace", "0")
