"""Loopback machines with real sshd, shared by a module; an operator; an orchestrator with real workers."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from llorch.fleet import carry
from tests.support import namespaces
from tests.support.fleet import Orchestrator, orchestrator
from tests.support.hub import Hub
from tests.support.namespaces import Network, network
from tests.support.sshd import Machine, Operator, free_port, missing_tools, operator
from tests.unit.llorch_pool.conftest import write_model

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ground(missing_service: Callable[[str], NoReturn]) -> Iterator[Path]:
    """A short folder: control sockets and Redis' socket must fit into 107 bytes."""
    if reason := missing_tools():
        missing_service(reason)
    folder = Path(tempfile.mkdtemp(prefix="ll", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def op(ground: Path) -> Iterator[Operator]:
    with operator(ground / "op") as found:
        yield found


@pytest.fixture(scope="module")
def net(ground: Path, op: Operator, missing_service: Callable[[str], NoReturn]) -> Iterator[Network]:
    """A network of namespace machines; the operator sits at its gateway."""
    if reason := namespaces.missing_tools():
        missing_service(reason)
    with network(ground, op.key) as made:
        yield made


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment with a copy of the packages: a checkout that is being edited would be another version each time."""
    copy = tmp_path_factory.mktemp("snapshot")
    for package in carry.PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    return {"PYTHONPATH": str(copy)}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that llorch-pool needs but torch, for the Python that runs here."""
    folder = tmp_path_factory.mktemp("wheels")
    wheel = carry.pack(folder)
    platforms = [f"manylinux_2_{number}_{platform.machine()}" for number in (28, 17)]
    platforms += [f"manylinux2014_{platform.machine()}", f"linux_{platform.machine()}"]
    version = platform.python_version()
    carry.download(wheel, folder, extras="", python_version=version, platforms=platforms, torch_index="")
    wheel.unlink()
    return folder


NewMachine = Callable[..., Machine]


@pytest.fixture(scope="module")
def new_machine(ground: Path, op: Operator) -> Iterator[NewMachine]:
    """Makes loopback machines; ends them and whatever they run."""
    made: list[Machine] = []

    def make(name: str, **options: Any) -> Machine:
        machine = Machine(ground / name, "127.0.0.1", free_port(), op.key, **options)
        made.append(machine)
        return machine.start()

    yield make
    for machine in made:
        machine.stop()
        machine.kill_everything()


@pytest.fixture(scope="module")
def machine(new_machine: NewMachine, op: Operator) -> Machine:
    """One machine, known as pool `one`."""
    made = new_machine("m1")
    op.add("one", made)
    return made


@pytest.fixture(scope="module")
def house(ground: Path) -> Iterator[Orchestrator]:
    with orchestrator(ground / "o") as running:
        yield running


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    write_model(tmp_path / "hub" / "acme" / "tiny")
    with Hub(tmp_path / "hub") as server:
        yield server
