"""Bootstrap of bare machines: where Python is too old, where an index is reachable, where things are missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.bare import add_bare, bare_path
from tests.fleet.conftest import NewMachine
from tests.fleet.index import Index, python_archive
from tests.support.sshd import Machine, Operator, wait_for

pytestmark = pytest.mark.e2e


def pythons(version: str) -> str:
    """A CPython of that version on this machine, "" where there is none."""
    places = [shutil.which(f"python{version}"), *Path(sys.base_prefix).parent.glob(f"{version}.*/bin/python{version}")]
    return next((str(path) for path in places if path and "shims" not in str(path)), "")


def rows(op: Operator, *arguments: str, **options: Any) -> list[dict[str, Any]]:
    return json.loads(op.llorch(*arguments, "--json", **options).stdout)


@pytest.fixture(scope="module")
def index(ground: Path, wheels: Path) -> Iterator[Index]:
    """Everything that llorch-pool needs without torch, and builds of a stand-in for torch."""
    folder = ground / "index"
    shutil.copytree(wheels, folder)
    for build in ("cpu", "cu126", "cu130"):
        info = "torch-2.11.0.dist-info"
        with zipfile.ZipFile(folder / f"torch-2.11.0+{build}-py3-none-any.whl", "w") as archive:
            archive.writestr("torch/__init__.py", f"__version__ = '2.11.0+{build}'\n")
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0+{build}\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
    with Index(folder) as server:
        yield server


@pytest.fixture(scope="module")
def mirror(ground: Path) -> Iterator[tuple[Index, str]]:
    """(a server that hands out a real CPython 3.12 as uv downloads it, its version)"""
    newer = pythons("3.12")
    if not newer:
        # What uv would download can't be made here; bootstraps with the machine's own Python are tested in any case.
        pytest.skip("there is no CPython 3.12 here to be handed out")
    folder = ground / "pythons"
    folder.mkdir()
    with Index(folder) as server:
        yield server, python_archive(newer, folder, server.url)


def old_machine(op: Operator, new_machine: NewMachine, ground: Path, name: str, **environ: str) -> Machine:
    """A machine whose Python is 3.10, or which has none."""
    older = pythons("3.10")
    path = bare_path(ground / f"bin-{name}", **({"python3": older} if older else {}))
    return add_bare(op, new_machine, name, {"PATH": path, **environ})


def test_uv_brings_a_python_where_it_is_too_old(
    op: Operator, new_machine: NewMachine, ground: Path, index: Index, mirror: tuple[Index, str]
) -> None:
    """The pool downloads Python from the mirror. (Its dependencies too, but the index lacks some for that Python.)"""
    server, _ = mirror
    downloads = f"{server.url}/files/downloads.json"
    old = old_machine(
        op, new_machine, ground, "old", UV_PYTHON_DOWNLOADS_JSON_URL=downloads, PIP_RETRIES="0",
        PIP_INDEX_URL=f"{index.url}/simple", PIP_CONFIG_FILE="/dev/null",
    )  # fmt: skip
    done = op.llorch("pool", "bootstrap", "old", "-y", "--extras", "none", timeout=300, check=1)
    assert "brought by uv" in done.stderr and "downloading" in done.stderr
    assert any(request.endswith("install_only.tar.gz") for request in server.requests)
    python = next((old.home / ".local/share/llorch/pool/python").glob("cpython-3.12.*/bin/python3.12"))
    assert subprocess.run([str(python), "-c", "import ssl, venv"], timeout=30).returncode == 0
    assert "pip failed on the pool" in done.stderr
    wait_for(lambda: not old.processes(), 10)


def test_a_python_is_carried_over_where_it_is_too_old_and_no_internet(
    op: Operator, new_machine: NewMachine, ground: Path, snapshot: dict[str, str], mirror: tuple[Index, str]
) -> None:
    server, version = mirror
    air = old_machine(op, new_machine, ground, "air", PIP_NO_INDEX="1", UV_PYTHON_INSTALL_MIRROR="http://127.0.0.1:9/")
    install = ("pool", "bootstrap", "air", "-y", "--source", "carry", "--extras", "none", "--json")
    environ = {**snapshot, "UV_PYTHON_DOWNLOADS_JSON_URL": f"{server.url}/files/downloads.json"}
    done = op.llorch(*install, timeout=300, environ=environ)
    assert "carried over" in done.stderr and json.loads(done.stdout)[0]["python"] == version
    current = (air.home / ".local/share/llorch/pool/current").resolve()
    package = current / "lib/python3.12/site-packages/llorch_pool"
    assert list(package.glob("__pycache__/rpc*.pyc")), "it would be compiled at each call"
    assert rows(op, "pool", "devices", "-p", "air")[0]["device"] == "cpu"
    planned = op.llorch("pool", "bootstrap", "air", "--dry-run", "--extras", "none")
    assert f"Python {version} at {air.home}" in planned.stderr, "it would be brought again"
    assert not list((air.home / ".local/share/llorch/pool/python").glob(".new*"))
    wait_for(lambda: not air.processes(), 10)


def test_a_python_that_can_not_be_brought_is_said_and_nothing_stays(
    op: Operator, new_machine: NewMachine, ground: Path
) -> None:
    (ground / "none-tmp").mkdir()
    none = old_machine(
        op, new_machine, ground, "none", TMPDIR=str(ground / "none-tmp"), UV_HTTP_RETRIES="0",
        UV_PYTHON_INSTALL_MIRROR="http://127.0.0.1:9/",
    )  # fmt: skip
    install = ("pool", "bootstrap", "none", "-y", "--extras", "none")
    done = op.llorch(*install, timeout=300, check=1)
    assert "there is no Python 3.11 or newer on the pool, and uv could not download one" in done.stderr
    assert "--source carry" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    unreachable = {"UV_PYTHON_INSTALL_MIRROR": "http://127.0.0.1:9/", "UV_HTTP_RETRIES": "0"}
    carried = op.llorch(*install, "--source", "carry", "--wheels", "", timeout=300, environ=unreachable, check=1)
    assert "uv could not download a Python to carry over" in carried.stderr
    wait_for(lambda: not none.processes(), 10)
    assert not list((ground / "none-tmp").iterdir()), "the folder that was unpacked is still there"
    assert not (none.home / ".local/share/llorch/pool/current").exists()


def gpu_machine(op: Operator, new_machine: NewMachine, ground: Path, name: str, driver: str, **environ: str) -> Machine:
    """A machine whose nvidia-smi says what the real one says when it is asked for its driver's version."""
    smi = ground / f"smi-{name}"
    smi.write_text(
        '#!/bin/sh\n[ "$*" = "--query-gpu=driver_version --format=csv,noheader" ] || exit 6\n'
        f"echo {driver}\necho {driver}\n"
    )
    smi.chmod(0o755)
    path = bare_path(ground / f"bin-{name}", python3=sys.executable, **{"nvidia-smi": str(smi)})
    return add_bare(op, new_machine, name, {"PATH": path, **environ})


@pytest.mark.parametrize(("driver", "build"), [("580.95.05", "cu130"), ("570.133.20", "cu126"), ("525.60.13", "cu126")])
def test_the_build_of_torch_follows_the_driver(
    op: Operator, new_machine: NewMachine, ground: Path, driver: str, build: str
) -> None:
    name = f"g{driver[:3]}"
    gpu_machine(op, new_machine, ground, name, driver)
    planned = op.llorch("pool", "bootstrap", name, "--dry-run", "--json")
    assert json.loads(planned.stdout)[0]["torch"] == build
    assert f"torch ({build}: driver {driver})" in planned.stderr and "3.0 GiB" in planned.stderr


def test_the_python_that_is_asked_for_is_looked_at_there(op: Operator, new_machine: NewMachine, ground: Path) -> None:
    add_bare(op, new_machine, "asked", {"PATH": bare_path(ground / "bin-asked", python3=sys.executable)})
    dry_run = ("pool", "bootstrap", "asked", "--dry-run", "--json", "--python")
    planned = op.llorch(*dry_run, sys.executable)
    assert json.loads(planned.stdout)[0]["python"] == ".".join(str(part) for part in sys.version_info[:3])
    refused = op.llorch(*dry_run, "/no/such/python", check=2)
    assert "asked: --python /no/such/python is not there" in refused.stderr


def test_a_driver_that_is_too_old_is_refused(op: Operator, new_machine: NewMachine, ground: Path) -> None:
    gpu_machine(op, new_machine, ground, "g470", "470.256.02")
    refused = op.llorch("pool", "bootstrap", "g470", "-y", check=1)
    assert "470.256.02 is too old" in refused.stderr and "--torch cpu" in refused.stderr


def test_a_pool_that_reaches_an_index_downloads_by_itself(
    op: Operator, new_machine: NewMachine, ground: Path, index: Index, snapshot: dict[str, str]
) -> None:
    environ = {"PIP_INDEX_URL": f"{index.url}/simple", "PIP_CONFIG_FILE": "/dev/null", "PIP_RETRIES": "0"}
    path = bare_path(ground / "bin-reach", python3=sys.executable)
    reach = add_bare(op, new_machine, "reach", {"PATH": path, **environ})
    done = op.llorch("pool", "bootstrap", "reach", "-y", "--extras", "none", timeout=300, environ=snapshot)
    assert "the pool downloads from its package index" in done.stderr
    assert "downloads " in done.stderr and "msgspec" in done.stderr
    assert any(request.startswith("/simple/msgspec/") for request in index.requests)
    assert rows(op, "pool", "devices", "-p", "reach")[0]["device"] == "cpu"
    wait_for(lambda: not reach.processes(), 10)


def test_torch_comes_from_the_index_of_its_build_and_a_missing_package_is_said(
    op: Operator, new_machine: NewMachine, ground: Path, index: Index, snapshot: dict[str, str]
) -> None:
    """The index has a build of torch for every driver, and lacks transformers: what was begun goes away again."""
    environ = {"PIP_INDEX_URL": f"{index.url}/simple", "PIP_CONFIG_FILE": "/dev/null", "PIP_RETRIES": "0"}
    machine = gpu_machine(op, new_machine, ground, "g575", "575.57.08", **environ)
    index.requests.clear()
    failed = op.llorch(
        "pool", "bootstrap", "g575", "-y", "--torch-index", index.url, timeout=300, environ=snapshot, check=1
    )
    assert any("torch-2.11.0+cu126" in request for request in index.requests), index.requests
    assert not any("+cu130" in request or "+cpu" in request for request in index.requests)
    assert "pip failed on the pool" in failed.stderr and "--source carry" in failed.stderr
    assert not list((machine.home / ".local/share/llorch/pool/venvs").iterdir()), "half an installation stays"
    wait_for(lambda: not machine.processes(), 10)
