"""The command line on a pool machine: what is shown where, in which form, and how a mistake is answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llorch_pool import render
from llorch_wire.pool import DeviceInfo, PoolStatus, Stray


def run(tmp_path: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    home = {"HOME": str(tmp_path), "XDG_DATA_HOME": "", "XDG_STATE_HOME": "", "LLORCH_MODELS": "", **environ}
    command = [sys.executable, "-m", "llorch_pool", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **home}, timeout=60)


@pytest.mark.parametrize(
    ("typed", "words", "next_step"),
    [
        ("nope", "no such command 'nope'", "llorch-pool --help"),
        ("worker stop", "missing argument 'WORKER...'", "llorch-pool worker stop --help"),
        ("worker list --what", "no such option: --what", "llorch-pool worker list --help"),
        ("worker list -o xml", "--output 'xml' is not one of", "--json"),
        ("worker stop x", "no worker 'x' on this machine", "llorch-pool worker list"),
        ("model show x", "no model 'x' on this machine", "llorch-pool model download REF"),
        ("model download x", "'x' is not a model reference", "hf:org/name"),
        ("worker stop x --grace nan", "'--grace'", "--help"),
        ("worker stop x --grace -1", "'--grace'", "--help"),
        ("worker spawn demo --idle-timeout inf", "'--idle-timeout'", "--help"),
        ("worker spawn demo --ready-timeout nan", "'--ready-timeout'", "--help"),
        ("worker spawn demo --ready-timeout 0", "'--ready-timeout'", "--help"),
        ("model verify x --timeout nan", "'--timeout'", "--help"),
        ("worker spawn demo --slots 0", "--slots 0 is not between 1 and 65536", "number"),
    ],
)
def test_a_mistake_is_exit_2_with_a_next_step(tmp_path: Path, typed: str, words: str, next_step: str) -> None:
    done = run(tmp_path, *typed.split())
    assert done.returncode == 2 and not done.stdout
    first, last = done.stderr.splitlines()[0], done.stderr.splitlines()[-1]
    assert first.startswith("error: ") and words in first
    assert last.startswith("next:  ") and next_step in last


def test_a_group_alone_shows_its_help(tmp_path: Path) -> None:
    done = run(tmp_path, "worker")
    assert done.returncode == 2 and "Commands:" in done.stderr and not done.stdout
    assert run(tmp_path, "worker", "-h").stdout.startswith("Usage: llorch-pool worker")


def test_nothing_is_an_empty_answer(tmp_path: Path) -> None:
    assert run(tmp_path, "worker", "list", "--json").stdout == "[]\n"
    piped = run(tmp_path, "worker", "list")
    assert piped.stdout == "" and piped.stderr == ""
    assert run(tmp_path, "worker", "list", "-o", "table").stderr == "none\n"


def test_status_is_json_in_a_pipe_and_a_screen_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    piped = json.loads(run(tmp_path, "status").stdout)
    assert piped["workers"] == [] and piped["devices"]
    gpu = DeviceInfo(
        device="GPU-1", kind="cuda", index=0, name="H100", memory_total_bytes=80 << 30, memory_free_bytes=70 << 30
    )
    status = PoolStatus(
        host="gpu1", version="0.1.0", python="3.12.1", devices=[gpu], models=[], workers=[], models_dir="/m",
        strays=[Stray(pid=7, worker_id="w", command="python")], state_dir="/s", disk_free_bytes=0, disk_total_bytes=1,
    )  # fmt: skip
    render.emit(status, "table")
    shown = capsys.readouterr().out
    assert "gpu1: llorch-pool 0.1.0" in shown and "70.0 GiB" in shown and "models: none" in shown
    assert "strays:" in shown and "DeviceInfo" not in shown


def test_what_the_system_refuses_is_no_fault_of_ours(tmp_path: Path) -> None:
    """The state folder's place is taken by a file."""
    (tmp_path / "taken").write_text("")
    done = run(tmp_path, "worker", "cleanup", XDG_STATE_HOME=str(tmp_path / "taken"))
    assert done.returncode == 0
    done = run(tmp_path, "model", "download", "demo", LLORCH_MODELS=str(tmp_path / "taken" / "models"))
    first, last = done.stderr.splitlines()[0], done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert first == f"error: {tmp_path}/taken/models: Not a directory" and "move the file away" in last


def test_a_reader_that_leaves_is_no_failure_to_report(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "XDG_DATA_HOME": "", "XDG_STATE_HOME": "", "LLORCH_MODELS": ""}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "llorch_pool", "device", "list", "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        env={**os.environ, **home},
        timeout=60,
    )
    os.close(write)
    assert done.stderr == b"" and done.returncode == 1
