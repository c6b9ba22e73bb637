"""Bootstrap of bare machines: where Python is too old, where an index is reachable, where things are missing."""

from __future__ import annotations

import json
import shutil
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


def test_uv_brings_a_python_where_it_is_too_old(
    op: Operator, new_machine: NewMachine, ground: Path, snapshot: dict[str, str]
) -> None:
    newer, older = pythons("3.12"), pythons("3.10")
    if not newer:
        pytest.skip("there is no CPython 3.12 here to be handed out")
    folder = ground / "pythons"
    folder.mkdir()
    with Index(folder) as mirror:
        version = python_archive(newer, folder, mirror.url)
        programs = {"python3": older} if older else {}
        path = bare_path(ground / "bin-old", **programs)
        environ = {"PATH": path, "UV_PYTHON_DOWNLOADS_JSON_URL": f"{mirror.url}/files/downloads.json"}
        old = add_bare(op, new_machine, "old", environ)
        done = op.llorch(
            "pool", "bootstrap", "old", "-y", "--source", "carry", "--extras", "none", "--json",
            timeout=300, environ=snapshot,
        )  # fmt: skip
        assert "Python 3.12: brought by uv" in done.stderr and "downloading" in done.stderr
        assert json.loads(done.stdout)[0]["python"] == version
        assert any(request.endswith("install_only.tar.gz") for request in mirror.requests)
    current = (old.home / ".local/share/llorch/pool/current").resolve()
    assert list(current.glob("lib/python3.12/site-packages/llorch_pool/__pycache__/rpc*.pyc")), (
        "it compiles at each call"
    )
    assert rows(op, "pool", "devices", "-p", "old")[0]["device"] == "cpu"
    wait_for(lambda: not old.processes(), 10)


def test_a_python_that_can_not_be_brought_is_said_and_nothing_stays(
    op: Operator, new_machine: NewMachine, ground: Path, snapshot: dict[str, str]
) -> None:
    environ = {
        "PATH": bare_path(ground / "bin-none"), "UV_PYTHON_INSTALL_MIRROR": "http://127.0.0.1:9/",
        "UV_HTTP_RETRIES": "0", "TMPDIR": str(ground / "none-tmp"),
    }  # fmt: skip
    (ground / "none-tmp").mkdir()
    none = add_bare(op, new_machine, "none", environ)
    done = op.llorch(
        "pool", "bootstrap", "none", "-y", "--source", "carry", "--extras", "none",
        timeout=300, environ=snapshot, check=1,
    )  # fmt: skip
    assert "there is no Python 3.11 or newer on the pool, and uv could not download one" in done.stderr
    assert "UV_PYTHON_INSTALL_MIRROR" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
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
