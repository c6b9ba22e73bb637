"""Starts that break down: how often they are tried, and what is said meanwhile. The engine is a scripted process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.worker_process import scripted_model
from worker import supervisor
from worker.engine.protocol import EngineReady, StepOutput
from worker.supervisor import MAX_BROKEN_STARTS, Supervisor


class Listener:
    """Notes every state with its detail."""

    def __init__(self) -> None:
        self.supervisor: Supervisor | None = None
        self.states: list[tuple[str, str | None]] = []

    def engine_ready(self, instance_id: str, ready: EngineReady) -> None: ...

    def engine_step(self, output: StepOutput) -> None: ...

    def engine_down(self, message: str) -> None: ...

    def engine_state(self) -> None:
        assert self.supervisor is not None
        self.states.append((self.supervisor.state, self.supervisor.detail))


def _at_once(_deaths: int) -> float:
    return 0.0


def supervise(folder: Path, monkeypatch: pytest.MonkeyPatch, **script: Any) -> tuple[Supervisor, Listener]:
    monkeypatch.setattr(supervisor, "restart_delay_s", _at_once)
    listener = Listener()
    clock = asyncio.get_running_loop().time
    made = listener.supervisor = Supervisor(
        "tests.support.scripted_engine_process",
        [],
        scripted_model(folder, **script),
        listener,
        clock,
        stall_timeout_s=30,
        load_timeout_s=30,
    )
    return made, listener


@pytest.mark.parametrize(
    ("load", "words"),
    [("raise", "ended with status 1 while it started (RuntimeError: no such kernel)"), ("die", "killed by SIGABRT")],
)
async def test_starts_that_always_break_down_end_some_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: str, words: str
) -> None:
    made, listener = supervise(tmp_path, monkeypatch, load=load)
    async with asyncio.timeout(60):
        failure = await made.run()
    assert failure.permanent
    assert failure.message.startswith(f"{MAX_BROKEN_STARTS} starts in a row") and words in failure.message
    assert (made.state, made.detail, made.restarts) == ("failed", failure.message, MAX_BROKEN_STARTS - 1)
    between = [detail for state, detail in listener.states if state == "failed" and "starting it again" in str(detail)]
    assert len(between) >= MAX_BROKEN_STARTS - 1
    assert all(words in str(detail) for detail in between), "the reason is told while it is tried again"


async def test_one_that_was_ready_before_is_started_again_however_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = supervise(tmp_path, monkeypatch, load="ok")
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        running = group.create_task(made.run())
        await until(lambda: made.state == "ready")
        scripted_model(tmp_path, load="raise")
        process = made.pid
        assert process is not None
        os.kill(process, signal.SIGKILL)
        await until(lambda: made.restarts > MAX_BROKEN_STARTS + 1)
        assert not running.done()
        scripted_model(tmp_path, load="ok")
        await until(lambda: made.state == "ready")
        running.cancel()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)
