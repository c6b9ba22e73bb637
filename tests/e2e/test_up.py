"""`llorch up` with the real parts: what is killed comes back where it was, what is stopped leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.stack import Stack, Transcript, alive, wait_gone

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = Stack(tmp_path_factory.mktemp("up"), workers=2)
    running.start()
    yield running
    running.stop()


async def tell(stack: Stack, **body: Any) -> Transcript:
    """One task from its admission, asked for until something that was just killed is back, to its end."""
    request = {"prompt": "Once upon a time", "max_tokens": 40, "ignore_eos": True, "task_id": str(uuid.uuid4()), **body}
    async with aiohttp.ClientSession() as session, asyncio.timeout(60):
        while True:
            try:
                async with session.post(f"{stack.url}/v2/tasks", json={"model": "demo", **request}) as reply:
                    answer = await reply.json()
            except aiohttp.ClientError:
                answer = {"error": {"retriable": True}}
            if "error" not in answer:
                break
            assert answer["error"]["retriable"], answer
            await asyncio.sleep(0.05)
        return await Transcript(answer["task_id"]).follow(session, stack.url)


def descendants(pid: int) -> list[int]:
    """Every process below this one, Redis' server and the engines included."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, left = [], [pid]
    while left:
        children = parents.get(left.pop(), [])
        found += children
        left += children
    return found


def test_the_ready_file_names_every_part(stack: Stack) -> None:
    parts = stack.parts()
    assert set(parts) == {"orchestratord", "redis", "workers"}
    assert parts["orchestratord"]["url"] == stack.url
    assert set(parts["orchestratord"]) == set(parts["redis"]) == {"url", "pid"}
    assert [set(worker) for worker in parts["workers"]] == [{"worker_id", "url", "pid"}] * 2
    assert all(alive(pid) for pid in stack.pids())
    assert stack.process is not None
    children = {pid for pid in descendants(stack.process.pid) if ppid(pid) == stack.process.pid}
    assert children == set(stack.pids()), "`llorch up` is the parent of each part"


def ppid(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def test_each_part_killed_in_turn_is_back_and_works(stack: Stack) -> None:
    before = stack.parts()
    first = await tell(stack, seed=5)
    for part in ("redis", "orchestratord", "worker0", "worker1"):
        others = [pid for pid in stack.pids() if pid != stack._part(part)["pid"]]
        await stack.kill_and_wait_restarted(part)
        assert all(alive(pid) for pid in others)
        again = await tell(stack, seed=5)
        assert again.tokens == first.tokens
    after = stack.parts()
    assert [(w["worker_id"], w["url"]) for w in after["workers"]] == [
        (w["worker_id"], w["url"]) for w in before["workers"]
    ]
    assert after["orchestratord"]["url"] == before["orchestratord"]["url"]
    assert after["redis"]["url"] == before["redis"]["url"]
    text = stack.log_file.read_text()
    assert text.count("was killed by SIGKILL; starting it again at once, same address") == 4


async def test_sigkill_of_up_leaves_nothing_and_the_folder_goes_on(stack: Stack) -> None:
    assert stack.process is not None
    before = stack.parts()
    story = await tell(stack, seed=6)
    everything = descendants(stack.process.pid)
    assert len(everything) >= 7  # four parts, Redis' server, two engines
    stack.process.kill()
    stack.process.wait(30)
    wait_gone(everything)
    assert {(w["worker_id"], w["state"], w["supervisor_pid"]) for w in on_record(stack)} == {
        (w["worker_id"], "exited", 0) for w in before["workers"]
    }
    stack.start()
    assert [w["state"] for w in on_record(stack)] == ["ready"] * 2
    assert [w["worker_id"] for w in stack.parts()["workers"]] == [w["worker_id"] for w in before["workers"]]
    async with aiohttp.ClientSession() as session:
        kept = await Transcript(story.task_id).follow(session, stack.url)
    assert kept.tokens == story.tokens


async def test_workers_stand_in_the_pool_s_list_with_what_they_really_are(stack: Stack) -> None:
    assert stack.process is not None
    listed = on_record(stack)
    assert {(w["worker_id"], w["pid"], w["url"]) for w in listed} == {
        (w["worker_id"], w["pid"], w["url"]) for w in stack.parts()["workers"]
    }
    assert [(w["state"], w["model"], w["device"]) for w in listed] == [("ready", "demo", "cpu")] * 2
    assert {(w["supervisor"], w["supervisor_pid"]) for w in listed} == {("llorch up", stack.process.pid)}
    killed = stack.parts()["workers"][0]
    await stack.kill_and_wait_restarted("worker0")
    deadline = time.monotonic() + 60
    while True:
        again = next(w for w in on_record(stack) if w["worker_id"] == killed["worker_id"])
        if again["state"] == "ready" and again["pid"] == stack.parts()["workers"][0]["pid"]:
            break
        assert again["state"] in ("exited", "starting", "ready"), again
        assert time.monotonic() < deadline, again
        await asyncio.sleep(0.1)
    assert again["url"] == killed["url"] and again["pid"] != killed["pid"]


def test_a_worker_of_up_is_not_stopped_behind_its_back(stack: Stack) -> None:
    assert stack.process is not None
    before = stack.pids()
    worker_id = stack.parts()["workers"][0]["worker_id"]
    stopped = pool(stack, "worker", "stop", worker_id)
    assert stopped.returncode == 1
    assert f"{worker_id} is run by `llorch up` (pid {stack.process.pid})" in stopped.stderr
    assert f"llorch worker drain {worker_id}" in stopped.stderr
    everything = pool(stack, "worker", "stop-all", "--json")
    assert (everything.returncode, json.loads(everything.stdout)) == (0, [])
    assert everything.stderr.count("would start it again") == 2
    cleaned = pool(stack, "worker", "cleanup")
    assert json.loads(cleaned.stdout)["entries"] == json.loads(cleaned.stdout)["strays"] == []
    assert stack.pids() == before and all(alive(pid) for pid in before)


def pool(stack: Stack, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llorch_pool", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=stack.environment)


def on_record(stack: Stack) -> list[dict[str, Any]]:
    return json.loads(pool(stack, "worker", "list", "--json").stdout)


def test_a_second_up_on_the_same_folder_is_refused(stack: Stack) -> None:
    command = [sys.executable, "-m", "llorch", "up", "--port", "0", "--data-dir", str(stack.data_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert stack.process is not None
    assert done.returncode == 1
    assert f"another `llorch up` (pid {stack.process.pid}) uses the data folder" in done.stderr


async def test_ctrl_c_leaves_nothing(stack: Stack) -> None:
    assert stack.process is not None
    everything = descendants(stack.process.pid)
    stack.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 45
    while stack.process.poll() is None:
        assert time.monotonic() < deadline, stack.tail()
        time.sleep(0.05)
    assert stack.process.returncode == 0, stack.tail()
    assert not [pid for pid in everything if alive(pid)]
    assert not stack.ready_file.exists()
    assert "didn't end within" not in stack.log_file.read_text()
    assert on_record(stack) == []
    stack.process = None


async def test_open_to_the_network_with_a_key_made_for_it(tmp_path: Path) -> None:
    """The key is in a file only: not in what is printed, not in a log, not in a command line."""
    opened = Stack(tmp_path, extra=("--host", "0.0.0.0"))
    opened.start()
    try:
        keys = [(opened.data_dir / name).read_text().strip() for name in ("api-key", "worker-key")]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{opened.url}/v2/tasks") as reply:
                assert reply.status == 401
            headers = {"Authorization": f"Bearer {keys[0]}"}
            async with session.get(f"{opened.url}/v2/workers", headers=headers) as reply:
                assert reply.status == 200
        assert opened.process is not None
        shown = [opened.log_file.read_text(), *(log.read_text() for log in (opened.data_dir / "logs").iterdir())]
        for pid in [opened.process.pid, *descendants(opened.process.pid)]:
            shown.append(Path(f"/proc/{pid}/cmdline").read_text())
        assert f"cat {opened.data_dir / 'api-key'}" in shown[0]
        assert not [text for text in shown if any(key in text for key in keys)]
        environment = {**os.environ, "LLORCH_API_KEY": keys[0], "LLORCH_URL": opened.url}
        run = [sys.executable, "-m", "llorch", "run", "--json", "--max-tokens", "5", "Once"]
        done = subprocess.run(run, capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["event"] == "end"
    finally:
        opened.stop()
