"""How a worker takes leave of an orchestrator: also in a hurry, and never longer than a moment."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.support.worker_process import WorkerProcess, post, scripted_model


class Orchestrator:
    """What a worker says to it, in order; `hangs` leaves everything after that unanswered."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.url = ""
        self.hangs = False
        self._over = asyncio.Event()
        app = web.Application()
        app.router.add_route("*", "/v2/workers/{tail:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)

    async def start(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        self._over.set()
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        status = json.loads(body).get("status", "") if body else ""
        self.heard.append(f"{request.method} {request.match_info['tail']} {status}".strip())
        if self.hangs:
            await self._over.wait()
        return web.json_response({"lease_ms": 4000, "heartbeat_ms": 50, "replicas": [self.url], "orders": {}})


async def ended(tmp_path: Path, hurry: Any, *, hangs: bool = False) -> tuple[int, list[str], str]:
    """Exit status, what the orchestrator heard from the end on, and the log of a worker that `hurry` ends."""
    house = Orchestrator()
    await house.start()
    model = scripted_model(tmp_path / "model", slots=2)
    worker = WorkerProcess.scripted(tmp_path, model, "--worker-id", "w1", "--orchestrator", house.url)
    try:
        await worker.start()
        await worker.until(lambda: "POST w1/heartbeat ready" in house.heard, "a heartbeat")
        house.hangs = hangs
        house.heard.clear()
        process = worker.process
        assert process is not None
        await hurry(worker, process)
        status = await worker.wait(20.0)
        return status, house.heard, worker.log_file.read_text()
    finally:
        await house.stop()
        await worker.stop()


async def two_signals(_: WorkerProcess, process: Any) -> None:
    process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.2)  # as llorch-pool does: sent at once, both would be delivered as one
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)


async def for_good_at_once(worker: WorkerProcess, process: Any) -> None:
    """What `llorch worker stop --grace 0` does."""
    async with aiohttp.ClientSession() as session:
        assert (await post(session, worker.url, "/shutdown", {}))[0] < 300
    process.send_signal(signal.SIGTERM)


async def test_one_that_ends_for_good_is_taken_off_the_list_in_a_hurry_too(tmp_path: Path) -> None:
    status, heard, log = await ended(tmp_path, for_good_at_once)
    assert status == 0, log
    assert heard[-2:] == ["POST w1/heartbeat draining", "DELETE w1"]


@pytest.mark.parametrize("hurry", [two_signals, for_good_at_once])
async def test_an_orchestrator_that_hangs_holds_nobody(tmp_path: Path, hurry: Any) -> None:
    status, heard, log = await ended(tmp_path, hurry, hangs=True)
    assert status == 0 and "Traceback" not in log, log
    assert "POST w1/heartbeat draining" in heard
