"""How `llorch up` looks after its children, with stand-ins that start in a moment; test_up.py has the real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.stack import alive, free_port, wait_gone

pytestmark = pytest.mark.e2e

DEADLINE_S = 30.0
ROOT = Path(__file__).resolve().parents[2]


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.02)
    return found


class Up:
    """One stub stack as a process of its own group, on a folder that several lives may share."""

    def __init__(self, folder: Path, *, port: int = 0, mode: str = "") -> None:
        self.data_dir = folder / "data"
        self.ready_file = folder / "ready.json"
        self.output = folder / "out.log"
        command = [sys.executable, "-m", "tests.support.stub_stack", str(self.data_dir), str(self.ready_file)]
        with self.output.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, str(port), mode],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def parts(self) -> dict[str, Any]:
        try:
            return json.loads(self.ready_file.read_text())
        except FileNotFoundError:
            return {}

    def ready(self) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            assert self.process.poll() is None, self.text()
            return self.parts()

        return until(look, f"the ready file\n{self.text()}")

    def pids(self) -> list[int]:
        parts = self.parts()
        return [parts["orchestratord"]["pid"], parts["redis"]["pid"], *(part["pid"] for part in parts["workers"])]

    def text(self) -> str:
        return self.output.read_text()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE_S)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    lives: list[Up] = []

    def start(**options: Any) -> Up:
        lives.append(Up(tmp_path, **options))
        return lives[-1]

    yield start
    for life in lives:
        life.end()


def pid_of(parts: dict[str, Any], name: str) -> int:
    return parts["workers"][int(name[-1])]["pid"] if name.startswith("worker") else parts[name]["pid"]


def test_each_part_is_restarted_at_its_address_and_the_ready_file_follows(up: Callable[..., Up]) -> None:
    life = up()
    first = life.ready()
    for name in ("orchestratord", "redis", "worker0", "worker1"):
        before = life.parts()
        os.kill(pid_of(before, name), signal.SIGKILL)
        after = until(lambda: (now := life.parts()) and pid_of(now, name) != pid_of(before, name) and now, name)  # noqa: B023
        others = [part for part in ("orchestratord", "redis", "worker0", "worker1") if part != name]
        assert [pid_of(after, part) for part in others] == [pid_of(before, part) for part in others]
    last = life.parts()
    assert last["orchestratord"]["url"] == first["orchestratord"]["url"]
    assert [(w["worker_id"], w["url"]) for w in last["workers"]] == [
        (w["worker_id"], w["url"]) for w in first["workers"]
    ]
    until(lambda: life.text().count("is back after") == 4, "four parts said to be back")
    with urllib.request.urlopen(last["workers"][0]["url"] + "/health", timeout=5) as answer:
        assert json.load(answer)["status"] == "ready"


def test_the_third_death_within_a_minute_is_answered_with_a_pause(up: Callable[..., Up]) -> None:
    life = up()
    life.ready()
    for _ in range(3):
        pid = life.parts()["redis"]["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda: life.parts()["redis"]["pid"] != pid, "another pid")  # noqa: B023
    lines = [line for line in life.text().splitlines() if line.startswith("redis (pid")]
    pauses = [line.partition("; ")[2] for line in lines if "killed by SIGKILL" in line]
    assert pauses == [*["starting it again at once, same address"] * 2, "starting it again in 1 s, same address"]


def test_sigkill_of_up_leaves_nothing(up: Callable[..., Up]) -> None:
    life = up()
    life.ready()
    pids = life.pids()
    assert all(alive(pid) for pid in pids)
    life.process.kill()
    life.process.wait(DEADLINE_S)
    wait_gone(pids)


def test_sigkill_of_up_before_it_is_ready_leaves_nothing(up: Callable[..., Up]) -> None:
    life = up(mode="deaf")
    running = life.data_dir / "running.json"
    pids = until(lambda: running.exists() and [part["pid"] for part in json.loads(running.read_text())], "children")
    life.process.kill()
    life.process.wait(DEADLINE_S)
    wait_gone(pids)


def test_the_same_folder_goes_on_at_once_after_sigkill_of_everything(up: Callable[..., Up]) -> None:
    port = free_port()
    first = up(port=port)
    before = first.ready()
    os.killpg(first.process.pid, signal.SIGKILL)
    second = up(port=port)  # at once: neither the old `up` nor its children have been waited for
    first.process.wait(DEADLINE_S)
    old = {pid_of(before, name) for name in ("orchestratord", "redis", "worker0", "worker1")}
    after = until(lambda: (now := second.parts()) and not old & set(second.pids()) and now, second.text())
    assert after["orchestratord"]["url"] == before["orchestratord"]["url"]
    assert [(w["worker_id"], w["url"]) for w in after["workers"]] == [
        (w["worker_id"], w["url"]) for w in before["workers"]
    ]


def test_a_second_up_on_the_same_folder_is_refused_by_pid(up: Callable[..., Up]) -> None:
    first = up()
    first.ready()
    second = up()
    assert second.process.wait(DEADLINE_S) == 1
    assert f"another `llorch up` (pid {first.process.pid})" in second.text()
    assert first.process.poll() is None
    assert first.parts(), "the refused one must not touch the ready file"


def test_ctrl_c_stops_in_order_and_removes_the_ready_file(up: Callable[..., Up]) -> None:
    life = up()
    life.ready()
    pids = life.pids()
    life.process.send_signal(signal.SIGINT)
    assert life.process.wait(DEADLINE_S) == 0, life.text()
    assert not any(alive(pid) for pid in pids)
    assert not life.ready_file.exists()


def test_a_second_ctrl_c_kills_what_does_not_end(up: Callable[..., Up]) -> None:
    life = up(mode="deaf")
    life.ready()
    pids = life.pids()
    life.process.send_signal(signal.SIGINT)
    until(lambda: "stopping: what runs has" in life.text(), "the first Ctrl-C was seen")
    life.process.send_signal(signal.SIGINT)
    assert life.process.wait(DEADLINE_S) == 130, life.text()
    assert not any(alive(pid) for pid in pids)


def test_a_worker_that_never_starts_ends_the_start_with_its_log(up: Callable[..., Up]) -> None:
    life = up(mode="exit")
    assert life.process.wait(DEADLINE_S) == 1
    assert "the weights are damaged file=model.safetensors" in life.text()
    assert "next: less " in life.text()
    assert not life.ready_file.exists()
    wait_gone([part["pid"] for part in json.loads((life.data_dir / "running.json").read_text())])


def test_a_port_in_use_is_refused_with_a_free_one(up: Callable[..., Up]) -> None:
    first = up(port=free_port())
    url = first.ready()["orchestratord"]["url"]
    port = int(url.rpartition(":")[2])
    other_folder = first.data_dir.parent / "other"
    other_folder.mkdir()
    second = Up(other_folder, port=port)
    assert second.process.wait(DEADLINE_S) == 1
    assert f"port {port} on 127.0.0.1 is in use" in second.text()
    assert "next: llorch up --port " in second.text()
