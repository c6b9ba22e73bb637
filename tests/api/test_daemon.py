"""The program itself: starts, says so, stops, embeds its Redis, keeps its keys to itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llorch_wire.sse import SseParser
from tests.api.daemon import DEADLINE_S, ROOT
from tests.support.redis_server import redis_server
from tests.support.scripted_worker import ScriptedWorker

API_KEY, WORKER_KEY = "client-key-123456", "worker-key-123456"


def redis_pids(folder: Path) -> list[int]:
    """Redis servers that work in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                is_ours = str(folder / "data") in (entry / "cmdline").read_bytes().decode()
                if is_ours and "server" in (entry / "comm").read_text():
                    found.append(int(entry.name))
    return found


async def gone(folder: Path) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while redis_pids(folder):
            await asyncio.sleep(0.02)


async def test_it_starts_serves_and_stops(start: Callable[..., Any]) -> None:
    daemon = await start()
    assert len(redis_pids(daemon.folder)) == 1
    async with aiohttp.ClientSession() as http, http.get(f"{daemon.url}/ready") as reply:
        assert reply.status == 200
    assert await daemon.stop() == 0, daemon.log()
    assert not daemon.ready_file.exists()
    await gone(daemon.folder)
    lines = [json.loads(line) for line in daemon.log().splitlines()]
    assert [line["event"] for line in lines if line["event"] in ("starting", "ready", "stopping", "stopped")]
    assert all({"level", "timestamp"} <= set(line) for line in lines)


async def test_a_second_signal_ends_it_at_once_and_redis_with_it(start: Callable[..., Any]) -> None:
    daemon = await start()
    assert daemon.process is not None
    os.kill(redis_pids(daemon.folder)[0], signal.SIGSTOP)  # a graceful stop would have to wait for it
    daemon.process.send_signal(signal.SIGINT)
    async with asyncio.timeout(DEADLINE_S):
        while "stopping" not in daemon.log():
            await asyncio.sleep(0.01)
    daemon.process.send_signal(signal.SIGINT)
    assert await daemon.ended() == 130
    await gone(daemon.folder)


async def test_requests_that_wait_for_redis_are_answered_before_a_graceful_stop(start: Callable[..., Any]) -> None:
    """They were cut off without an answer, each with a traceback in the log."""
    with redis_server() as redis:
        daemon = await start("--redis-url", redis.url, "--drain-timeout-ms", "500")
        sent = asyncio.Semaphore(0)
        trace = aiohttp.TraceConfig()
        trace.on_request_chunk_sent.append(_counts(sent))
        async with aiohttp.ClientSession(trace_configs=[trace]) as http:
            redis.pause()
            try:
                body = {"model": "m", "prompt": "hello"}
                waiting = [asyncio.create_task(_status(http, f"{daemon.url}/v2/tasks", body)) for _ in range(3)]
                for _ in waiting:
                    await asyncio.wait_for(sent.acquire(), DEADLINE_S)
                async with http.get(f"{daemon.url}/health") as reply:  # behind them
                    assert reply.status == 200
                assert await daemon.stop() == 0, daemon.log()
                assert await asyncio.gather(*waiting) == [503, 503, 503]
            finally:
                redis.resume()
    assert "error" not in {json.loads(line)["level"] for line in daemon.log().splitlines()}, daemon.log()


async def test_a_full_embedded_redis_refuses_with_503_and_takes_tasks_again(start: Callable[..., Any]) -> None:
    daemon = await start("--redis-memory-mb", "16")
    registration = {
        "worker_id": "w", "instance_id": "i", "url": "http://127.0.0.1:9", "model": "m", "model_digest": "d",
        "dtype": "float32", "device": "cpu", "context_length": 10, "slots_total": 1,
    }  # fmt: skip
    body = {"model": "m", "prompt": "x" * 1_000_000, "placement": {"mode": "pin", "pin_worker": "nobody"}}
    ids: list[str] = []
    async with aiohttp.ClientSession() as http:
        async with http.post(f"{daemon.url}/v2/workers/register", json=registration) as reply:
            assert reply.status == 200
        while True:
            async with http.post(f"{daemon.url}/v2/tasks", json=body) as reply:
                answer = await reply.json()
                if reply.status != 202:
                    break
                ids.append(answer["task_id"])
        assert (reply.status, answer["error"]["code"]) == (503, "STORE_UNAVAILABLE")
        assert int(reply.headers["Retry-After"]) >= 1 and 5 < len(ids) < 16
        for task_id in ids[2:]:
            async with http.delete(f"{daemon.url}/v2/tasks/{task_id}") as reply:
                assert reply.status == 200
        async with asyncio.timeout(DEADLINE_S):
            while await _status(http, f"{daemon.url}/v2/tasks", body) != 202:
                await asyncio.sleep(0.1)
    assert await daemon.stop() == 0, daemon.log()


def _counts(sent: asyncio.Semaphore) -> Any:
    async def count(*_: Any) -> None:
        sent.release()

    return count


async def _status(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> int:
    async with http.post(url, json=body) as reply:
        return reply.status


async def test_tasks_survive_sigkill_and_streams_end_at_a_graceful_stop(start: Callable[..., Any]) -> None:
    daemon = await start()
    body = {"model": "scripted", "prompt": "hello", "max_tokens": 400, "seed": 3, "ignore_eos": True}
    async with aiohttp.ClientSession() as http:
        worker = ScriptedWorker([daemon.url], "w1", token_ms=10)
        await worker.start()
        try:
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    async with http.post(f"{daemon.url}/v2/tasks", json=body) as reply:
                        if reply.status == 202:
                            task = await reply.json()
                            break
                    await asyncio.sleep(0.05)
            async with http.get(daemon.url + task["events_url"]) as reply:
                frames, cursor = await read_until(reply, "token")
                assert await daemon.stop() == 0, daemon.log()
                rest = await read_to_end(reply)
            seen = [frame for frame in [*frames, *rest] if frame.id]
            assert seen[-1].event == "token", "the stream ended without a terminal event: the client resumes"
            cursor = seen[-1].id
            port = daemon.url.rpartition(":")[2]
            again = await start("--port", port)
            async with http.get(again.url + task["events_url"], headers={"Last-Event-ID": cursor}) as reply:
                assert reply.status == 200
                later = [frame for frame in await read_to_end(reply) if frame.id]
        finally:
            await worker.die()
    indexes = [json.loads(frame.data)["i"] for frame in [*seen, *later] if frame.event == "token"]
    assert indexes == list(range(400)), "no gap, no repeat"
    assert later[-1].event == "end"
    computed = worker.computed_ranges() if hasattr(worker, "computed_ranges") else []
    assert sum(end - first for _, _, first, end in computed) in (0, 400), "no token was computed twice"


async def read_until(reply: aiohttp.ClientResponse, event: str) -> tuple[list[Any], str]:
    parser = SseParser()
    frames: list[Any] = []
    async for chunk in reply.content.iter_any():
        frames += parser.feed(chunk)
        if frames and frames[-1].event == event:
            return frames, frames[-1].id
    raise AssertionError(frames)


async def read_to_end(reply: aiohttp.ClientResponse) -> list[Any]:
    parser = SseParser()
    frames: list[Any] = []
    async with asyncio.timeout(DEADLINE_S):
        async for chunk in reply.content.iter_any():
            frames += parser.feed(chunk)
    return frames


async def test_keys_appear_nowhere(start: Callable[..., Any]) -> None:
    env = {"LLORCH_API_KEYS": f"acme={API_KEY}", "LLORCH_WORKER_KEY": WORKER_KEY, "LLORCH_LOG_LEVEL": "debug"}
    daemon = await start(env=env)
    prompt = "a prompt that nobody else may read"
    async with aiohttp.ClientSession() as http:
        for key in (API_KEY, WORKER_KEY, "wrong-key-123456"):
            headers = {"Authorization": f"Bearer {key}"}
            for path in ("/v2/tasks", "/v1/chat/completions"):
                body = {"model": "m", "prompt": prompt, "messages": [{"role": "user", "content": prompt}]}
                async with http.post(daemon.url + path, json=body, headers=headers) as reply:
                    text = await reply.text()
                    assert prompt not in text and key not in text
            async with http.get(f"{daemon.url}/metrics", headers=headers) as reply:
                assert key not in await reply.text()
    assert daemon.process is not None
    command_line = Path(f"/proc/{daemon.process.pid}/cmdline").read_bytes().decode()
    assert await daemon.stop() == 0
    for secret in (API_KEY, WORKER_KEY, prompt, "wrong-key-123456"):
        assert secret not in daemon.log() and secret not in command_line


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--host", "0.0.0.0"], 2, "LLORCH_API_KEYS and LLORCH_WORKER_KEY"),
        (["--redis-url", "mysql://x"], 1, "redis://"),
        (["--host", "203.0.113.7"], 2, "LLORCH_API_KEYS"),
        (["--port", "banana"], 2, "--port"),
        (["--what"], 2, "--what"),
    ],
)
def test_what_can_not_work_is_refused_with_the_way_out(
    tmp_path: Path, flags: list[str], status: int, says: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    done = subprocess.run(
        [sys.executable, "-m", "orchestratord", "--data-dir", str(tmp_path / "data"), *flags],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, env={**environment, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, says in done.stderr) == (status, True), done.stderr
    assert "Traceback" not in done.stderr


async def test_a_port_in_use_is_said(start: Callable[..., Any]) -> None:
    daemon = await start()
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "orchestratord", "--port", daemon.url.rpartition(":")[2], "--data-dir", "other"],
        capture_output=True, text=True, timeout=60, cwd=daemon.folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2 and "can't be bound" in done.stderr and "--port" in done.stderr
