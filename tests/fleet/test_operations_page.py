"""docs/operations.md, "A first fleet in ten minutes", typed as it stands: only addresses and the model are put in."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support import namespaces
from tests.support.hub import Hub
from tests.support.namespaces import GATEWAY, network
from tests.support.sshd import free_port, missing_tools, operator, wait_for

pytestmark = pytest.mark.e2e
PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


@pytest.fixture
def ground(missing_service: Callable[[str], NoReturn]) -> Iterator[Path]:
    if reason := missing_tools() or namespaces.missing_tools():
        missing_service(reason)
    folder = Path(tempfile.mkdtemp(prefix="lo", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_first_fleet_in_ten_minutes(ground: Path) -> None:
    import llorch_demo

    blocks = re.findall(r"```sh fleet\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    text = "\n".join(["set -eu", *blocks])
    shutil.copytree(llorch_demo.MODEL_DIR, ground / "hub" / "Qwen" / "Qwen3-0.6B")
    with operator(ground / "op") as op, network(ground, op.key) as net, Hub(ground / "hub", GATEWAY) as hub:
        machines = [net.machine("gpu1"), net.machine("gpu2")]
        with (op.folder / "ssh_config").open("a") as config:
            for machine in machines:
                config.write(f"Host {machine.name}\n  HostName {machine.host}\n  User {machine.user}\n")
        port = free_port(GATEWAY)
        for was, becomes in (
            ("tools/setup_env.sh run && . .venv/bin/activate", "llorch --version"),
            ("10.0.0.1:8080", f"{GATEWAY}:{port}"),
            ("--host 10.0.0.1 --port 8080", f"--host {GATEWAY} --port {port} --data-dir data"),
            ("orchestratord.log 2>&1 &", "orchestratord.log 2>&1 & echo $! > orchestratord.pid"),
            ("llorch pool add gpu1 gpu1", f"{UNTIL_UP.format(GATEWAY, port)}\nllorch pool add gpu1 gpu1 -y"),
            ("llorch pool add gpu2 gpu2", "llorch pool add gpu2 gpu2 -y"),
            # The machines share this one's installation; bootstrap itself has a test of its own.
            ("llorch pool bootstrap --all", "llorch pool bootstrap --all --dry-run --extras none"),
        ):
            assert was in text, was
            text = text.replace(was, becomes)
        try:
            done = subprocess.run(
                ["bash", "-c", text], capture_output=True, text=True, timeout=280, cwd=op.folder,
                stdin=subprocess.DEVNULL, env={**op.environ, "HF_ENDPOINT": hub.url, "XDG_CONFIG_HOME": ""},
            )  # fmt: skip
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        finally:
            end(op.folder / "orchestratord.pid")
        assert "Qwen3-0.6B" in done.stdout and "drained" in done.stdout
        assert "--on-boot: the worker runs, but will not come back by itself" in done.stderr
        wait_for(lambda: not any(machine.processes() for machine in machines), 10)


UNTIL_UP = "for i in $(seq 300); do curl -fs http://{}:{}/ready >/dev/null && break; sleep 0.1; done"


def end(pid_file: Path) -> None:
    """Stop the orchestratord that the page started."""
    import os

    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    try:
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text(), 20)
    except (ProcessLookupError, FileNotFoundError):
        return


def test_the_page_names_only_commands_that_exist() -> None:
    """Every `llorch ...` on the page is a command."""
    words = set(re.findall(r"`(llorch (?:pool|model|worker|status|doctor)(?: [a-z-]+)?)", PAGE.read_text()))
    for line in sorted(words):
        parts = line.split()[1:]
        done = subprocess.run([sys.executable, "-m", "llorch", *parts, "--help"], capture_output=True, timeout=60)
        assert done.returncode == 0, line
