"""The rpc process as `llorch` sees it: whole lines, an end line, and an end when the caller leaves."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from llorch_wire import pool as wire
from tests.support.hub import Hub

ROOT = Path(__file__).resolve().parents[3]


class Rpc:
    """A running `llorch-pool rpc`."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llorch_pool", "rpc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=environ,
        )

    def send(self, line: bytes, *, close: bool = False) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()
        if close:
            self.process.stdin.close()

    def event(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def until_end(self) -> list[dict[str, Any]]:
        events = [self.event()]
        while events[-1]["event"] != "end":
            events.append(self.event())
        return events

    def leave(self) -> int:
        """Close stdin, as ssh does when its client is gone."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(10)


@pytest.fixture
def rpc(environ: dict[str, str]) -> Any:
    running = Rpc(environ)
    yield running
    running.process.kill()
    for stream in (running.process.stdin, running.process.stdout, running.process.stderr):
        assert stream is not None
        with contextlib.suppress(BrokenPipeError):
            stream.close()
    running.process.wait(5)


def line(command: wire.AnyCommand, **options: Any) -> bytes:
    return wire.encode_line(wire.Request(command=command, version=wire.VERSION, **options))


def test_an_answer_is_hello_result_end(rpc: Rpc) -> None:
    rpc.send(line(wire.WorkerList()))
    hello, result, end = rpc.until_end()
    assert hello["event"] == "hello" and hello["version"] == wire.VERSION
    assert result["value"] == [] and end == {"event": "end", "rc": 0}


def test_a_failure_stands_in_the_end_line(rpc: Rpc) -> None:
    rpc.send(line(wire.ModelShow(name="nothing")))
    end = rpc.until_end()[-1]
    assert end["rc"] == 2 and "no model 'nothing'" in end["failure"]["message"] and end["failure"]["next_step"]


@pytest.mark.parametrize(
    ("text", "words", "rc"),
    [
        (b"ls -la\n", "not for people", 2),
        (b"\n", "not for people", 2),
        (b'{"version": "9.9", "protocol": 99, "command": {"command": "new.thing"}}\n', "don't speak the same", 1),
        (b'{"version": "9.9", "protocol": 1, "command": {"command": "new.thing"}}\n', "does not understand", 1),
        (b'{"version": "0.1.0", "protocol": 1, "command": {"command": "worker.stop", "ids": []}}\n', "ids", 2),
    ],
)
def test_what_is_no_request_is_answered_in_words(rpc: Rpc, text: bytes, words: str, rc: int) -> None:
    rpc.send(text)
    end = rpc.until_end()[-1]
    assert words in end["failure"]["message"] and end["rc"] == rc


def test_the_caller_leaving_ends_a_command(rpc: Rpc, hub: Hub, environ: dict[str, str]) -> None:
    hub.faults.cut_after, hub.faults.hold = 300_000, True
    rpc.send(line(wire.ModelDownload(ref="hf:acme/tiny", endpoint=hub.url)))
    while rpc.event().get("done", 0) < 300_000:
        pass
    assert rpc.leave() == 130
    assert not list(Path(environ["XDG_DATA_HOME"]).glob("llorch/models/tiny"))


def test_silence_on_the_lifeline_ends_a_command(rpc: Rpc, hub: Hub) -> None:
    """In a network cut the remote side lived on: nothing told it that nobody was there any more."""
    hub.faults.cut_after, hub.faults.hold = 300_000, True
    rpc.send(line(wire.ModelDownload(ref="hf:acme/tiny", endpoint=hub.url), lifeline_s=0.5))
    end = rpc.until_end()[-1]
    assert end["rc"] == 130 and "nothing heard" in end["failure"]["message"]


def test_its_own_deadline_ends_a_command(rpc: Rpc, hub: Hub) -> None:
    hub.faults.cut_after, hub.faults.hold = 300_000, True
    rpc.send(line(wire.ModelDownload(ref="hf:acme/tiny", endpoint=hub.url), timeout_s=1.0))
    end = rpc.until_end()[-1]
    assert end["rc"] == 124 and "not done within 1 s" in end["failure"]["message"]


def test_the_way_to_rpc_is_cheap(environ: dict[str, str]) -> None:
    """An import of typer alone would cost ten times what the whole call does."""
    code = "import sys, llorch_pool.cli, llorch_pool.rpc, llorch_pool.dispatch; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environ)
    loaded = set(json.loads(done.stdout.replace("'", '"')))
    assert not loaded & {
        "typer",
        "click",
        "asyncio",
        "rich",
        "torch",
        "huggingface_hub",
        "pydantic",
        "redis",
        "plumbum",
    }


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == wire.VERSION


HOSTILE = [
    "a b", "'", '"', "$(touch /tmp/owned)", "`id`", "a\nb", "\\", "; rm -rf ~", "&& true", "| cat", "> x", "*", "~",
    "$HOME", "%s%n", "\t", "-rf", "--help", "ünïcødé ☃ 𝄞", "\x1b[31mred", "a\rb", "{}", "!!", "#x",
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_come_back_in_the_refusal_as_they_were_sent(rpc: Rpc, value: str) -> None:
    rpc.send(line(wire.ModelShow(name=value)))
    assert repr(value) in rpc.until_end()[-1]["failure"]["message"]


def test_environment_is_not_needed(rpc: Rpc) -> None:
    assert os.environ is not None
    rpc.send(line(wire.Status()))
    status = rpc.until_end()[1]["value"]
    assert status["version"] == wire.VERSION and status["devices"][-1]["device"] == "cpu"


def test_what_the_system_refuses_is_told_with_its_path(
    environ: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "taken").write_text("")
    environ["LLORCH_MODELS"] = str(tmp_path / "taken" / "models")
    rpc: Rpc = request.getfixturevalue("rpc")
    rpc.send(line(wire.ModelDownload(ref="demo")))
    end = rpc.until_end()[-1]
    assert end["rc"] == wire.RC_FAILED
    assert end["failure"]["message"] == f"{tmp_path}/taken/models: Not a directory"
    assert "move the file away" in end["failure"]["next_step"] and "report" not in end["failure"]["next_step"]
