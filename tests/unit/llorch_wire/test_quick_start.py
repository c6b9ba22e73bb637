"""What a command on a pool imports before it can answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llorch_wire import pool as wire
from llorch_wire.quick_start import hidden


def test_a_hidden_module_is_only_hidden_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with hidden("colorsys"):
        try:
            import colorsys as _  # noqa: F401
        except ImportError:
            pass
        else:
            raise AssertionError("it could be imported")
    import colorsys

    with hidden("colorsys"):
        import colorsys as again
    assert again is colorsys


def test_an_rpc_imports_nothing_that_is_slow(tmp_path: Path) -> None:
    """Each of these costs several milliseconds of every command on every machine."""
    request = wire.encode_line(wire.Request(command=wire.WorkerList(), version=wire.VERSION, lifeline_s=None))
    code = "import sys, llorch_pool.cli, os\nos._exit = lambda rc: sys.exit(rc)\nsys.argv = ['llorch-pool', 'rpc']\n"
    code += "try:\n    llorch_pool.cli.main()\nfinally:\n    print(*sys.modules, file=sys.stderr)\n"
    environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], input=request, capture_output=True, timeout=60, check=True, env=environ
    )
    assert b'"event":"end","rc":0' in done.stdout
    slow = {
        "typer", "rich", "pydantic", "typing_extensions", "inspect", "dataclasses", "asyncio", "ssl", "http.client",
        "concurrent.futures", "logging", "subprocess", "tempfile", "huggingface_hub", "plumbum", "shutil",
    }  # fmt: skip
    assert not slow & set(done.stderr.decode().split())
