"""`worker stop` and `worker logs` of a name alone, over several pools: real llorch-pools behind a stand-in for ssh."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llorch.fleet.pools import Pool, Pools
from llorch_pool.paths import Paths
from llorch_pool.registry import Registry, WorkerRecord

# The host is a folder: llorch-pool runs with it as its home. One named "away..." does not answer.
SSH = """#!/bin/sh
while [ "$1" != "--" ]; do shift; done
case "$2" in away*) echo "ssh: connect to host $2 port 22: Connection refused" >&2; exit 255;; esac
export HOME="$POOL_HOMES/$2" XDG_STATE_HOME= XDG_DATA_HOME= XDG_CONFIG_HOME=
exec /bin/sh -c "$3"
"""


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Registry]]:
    """Makes pools with these names; gives each one's registry."""
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(SSH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("POOL_HOMES", str(tmp_path / "homes"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    command = str(Path(sys.executable).with_name("llorch-pool"))

    def make(*names: str) -> dict[str, Registry]:
        known = Pools.open()
        found: dict[str, Registry] = {}
        for name in names:
            home = tmp_path / "homes" / name
            home.mkdir(parents=True)
            known.put(Pool(name=name, host=name, command=command))
            found[name] = Registry(Paths.from_environ({"HOME": str(home)}).workers)
            found[name].save(WorkerRecord(worker_id=f"of-{name}", model="m"))
        return found

    return make


def llorch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command in a process: plumbum looks for ssh where PATH led when it was loaded."""
    return subprocess.run([sys.executable, "-m", "llorch", *arguments], capture_output=True, text=True, timeout=60)


def test_the_log_of_a_worker_that_ended_is_found(fleet: Callable[..., dict[str, Registry]]) -> None:
    pools = fleet("m0", "m1", "away")
    pools["m1"].file("ended", "log").write_text("one\nlast words\n")
    done = llorch("worker", "logs", "ended", "-n", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "last words\n"
    pools["m0"].file("ended", "log").write_text("of another life\n")
    done = llorch("worker", "logs", "ended")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "of another life\none\nlast words\n" and done.stderr == "on m0:\non m1:\n"


def test_one_that_is_listed_is_asked_of_its_pool_alone(fleet: Callable[..., dict[str, Registry]]) -> None:
    pools = fleet("m0", "m1")
    for registry in pools.values():
        registry.file("of-m0", "log").write_text(f"{registry.folder}\n")
    done = llorch("worker", "logs", "of-m0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{pools['m0'].folder}\n"


@pytest.mark.parametrize("verb", ["stop", "logs"])
def test_a_name_that_nobody_has(fleet: Callable[..., dict[str, Registry]], verb: str) -> None:
    fleet("m0", "m1")
    done = llorch("worker", verb, "wu")
    assert done.returncode == 2, done.stderr
    assert "no pool has wu\nnext:  llorch worker list --all" in done.stderr


@pytest.mark.parametrize("verb", ["stop", "logs"])
def test_a_silent_pool_may_have_it(fleet: Callable[..., dict[str, Registry]], verb: str) -> None:
    fleet("m0", "away")
    done = llorch("worker", verb, "wu")
    assert done.returncode == 3, done.stderr
    assert "error: away (away): nothing listens there (connection refused)" in done.stderr
    assert "no pool that answered has wu; away could not be asked\nnext:  llorch pool doctor -p away" in done.stderr


@pytest.mark.parametrize("verb", ["stop", "logs"])
def test_when_every_pool_is_silent_that_is_what_is_said(fleet: Callable[..., dict[str, Registry]], verb: str) -> None:
    fleet("away1", "away2")
    done = llorch("worker", verb, "wu")
    assert done.returncode == 5, done.stderr
    assert (
        "error: away1 (away1): nothing listens there" in done.stderr
        and "2 of 2 pools failed: away1, away2" in done.stderr
    )


def test_a_worker_whose_entry_is_damaged_is_said_to_the_operator(fleet: Callable[..., dict[str, Registry]]) -> None:
    fleet("m0", "m1")["m1"].file("w0", "json").write_text("{")
    done = llorch("worker", "list", "--all", "-o", "name")
    assert done.returncode == 0, done.stderr
    assert "warning: not shown: the entry of worker w0 can't be read" in done.stderr
