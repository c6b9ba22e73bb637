"""What a bootstrap does on which machine: Python, torch build, wheels. And the wheel that it carries."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from llorch.errors import CliError, UsageProblem
from llorch.fleet import carry, remote_install, remote_scripts
from llorch.fleet.bootstrap_plan import Options, Probe, parse_probe, plan
from llorch.fleet.pools import Pool

POOL = Pool(name="gpu1", host="h")


def options(**changes: Any) -> Options:
    base: dict[str, Any] = {
        "source": "auto", "extras": "worker", "torch": "auto", "torch_index": "", "wheels": "",
        "system_packages": False, "python": "",
    }  # fmt: skip
    return Options.checked(**{**base, **changes})


def probe(**changes: Any) -> Probe:
    base: dict[str, Any] = {
        "system": "Linux", "machine": "x86_64", "glibc": "2.36", "driver": "", "free_bytes": 100 << 30,
        "pythons": [("3.12.4", "/usr/bin/python3.12")],
    }  # fmt: skip
    return Probe(**{**base, **changes})


def test_the_probe_runs_here_and_is_read_among_banners() -> None:
    done = subprocess.run(["sh", "-c", remote_scripts.PROBE], input="", capture_output=True, text=True, timeout=30)
    found = parse_probe(["Welcome!", "llorch-probe banner", *done.stdout.splitlines(), "bye"])
    assert found.system == "Linux" and found.pythons and found.free_bytes > 0
    with pytest.raises(ValueError, match="did not come to its end"):
        parse_probe(["llorch-probe:system=Linux"])


def probed(python: str) -> Probe:
    done = subprocess.run(
        ["sh", "-c", remote_scripts.PROBE], input=f"{python}\n", capture_output=True, text=True, timeout=30
    )
    return parse_probe(done.stdout.splitlines())


def test_the_python_that_was_asked_for_is_tried_on_the_machine(tmp_path: Path) -> None:
    here = ".".join(str(part) for part in sys.version_info[:3])
    found = plan(POOL, probed(sys.executable), options(python=sys.executable))
    assert (found.python_version, found.python) == (here, sys.executable)
    assert found.lines[0] == f"Python {here} at {sys.executable}"
    spaced = tmp_path / "a b"
    spaced.symlink_to(sys.executable)
    assert plan(POOL, probed(str(spaced)), options(python=str(spaced))).python == str(spaced)
    assert probed("").wanted == ("", "") and not probed("").wanted_problem


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("/no/such/python", "is not there, or may not be run"),
        ("no-such-python", "is not there, or may not be run"),
        ("/bin/echo", "is no Python that runs there"),
        ("/bin/false", "is no Python that runs there;"),
        ("/tmp", ""),
        ("cd", "is not there, or may not be run"),
    ],
)
def test_what_is_no_python_is_refused_with_what_it_is(python: str, words: str) -> None:
    found = probed(python)
    assert found.pythons and found.system == "Linux"  # the rest of the probe is whole
    with pytest.raises(UsageProblem, match="--python") as caught:
        plan(POOL, found, options(python=python))
    assert f"gpu1: --python {python} {words}" in caught.value.message and "3.11 to 3.13" in caught.value.message


@pytest.mark.parametrize("version", ["3.10.14", "3.14.0", "2.7.18"])
def test_a_python_of_another_age_is_refused_by_its_version(version: str) -> None:
    with pytest.raises(UsageProblem, match=f"is Python {version}; it must be Python 3.11 to 3.13"):
        plan(POOL, probe(wanted=(version, "/opt/python")), options(python="/opt/python"))


def test_a_python_without_venv_is_refused(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\ncase "$2" in *venv*) exit 1;; esac\necho 3.12.1\n')
    bare.chmod(0o755)
    with pytest.raises(UsageProblem, match="has no module venv"):
        plan(POOL, probed(str(bare)), options(python=str(bare)))


@pytest.mark.parametrize("python", ["bin/python", "./python", "~/python", "-c", "/a\nb", ""])
def test_a_path_that_means_nothing_there_is_refused_before_anybody_is_asked(python: str) -> None:
    if not python:
        assert options(python="").python == ""
        return
    with pytest.raises(UsageProblem, match="neither a path"):
        options(python=python)


@pytest.mark.parametrize(
    ("driver", "build"),
    [("", "cpu"), ("580.65.06", "cu130"), ("575.57.08", "cu126"), ("525.147.05", "cu126"), ("610.1", "cu130")],
)
def test_torch_follows_the_driver(driver: str, build: str) -> None:
    found = plan(POOL, probe(driver=driver), options())
    assert found.torch_build == build and found.torch_index.endswith(f"/{build}")
    assert any(build in line for line in found.lines)


def test_an_old_driver_is_refused_and_the_cpu_offered() -> None:
    with pytest.raises(CliError, match=r"driver 470\.82 is too old") as caught:
        plan(POOL, probe(driver="470.82"), options())
    assert "--torch cpu" in caught.value.next_step
    assert plan(POOL, probe(driver="470.82"), options(torch="cpu")).torch_build == "cpu"


def test_a_driver_that_does_not_answer_is_no_old_one() -> None:
    said = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    with pytest.raises(CliError, match="does not answer: NVIDIA-SMI has failed") as caught:
        plan(POOL, probe(driver=said), options())
    assert "--torch cpu" in caught.value.next_step
    assert plan(POOL, probe(driver=said), options(torch="cpu")).torch_build == "cpu"


def test_a_python_that_fits_is_chosen_or_brought() -> None:
    pythons = [("3.14.0", "/a"), ("3.13.2", "/b"), ("3.9.1", "/c")]
    assert plan(POOL, probe(pythons=pythons), options()).python == "/b"
    brought = plan(POOL, probe(pythons=[("3.9.1", "/c")]), options())
    assert brought.python == "" and "brought by uv" in brought.lines[0]
    carried = plan(POOL, probe(pythons=[("3.9.1", "/c")]), options(source="carry"))
    assert carried.python == "" and "carried over" in carried.lines[0]


def test_wheel_tags_follow_glibc() -> None:
    tags = plan(POOL, probe(glibc="2.28", machine="aarch64"), options()).platforms
    assert tags[0] == "manylinux_2_28_aarch64" and "manylinux2014_aarch64" in tags
    assert plan(POOL, probe(glibc=""), options()).platforms[0] == "manylinux_2_17_x86_64"


@pytest.mark.parametrize(
    "change", [{"system": "Darwin"}, {"machine": "riscv64"}, {"free_bytes": 1 << 30}, {"system": ""}]
)
def test_machines_that_can_not_run_workers(change: dict[str, Any]) -> None:
    with pytest.raises(CliError, match="gpu1"):
        plan(POOL, probe(**change), options())


@pytest.mark.parametrize(
    "change",
    [{"source": "x"}, {"extras": "x"}, {"torch": "cu1;x"}, {"torch_index": "file:///x"}, {"wheels": "/no/such"}],
)
def test_options_are_checked(change: dict[str, str]) -> None:
    with pytest.raises(UsageProblem, match="--"):
        options(**change)


def test_the_carried_wheel_installs_and_starts(tmp_path: Path) -> None:
    wheel = carry.pack(tmp_path)
    assert wheel.read_bytes() == carry.pack(tmp_path).read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "llorch_demo/model/model.safetensors" in names and "llorch-0.1.0.dist-info/RECORD" in names
    assert not [name for name in names if "__pycache__" in name]
    code = "import llorch_pool, sys; print(llorch_pool.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=30,
        env={"PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert done.stdout.startswith(str(tmp_path))


def wheel_needing(folder: Path, name: str, *requires: str) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        lines = "".join(f"Requires-Dist: {line}\n" for line in requires)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\nVersion: 1.0\n{lines}\nBody")
    return path


def test_what_the_other_python_needs_is_found(tmp_path: Path) -> None:
    """pip judged `python_full_version < "3.11.3"` by its own Python, and the pool's 3.11.2 lacked async-timeout."""
    main = wheel_needing(tmp_path, "llorch", "redis>=5", 'torch; extra == "worker"')
    wheel_needing(
        tmp_path, "redis", 'async-timeout>=4; python_full_version < "3.11.3"', 'colorama; sys_platform == "win32"',
        'nvidia-x; platform_machine == "x86_64"',
    )  # fmt: skip
    assert carry.missing(main, tmp_path, "", "3.11.2", "x86_64") == {"async-timeout>=4", "nvidia-x"}
    assert carry.missing(main, tmp_path, "", "3.12.0", "aarch64") == set()
    assert carry.missing(main, tmp_path, "worker", "3.12.0", "aarch64") == {"torch"}


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("Collecting orjson<4,>=3.10 (from llorch[worker]@ file:///tmp/x/llorch.whl)", "Collecting orjson<4,>=3.10"),
        ("Installing collected packages: a, b, c", "3 packages"),
        ("Successfully installed a-1 b-2", "2 packages are installed"),
    ],
)
def test_pips_words_in_short(line: str, shown: str) -> None:
    assert remote_install.in_short(line) == shown


def test_what_helps_when_pip_failed() -> None:
    full = remote_install.next_step_after("OSError: [Errno 28] No space left on device", carried=True)
    assert "free space there" in full
    assert "--wheels" in remote_install.next_step_after("No matching distribution", carried=True)
    assert "--source carry" in remote_install.next_step_after("No matching distribution", carried=False)
