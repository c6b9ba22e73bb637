"""A real stack for end-to-end tests: `llorch up` as a user starts it, killed part by part or whole, read over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from llorch_wire.sse import SseFrame, SseParser

START_DEADLINE_S = 120.0


def free_port() -> int:
    """A loopback port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stack:
    """One `llorch up` on its own data folder and port. `kill` takes a part's name from the ready file."""

    def __init__(self, folder: Path, *, workers: int = 1, extra: tuple[str, ...] = ()) -> None:
        self.data_dir = folder / "data"
        self.ready_file = folder / "ready.json"
        self.log_file = folder / "up.log"
        self.port = free_port()
        self.workers = workers
        self.extra = extra
        # A registry of workers of its own: what runs here is not this user's.
        self.environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "XDG_STATE_HOME": str(folder / "state")
        }  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start and wait until every worker takes work."""
        command = [sys.executable, "-m", "llorch", "up", "--model", "demo", "--workers", str(self.workers)]
        command += ["--port", str(self.port), "--data-dir", str(self.data_dir), "--ready-file", str(self.ready_file)]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.extra],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=self.environment,
            )
        try:
            self._await_ready(self.process)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
            self.process = None
            raise

    def _await_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        # The file of an earlier start is removed first thing, so what is read here was written by this one.
        while not (parts := self.parts()) or not alive(parts["orchestratord"]["pid"]):
            if process.poll() is not None:
                raise AssertionError(f"llorch up ended with {process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"llorch up wasn't ready within {START_DEADLINE_S} s:\n{self.tail()}")
            time.sleep(0.05)

    def parts(self) -> dict[str, Any]:
        """The ready file, {} while there is none."""
        try:
            return json.loads(self.ready_file.read_text())
        except FileNotFoundError:
            return {}

    def pids(self) -> list[int]:
        parts = self.parts()
        return [parts["orchestratord"]["pid"], parts["redis"]["pid"], *(w["pid"] for w in parts["workers"])]

    async def kill_and_wait_restarted(self, part: str) -> None:
        """SIGKILL one part and wait until `up` has written its successor's pid."""
        before = self._part(part)["pid"]
        os.kill(before, signal.SIGKILL)
        async with asyncio.timeout(60):
            while not self.parts() or self._part(part)["pid"] == before:
                await asyncio.sleep(0.02)

    def _part(self, name: str) -> dict[str, Any]:
        parts = self.parts()
        return parts["workers"][int(name.removeprefix("worker"))] if name.startswith("worker") else parts[name]

    def kill_everything(self) -> None:
        """SIGKILL to the whole process group, `up` and Redis included, and wait until all are gone."""
        assert self.process is not None
        pids = self.pids()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        wait_gone(pids)
        self.process = None

    def stop(self) -> None:
        """SIGTERM as Ctrl-C would; everything must be gone afterwards."""
        if self.process is None:
            return
        pids = self.pids() if self.parts() else []
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(30)
                raise AssertionError(f"llorch up didn't stop within 60 s:\n{self.tail()}") from None
            finally:
                self.process = None
        wait_gone(pids)

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie doesn't)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_gone(pids: list[int], deadline_s: float = 15.0) -> None:
    deadline = time.monotonic() + deadline_s
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.02)


async def post_task(session: aiohttp.ClientSession, url: str, **body: Any) -> dict[str, Any]:
    """POST /v2/tasks; fails the test unless it is accepted."""
    async with session.post(f"{url}/v2/tasks", json={"model": "demo", **body}) as reply:
        answer = await reply.json()
        assert reply.status == 202, answer
        assert reply.headers["Location"] == f"/v2/tasks/{answer['task_id']}"
        return answer


async def read_events(
    session: aiohttp.ClientSession, url: str, task_id: str, after: str | None = None
) -> AsyncIterator[SseFrame]:
    """Events of one connection, until it ends."""
    headers = {} if after is None else {"Last-Event-ID": after}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=30)
    async with session.get(f"{url}/v2/tasks/{task_id}/events", headers=headers, timeout=timeout) as reply:
        if reply.status == 503:  # Redis is just being restarted: a client waits and comes back
            raise aiohttp.ClientConnectionError(await reply.text())
        assert reply.status == 200, await reply.text()
        parser = SseParser()
        async for chunk in reply.content.iter_any():
            for event in parser.feed(chunk):
                yield event


class Transcript:
    """What one client holds of a task, checked as it comes: order, contiguous indices, one terminal event."""

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        self.cursor: str | None = None
        self.names: list[str] = []
        self.tokens: list[int] = []
        self.text = ""
        self.terminal: tuple[str, dict[str, Any]] | None = None
        self.reconnections = 0

    def take(self, event: SseFrame, previous_id: str | None) -> None:
        data = json.loads(event.data)
        assert self.terminal is None, f"{event.event} after the terminal event"
        self.names.append(event.event)
        if event.event == "token":
            assert data["i"] == len(self.tokens), f"token {data['i']} came where {len(self.tokens)} was due"
            self.tokens.append(data["id"])
            self.text += data["t"]
        elif event.event in ("end", "error"):
            self.terminal = (event.event, data)
        if event.id is not None and event.id != previous_id:
            self.cursor = event.id

    async def follow(self, session: aiohttp.ClientSession, url: str, deadline_s: float = 180) -> Transcript:
        """Read to the terminal event, reconnecting with Last-Event-ID whenever the connection breaks."""
        async with asyncio.timeout(deadline_s):
            while self.terminal is None:
                try:
                    async for event in read_events(session, url, self.task_id, self.cursor):
                        self.take(event, self.cursor)
                except (aiohttp.ClientError, TimeoutError, ConnectionError):
                    pass
                if self.terminal is None:
                    self.reconnections += 1
                    await asyncio.sleep(0.3)
        return self
