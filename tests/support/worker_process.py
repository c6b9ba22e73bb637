"""A real llorch-worker process for tests: started, talked to, killed and reaped."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp

from llorch_wire.sse import SseFrame, SseParser
from tests.support import tokenizers as small

START_DEADLINE_S = 120.0
ROOT = Path(__file__).resolve().parents[2]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' and m.content == 'refuse' %}{{ raise_exception('no such talk') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def scripted_model(folder: Path, *, template: str | None = CHAT_TEMPLATE, **script: Any) -> Path:
    """A model folder for the scripted engine: the tests' byte-level tokenizer and no real weights."""
    folder.mkdir(parents=True, exist_ok=True)
    small.byte_level().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (folder / "scripted.json").write_text(json.dumps(script))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


class WorkerProcess:
    """One llorch-worker on a free port. Flags are as on its command line."""

    def __init__(self, folder: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ready_file = folder / "ready.json"
        self.log_file = folder / "worker.log"
        self.flags = flags
        self.env = env or {}
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    @classmethod
    def scripted(cls, folder: Path, model: Path, *flags: str, env: dict[str, str] | None = None) -> WorkerProcess:
        """A worker over the scripted engine."""
        engine = ("--engine", "tests.support.scripted_engine_process", "--model", str(model))
        return cls(folder, *engine, *flags, env=env)

    def spawn(self) -> None:
        """Start without waiting."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LLORCH_")}
        environment |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONPATH": str(ROOT), **self.env}
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "worker", "--ready-file", str(self.ready_file), *self.flags],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=self.log_file.parent,
            )

    async def start(self) -> WorkerProcess:
        """Start and wait until it takes work."""
        await asyncio.to_thread(self.spawn)
        await self.until(lambda: self.ready_file.exists(), "the ready file", START_DEADLINE_S)
        self.url = self.ready()["url"]
        return self

    def ready(self) -> dict[str, Any]:
        """The ready file."""
        return json.loads(self.ready_file.read_text())

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def children(self) -> list[int]:
        """Process ids of its children (engine, template process)."""
        return children_of(self.pid)

    def engine_pid(self) -> int:
        """Process id of its engine."""
        for pid in self.children():
            if b"--fd" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise AssertionError("no engine process")

    async def until(self, condition: Callable[[], bool], what: str, deadline_s: float = 30.0) -> None:
        """Wait for a condition; fails with the log's tail."""
        deadline = time.monotonic() + deadline_s
        while not condition():
            assert self.process is not None
            if self.process.poll() is not None and not condition():
                raise AssertionError(f"{what}: the worker ended with {self.process.returncode}:\n{self.tail()}")
            assert time.monotonic() < deadline, f"{what} didn't come within {deadline_s} s:\n{self.tail()}"
            await asyncio.sleep(0.02)

    async def wait(self, deadline_s: float = 40.0) -> int:
        """Its exit status once it has ended."""
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, deadline_s)

    async def stop(self) -> int:
        """SIGTERM, then the exit status; nothing of it is left."""
        assert self.process is not None
        children = self.children() if self.process.poll() is None else []
        if self.process.poll() is None:
            self.process.terminate()
        try:
            status = await self.wait()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
            raise AssertionError(f"SIGTERM didn't end it:\n{self.tail()}") from None
        await until_gone(children)
        return status

    def kill(self) -> None:
        """SIGKILL to the HTTP process."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def tail(self, lines: int = 40) -> str:
        """End of its log."""
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])


def children_of(pid: int) -> list[int]:
    """Living child processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie doesn't)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until_gone(pids: list[int], deadline_s: float = 15.0) -> None:
    """Wait until none of these processes runs."""
    deadline = time.monotonic() + deadline_s
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        await asyncio.sleep(0.02)


class Stream:
    """What one connection to /execute got."""

    def __init__(self) -> None:
        self.status = 0
        self.refusal: dict[str, Any] = {}
        self.headers: Mapping[str, str] = {}  # aiohttp's, which ignores case
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.num_bytes = 0

    def take(self, event: SseFrame) -> None:
        self.events.append((event.event, json.loads(event.data)))

    @property
    def started(self) -> dict[str, Any]:
        assert self.events and self.events[0][0] == "started", self.events[:1]
        return self.events[0][1]

    @property
    def tokens(self) -> list[dict[str, Any]]:
        return [data for name, data in self.events if name == "token"]

    @property
    def ids(self) -> list[int]:
        return [token["id"] for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token["t"] for token in self.tokens)

    @property
    def terminal(self) -> tuple[str, dict[str, Any]]:
        name, data = self.events[-1]
        assert name in ("end", "error", "preempted"), f"the stream ended with {name}"
        return name, data

    @property
    def end(self) -> dict[str, Any]:
        name, data = self.terminal
        assert name == "end", (name, data)
        return data

    def check(self, first_index: int = 0) -> None:
        """Order of events: started, contiguous tokens, one terminal event."""
        names = [name for name, _ in self.events if name != "metrics"]
        assert names[0] == "started"
        assert names[1:-1] == ["token"] * (len(names) - 2)
        assert names[-1] in ("end", "error", "preempted")
        assert [token["i"] for token in self.tokens] == list(range(first_index, first_index + len(self.tokens)))


def request(**fields: Any) -> dict[str, Any]:
    """Body for /execute with a new task id."""
    body = {"task_id": str(uuid4()), "attempt": 1, "seed": 1, "max_tokens": 16}
    if not any(name in fields for name in ("prompt", "messages", "prompt_token_ids", "attach_instance_id")):
        body["prompt"] = "hello"
    return {**body, **fields}


async def execute(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any] | bytes,
    *,
    after: int | None = None,
    stop_after: int | None = None,
    on_event: Callable[[str, dict[str, Any]], None] | None = None,
) -> Stream:
    """POST /execute and read to the end, or drop the connection once `stop_after` tokens came."""
    stream = Stream()
    query = "" if after is None else f"?after={after}"
    timeout = aiohttp.ClientTimeout(total=120, sock_read=30)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with session.post(f"{url}/execute{query}", data=data, timeout=timeout) as reply:
        stream.status, stream.headers = reply.status, reply.headers
        if reply.status != 200:
            stream.refusal = await reply.json()
            return stream
        parser = SseParser()
        async for chunk in reply.content.iter_any():
            stream.num_bytes += len(chunk)
            for event in parser.feed(chunk):
                stream.take(event)
                if on_event is not None:
                    on_event(*stream.events[-1])
            if stop_after is not None and len(stream.tokens) >= stop_after:
                reply.close()
                break
    return stream


async def post(session: aiohttp.ClientSession, url: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """POST JSON; status and answer."""
    async with session.post(url + path, json=body) as reply:
        return reply.status, await reply.json()


async def health(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """GET /health."""
    async with session.get(f"{url}/health") as reply:
        assert reply.status == 200
        return await reply.json()


async def until_health(
    session: aiohttp.ClientSession, url: str, condition: Callable[[dict[str, Any]], bool], deadline_s: float = 30.0
) -> dict[str, Any]:
    """Poll /health until it says so."""
    deadline = time.monotonic() + deadline_s
    while not condition(state := await health(session, url)):
        assert time.monotonic() < deadline, f"not within {deadline_s} s; last: {state}"
        await asyncio.sleep(0.02)
    return state
