"""Keeps one engine process alive: starts it, waits for the model, watches it, says why it died, starts it again.

Read `Supervisor.run` first: start → loading → serving → death → pause. It must run in the main thread (see `launch`).

    status      starting ──ready──▶ ready ──death──▶ failed ──restart──▶ ready
                    └──load fails for good, or the first start breaks down too often──▶ failed, and stays so
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import structlog

from worker.engine.protocol import (
    AddSequence,
    EngineLoadFailed,
    EngineLoading,
    EngineReady,
    EngineStats,
    FromEngine,
    StepOutput,
)
from worker.engine_client import EngineClient
from worker.engine_death import USAGE_STATUS, Death, count_oom_kills, explain, restart_delay_s
from worker.launch import child_command, child_environment

HEALTHY_AFTER_S = 300.0
WATCH_INTERVAL_S = 0.25
PREFILL_S_PER_TOKEN = 0.02
EXIT_DEADLINE_S = 5.0
OUTPUT_DEADLINE_S = 1.0
MAX_BROKEN_STARTS = 6
"""Starts in a row that break down unexplained, in a worker whose engine never was ready, until it gives up."""
KEPT_LINES = 60
KEPT_LINE_BYTES = 4096
SHOWN_CHARS = 200
EngineState = Literal["starting", "ready", "failed"]


class EngineListener(Protocol):
    """Hears from the engine; everything on the event loop."""

    def engine_ready(self, instance_id: str, ready: EngineReady) -> None:
        """A new engine instance takes work."""
        ...

    def engine_step(self, output: StepOutput) -> None:
        """One step's output."""
        ...

    def engine_down(self, message: str) -> None:
        """The instance is gone, and everything in it."""
        ...

    def engine_state(self) -> None:
        """`state` or `detail` changed."""
        ...


class Supervisor:
    """Owns the engine process. `add` and `cancel` go to the current instance, if there is one."""

    def __init__(
        self,
        module: str,
        arguments: list[str],
        model_dir: Path,
        listener: EngineListener,
        clock: Callable[[], float],
        *,
        stall_timeout_s: float,
        load_timeout_s: float,
    ) -> None:
        self._module = module
        self._arguments = [*arguments, "--model-dir", str(model_dir)]
        self._listener = listener
        self._clock = clock
        self._stall_timeout_s = stall_timeout_s
        self._load_timeout_s = load_timeout_s
        self._log = structlog.get_logger("worker.supervisor")
        self._client: EngineClient | None = None
        self._load_failure: EngineLoadFailed | None = None
        self._ready_at: float | None = None
        self._last_words: deque[str] = deque(maxlen=KEPT_LINES)
        self._trouble: str | None = None
        self.state: EngineState = "starting"
        self.detail: str | None = "starting the engine"
        """Why it isn't ready, in words."""
        self.ready: EngineReady | None = None
        """What the last engine that came up said about itself."""
        self.stats = EngineStats()
        self.instance_id: str | None = None
        """Of the current or last instance; new at every start."""
        self.pid: int | None = None
        """Process id of the engine, while it lives."""
        self.restarts = 0

    async def run(self) -> EngineLoadFailed:
        """Keep an engine running until cancelled; returns only when loading failed for good."""
        deaths = broken_starts = 0
        while True:
            death = await self._live_once()
            failure = self._load_failure
            broken_starts = broken_starts + 1 if failure is None and self.ready is None and death.unexplained else 0
            if broken_starts >= MAX_BROKEN_STARTS:
                message = f"{broken_starts} starts in a row broke down, the last: {death.reason}; the log says more"
                failure = self._load_failure = EngineLoadFailed(code="INTERNAL", message=message, permanent=True)
            if failure is not None and failure.permanent:
                self._set_state("failed", failure.message)
                return failure
            healthy = self._ready_at is not None and self._clock() - self._ready_at >= HEALTHY_AFTER_S
            deaths = 1 if healthy else deaths + 1
            await self._pause(deaths, death.reason if failure is None else failure.message)

    def add(self, sequence: AddSequence) -> None:
        """Hand a sequence to the engine."""
        if self._client is not None:
            self._client.add(sequence)

    def cancel(self, sequence_id: str) -> None:
        """Stop a sequence in the engine."""
        if self._client is not None:
            self._client.cancel(sequence_id)

    async def _live_once(self) -> Death:
        """One engine process from its start to its end; why it ended."""
        self._load_failure = self._ready_at = None
        self._last_words.clear()
        self.stats = EngineStats()
        self.instance_id = str(uuid.uuid4())
        oom_kills = count_oom_kills()
        client = self._client = EngineClient(self._take, self._clock)
        try:
            process = await self._spawn(client)
        except OSError as error:
            self._client = None
            return Death(f"the engine can't be started: {error.strerror}", "INTERNAL")
        self.pid = process.pid
        try:
            async with asyncio.TaskGroup() as group:
                output = group.create_task(self._copy_output(process))
                await self._until_gone(client)
                returncode = await _end(process, at_once=client.failure is not None)
                await asyncio.wait([output], timeout=OUTPUT_DEADLINE_S)
                output.cancel()
        except asyncio.CancelledError:
            client.shut_down()
            raise
        finally:
            self._client = self.pid = None
            await _end(process, at_once=False)
            client.close()
        oom_kills = count_oom_kills() - oom_kills
        death = explain(returncode, self._last_words, oom_kills=oom_kills, connection_failure=client.failure)
        if returncode == USAGE_STATUS and self._ready_at is None and self._load_failure is None:
            self._load_failure = EngineLoadFailed(code="ENGINE_OPTIONS", message=death.reason, permanent=True)
        if death.unexplained and self._ready_at is None:
            death = death._replace(reason=f"{death.reason} while it started{self._last_line()}")
        self._mourn(death)
        return death

    def _last_line(self) -> str:
        """What the engine said last, to be shown only where it died before it took any work: no prompt stands there."""
        line = next((line.strip() for line in reversed(self._last_words) if line.strip()), "")
        return f" ({line[:SHOWN_CHARS]})" if line else ""

    async def _spawn(self, client: EngineClient) -> asyncio.subprocess.Process:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *child_command(self._module, "--fd", str(theirs.fileno()), *self._arguments),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=child_environment(os.environ),
            )
        await asyncio.get_running_loop().create_unix_connection(lambda: client, sock=ours)
        return process

    async def _until_gone(self, client: EngineClient) -> None:
        """Returns when the connection is closed, by the engine's end or because it took too long over something."""
        started_at = self._clock()
        while not client.closed.is_set() and self._load_failure is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_INTERVAL_S):
                    await client.closed.wait()
            now = self._clock()
            if self._ready_at is None and now - started_at > self._load_timeout_s:
                client.fail(f"loading the model took more than {self._load_timeout_s:.0f} s")
            elif client.silent_for(now, seconds_per_prompt_token=PREFILL_S_PER_TOKEN) > self._stall_timeout_s:
                client.fail(f"the engine gave no sign of life for {self._stall_timeout_s:.0f} s")

    def _take(self, message: FromEngine) -> None:
        match message:
            case StepOutput():
                self.stats = message.stats
                self._listener.engine_step(message)
            case EngineLoading():
                progress = f"{message.phase} ({message.fraction:.0%})"
                self._set_state(self.state, progress if self._trouble is None else f"{self._trouble}: {progress}")
            case EngineReady():
                self.ready = message
                self._ready_at = self._clock()
                self._trouble = None
                self._set_state("ready", None)
                assert self.instance_id is not None
                self._listener.engine_ready(self.instance_id, message)
            case EngineLoadFailed():
                self._load_failure = message

    def _mourn(self, death: Death) -> None:
        was_ready = self.state == "ready"
        self._log.error("engine down", reason=death.reason)
        self._set_state("failed", death.reason)
        if was_ready:
            self._listener.engine_down(f"the engine was restarted: {death.reason}")

    async def _pause(self, deaths: int, reason: str) -> None:
        delay_s = restart_delay_s(deaths)
        self.restarts += 1
        when = "starting it again" if delay_s == 0 else f"starting it again in {delay_s:.0f} s"
        self._trouble = f"{reason}; {when}"
        self._set_state("failed", self._trouble)
        await asyncio.sleep(delay_s)

    def _set_state(self, state: EngineState, detail: str | None) -> None:
        self.state, self.detail = state, detail
        self._listener.engine_state()

    async def _copy_output(self, process: asyncio.subprocess.Process) -> None:
        """Copy what the engine prints to our own stderr, and keep its last lines for the diagnosis."""
        assert process.stdout is not None
        rest = b""
        while chunk := await process.stdout.read(65536):
            with contextlib.suppress(OSError):  # our own log may have gone
                sys.stderr.buffer.write(chunk)
                sys.stderr.buffer.flush()
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[-KEPT_LINE_BYTES:]
            self._last_words.extend(line[-KEPT_LINE_BYTES:].decode(errors="replace") for line in lines)
        self._last_words.append(rest.decode(errors="replace"))


async def _end(process: asyncio.subprocess.Process, *, at_once: bool) -> int | None:
    """Wait for a process that should be ending, and kill it when it doesn't; its status, None if it was killed here."""
    if not at_once:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_DEADLINE_S):
                return await process.wait()
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
    return None
