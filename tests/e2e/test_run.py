"""`llorch run` and its neighbours against the real stack, as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.stack import Stack

pytestmark = pytest.mark.e2e

DEADLINE_S = 90.0
LONG = ["--raw", "--seed", "11", "--max-tokens", "200", "Once upon a time"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = Stack(tmp_path_factory.mktemp("run"))
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def story(stack: Stack) -> str:
    """What LONG gives when nothing disturbs it."""
    done = llorch(stack, "run", *LONG)
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment(stack: Stack) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    return {**kept, "LLORCH_URL": stack.url, "NO_COLOR": "1"}


def llorch(stack: Stack, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llorch", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=environment(stack),
    )


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.01)
    return found


class Running:
    """A `llorch` command that goes on while the test does something else; its output is in files."""

    def __init__(self, stack: Stack, folder: Path, *arguments: str) -> None:
        self._out, self._err = folder / "out", folder / "err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llorch", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment(stack),
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def end(self) -> int:
        try:
            return self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()
            self.process.wait(10)


def test_a_chat_message_streams_a_story(stack: Stack) -> None:
    done = llorch(stack, "run", "--seed", "1", "Tell me a story about a fox.")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 10
    assert "tokens in · " in done.stderr and "first after" in done.stderr and "stopped by " in done.stderr


def test_the_same_seed_is_the_same_text_from_an_argument_and_from_stdin(stack: Stack) -> None:
    flags = ["run", "--raw", "--seed", "3", "--max-tokens", "60"]
    first, second = llorch(stack, *flags, "The little fox"), llorch(stack, *flags, "-", stdin="The little fox")
    assert first.returncode == second.returncode == 0
    assert first.stdout == second.stdout


def test_json_is_every_event_in_order(stack: Stack, story: str) -> None:
    done = llorch(stack, "run", "--json", *LONG)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    names = [event["event"] for event in events if event["event"] not in ("queued", "metrics")]
    tokens = [event["data"] for event in events if event["event"] == "token"]
    assert names == ["started", *["token"] * len(tokens), "end"]
    assert [token["i"] for token in tokens] == list(range(len(tokens)))
    assert "".join(token["t"] for token in tokens) == story.removesuffix("\n")


@pytest.mark.parametrize("part", ["orchestratord", "redis", "worker0"])
async def test_a_kill_in_the_middle_changes_nothing_in_the_text(
    stack: Stack, story: str, tmp_path: Path, part: str
) -> None:
    running = Running(stack, tmp_path, "run", *LONG)
    try:
        until(lambda: len(running.out) > 20, "some text")
        assert running.process.poll() is None
        await stack.kill_and_wait_restarted(part)
    finally:
        status = running.end()
    assert status == 0, running.err
    assert running.out == story
    if part == "orchestratord":
        assert "trying again for up to 600 s" in running.err and "connected again after" in running.err


def test_ctrl_c_cancels_the_task(stack: Stack, tmp_path: Path) -> None:
    running = Running(stack, tmp_path, "run", "--json", "--max-tokens", "1500", *LONG[:3], "Once upon a time")
    try:
        until(lambda: '"event":"token"' in running.out, "a token")
        running.process.send_signal(signal.SIGINT)
    finally:
        status = running.end()
    assert status == 130, running.err
    events = [json.loads(line) for line in running.out.splitlines()]
    assert events[-1]["event"] == "end" and events[-1]["data"]["stop_reason"] == "CANCELLED"
    shown = json.loads(llorch(stack, "task", "show", events[0]["data"]["task_id"], "--json").stdout)
    assert shown["status"] == "cancelled"


def test_a_task_listed_shown_watched(stack: Stack) -> None:
    text = llorch(stack, "run", "--raw", "--seed", "3", "--max-tokens", "20", "The little fox").stdout
    row = llorch(stack, "task", "list", "--limit", "1").stdout.rstrip("\n").split("\t")
    assert row[1:3] == ["completed", "demo"]
    assert json.loads(llorch(stack, "task", "show", row[0], "--json").stdout)["text"] == text.removesuffix("\n")
    assert llorch(stack, "task", "watch", row[0]).stdout == text
    assert llorch(stack, "task", "cancel", row[0]).stderr == f"{row[0]}: completed\n"


def test_status_queue_and_workers(stack: Stack) -> None:
    found = json.loads(llorch(stack, "status", "--json").stdout)
    assert found["ready"]["ready"] and not found["alerts"], found
    (worker,) = found["workers"]
    assert worker["worker_id"] == stack.parts()["workers"][0]["worker_id"]
    screen = llorch(stack, "status", "-o", "table").stdout
    assert worker["worker_id"] in screen and "Alerts: none" in screen
    assert llorch(stack, "queue", "show").returncode == 0
    assert llorch(stack, "worker", "list", "-o", "name").stdout.split() == [worker["worker_id"]]
    assert llorch(stack, "worker", "drain", worker["worker_id"]).returncode == 0
    try:
        drained = json.loads(llorch(stack, "status", "--json").stdout)
        assert drained["alerts"][-1]["next_step"] == f"llorch worker undrain {worker['worker_id']}"
    finally:
        assert llorch(stack, "worker", "undrain", worker["worker_id"]).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "--model", "nope", "hi"], 1, "MODEL_NOT_FOUND"),
        (["run", "--raw", "nul\\0"], 0, ""),
        (["task", "show", "banana"], 2, "must be a UUID"),
        (["task", "show", "00000000-0000-4000-8000-000000000000"], 1, "NOT_FOUND"),
        (["worker", "drain", "nobody"], 1, "no worker 'nobody' is registered"),
        (["run", "--stop", "", "hi"], 2, "stop"),
    ],
)
def test_bad_input(stack: Stack, arguments: list[str], code: int, message: str) -> None:
    done = llorch(stack, *arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    if code:
        assert done.stderr.splitlines()[-1].startswith("next:  ")


def test_a_prompt_longer_than_the_context(stack: Stack) -> None:
    done = llorch(stack, "run", "--raw", "-", stdin="story " * 6000)
    assert done.returncode == 1
    assert "CONTEXT_LENGTH_EXCEEDED" in done.stderr
    assert "next:  shorten the prompt" in done.stderr
