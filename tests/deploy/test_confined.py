"""The programs work under what their units forbid: system calls, address families, capabilities, a read-only system."""

from __future__ import annotations

import asyncio
import ctypes.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import pytest

from llorch_wire.sse import SseParser
from tests.deploy.units import ROOT, UNITS, Unit, read_env_file

pytestmark = pytest.mark.e2e

CLIENT_KEY, WORKER_KEY = "client-key-0123456789", "worker-key-0123456789"
START_S, TASK_S = 120.0, 60.0


class Service:
    """One unit's program as systemd would start it, but for what only systemd can do."""

    def __init__(self, folder: Path, unit: str, env: dict[str, str], *flags: str) -> None:
        self.unit = Unit(UNITS / unit)
        self.folder = folder
        folders = {"S": folder / "state", "C": folder / "cache", "t": folder / "run"}
        self.specifiers = {name: str(path) for name, path in folders.items()} | {"H": "box", "i": "chat"}
        self.ready_file = Path(self._flag("--ready-file"))
        self.ready_file.parent.mkdir(parents=True)
        working = Path(self._expand(self.unit.value("WorkingDirectory")))
        working.mkdir(parents=True)
        self.log = folder / "log"
        command = self.unit.command(self.specifiers)
        program = Path(sys.executable).parent / Path(command[0]).name
        confine = [sys.executable, str(ROOT / "tests/deploy/confine.py"), str(self.unit.path)]
        writable = ["/tmp", *map(str, (folder / "state", folder / "cache", folder / "run"))]
        for path in (folder / "state", folder / "cache"):
            path.mkdir(exist_ok=True)
        environ = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*confine, *writable, "--", str(program), *command[1:], *flags],
                env={**environ, **self.unit.environment(self.specifiers), **env},
                cwd=working,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _expand(self, text: str) -> str:
        for name, value in self.specifiers.items():
            text = text.replace(f"%{name}", value)
        return text

    def _flag(self, name: str) -> str:
        command = self.unit.command(self.specifiers)
        return command[command.index(name) + 1]

    async def ready(self) -> dict[str, Any]:
        """What the ready file says."""
        async with asyncio.timeout(START_S):
            while not self.ready_file.exists():
                assert self.process.poll() is None, self.log.read_text(errors="replace")
                await asyncio.sleep(0.05)
        return json.loads(self.ready_file.read_text())

    async def stop(self) -> int:
        """SIGTERM; the exit status, which must come before systemd would lose patience."""
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(float(self.unit.value("TimeoutStopSec"))):
            while (status := self.process.poll()) is None:
                await asyncio.sleep(0.02)
        return status

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


@pytest.fixture
async def service(tmp_path: Path, missing_service: Callable[[str], NoReturn]) -> AsyncIterator[Callable[..., Service]]:
    if shutil.which("systemd-analyze") is None or ctypes.util.find_library("seccomp") is None:
        missing_service("systemd-analyze and libseccomp (apt-get install systemd)")
    begun: list[Service] = []

    def begin(name: str, *arguments: Any) -> Service:
        (tmp_path / name).mkdir()
        begun.append(Service(tmp_path / name, *arguments))
        return begun[-1]

    yield begin
    for one in reversed(begun):
        one.kill()


async def test_a_task_runs_on_confined_programs(service: Callable[..., Service]) -> None:
    keys = {"LLORCH_API_KEYS": f"acme={CLIENT_KEY}", "LLORCH_WORKER_KEY": WORKER_KEY}
    place = {"LLORCH_HOST": "127.0.0.1", "LLORCH_PORT": "0"}
    sample = read_env_file(UNITS / "orchestratord.env")
    orchestrator = service("o", "orchestratord.service", sample | keys | place)
    url = (await orchestrator.ready())["url"]

    sample = read_env_file(UNITS / "worker.env") | read_env_file(UNITS / "worker-chat.env")
    place = {"LLORCH_ORCHESTRATOR": url, "LLORCH_WORKER_HOST": "127.0.0.1", "LLORCH_WORKER_KEY": WORKER_KEY}
    worker = service("w", "llorch-worker@.service", sample | place, "--device", "cpu")
    assert (await worker.ready())["worker_id"] == "box-chat"

    headers = {"Authorization": f"Bearer {CLIENT_KEY}", "Accept": "text/event-stream"}
    body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 24, "seed": 1, "ignore_eos": True}
    async with aiohttp.ClientSession(headers=headers) as http, asyncio.timeout(TASK_S):
        await registered(http, url)
        async with http.post(f"{url}/v2/tasks", json=body) as reply:
            assert reply.status in (200, 202), await reply.text()
            parser = SseParser()
            frames = [frame async for chunk in reply.content.iter_any() for frame in parser.feed(chunk)]
    names = [frame.event for frame in frames]
    assert names.count("token") == 24 and names[-1] == "end", names

    assert await worker.stop() == 0, worker.log.read_text(errors="replace")
    assert await orchestrator.stop() == 0, orchestrator.log.read_text(errors="replace")
    logs = orchestrator.log.read_text(errors="replace") + worker.log.read_text(errors="replace")
    assert CLIENT_KEY not in logs and WORKER_KEY not in logs


async def registered(http: aiohttp.ClientSession, url: str) -> None:
    """Wait until a worker has registered; its ready file says that it serves, not that it is known."""
    while True:
        async with http.get(f"{url}/v1/models") as reply:
            if (await reply.json())["data"]:
                return
        await asyncio.sleep(0.05)
