"""Thirty-two machines at once: a listing stays quick, and one sshd with stock limits doesn't drop connections."""

from __future__ import annotations

import json
import time

import pytest

from tests.fleet.conftest import NewMachine
from tests.support.sshd import Operator, wait_for

pytestmark = pytest.mark.e2e
HOSTS = 32


def test_a_listing_over_32_hosts(op: Operator, new_machine: NewMachine) -> None:
    machines = [new_machine(f"h{number:02}") for number in range(HOSTS)]
    starting = [op.start("pool", "add", f"h{number:02}", made.address, "-y") for number, made in enumerate(machines)]
    for process in starting:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    began = time.monotonic()
    listed = op.llorch("worker", "list", "--all", "--json")
    warm = time.monotonic() - began
    assert json.loads(listed.stdout) == []
    devices = json.loads(op.llorch("pool", "devices", "--all", "--json").stdout)
    assert [row["pool"] for row in devices] == [f"h{number:02}" for number in range(HOSTS)]
    began = time.monotonic()
    op.llorch("worker", "list", "-p", "h00")
    one = time.monotonic() - began
    print(f"32 hosts, warm: {warm:.2f} s; one host, warm: {one:.3f} s")


def test_connections_that_sshd_drops_are_tried_again(op: Operator, new_machine: NewMachine) -> None:
    """Stock `MaxStartups 10:30:100` drops some of many parallel connections to one host."""
    busy = new_machine("busy", extra_config="")
    config = (busy.folder / "sshd_config").read_text()
    busy.stop()
    (busy.folder / "sshd_config").write_text(config.replace("MaxStartups 200", "MaxStartups 2:80:6"))
    op.close()
    busy.configure = lambda: None
    busy.start()
    for number in range(6):
        op.llorch("pool", "add", f"b{number}", busy.address, "-y")
    op.close()
    names = [word for number in range(6) for word in ("-p", f"b{number}")]
    wait_for(lambda: op.llorch("worker", "list", *names, check=None).returncode == 0, 60, "still dropped")
