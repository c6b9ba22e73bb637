"""Engine death, stalls, load failures, drains and stops, with real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import aiohttp
import pytest

from tests.support.scripted_engine_process import CRASH, GARBAGE, STALL, token_at
from tests.support.worker_process import (
    WorkerProcess,
    alive,
    children_of,
    execute,
    health,
    post,
    request,
    scripted_model,
    until_gone,
    until_health,
)


async def started(folder: Path, *flags: str, **script: object) -> WorkerProcess:
    model = scripted_model(folder / "model", **script)
    return await WorkerProcess.scripted(folder, model, *flags).start()


async def test_kill_9_of_the_engine_under_load(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    worker = await started(tmp_path, step_ms=5)
    try:
        before = worker.ready()
        bodies = [request(seed=n, max_tokens=250) for n in range(4)]
        running = [asyncio.create_task(execute(session, worker.url, body)) for body in bodies]
        await until_health(session, worker.url, lambda state: state["slots_free"] == 0)
        engine = worker.engine_pid()
        os.kill(engine, signal.SIGKILL)
        streams = await asyncio.gather(*running)
        for number, stream in enumerate(streams):
            stream.check()
            name, data = stream.terminal
            assert (name, data["code"], data["retriable"]) == ("error", "INTERNAL", True)
            assert "SIGKILL" in data["message"]
            assert stream.ids == [token_at(number, index) for index in range(len(stream.ids))]
        state = await until_health(session, worker.url, lambda state: state["status"] == "ready")
        assert state["engine_restarts"] == 1
        assert state["instance_id"] != before["instance_id"]
        await worker.until(lambda: worker.ready()["instance_id"] == state["instance_id"], "the new ready file")
        assert worker.ready()["pid"] == before["pid"]
        assert not alive(engine)
        assert (await execute(session, worker.url, request())).end["tokens_out"] == 16
        # What the dead instance had made can still be fetched under its name.
        attach = {"task_id": bodies[0]["task_id"], "attempt": 1, "attach_instance_id": before["instance_id"]}
        assert (await execute(session, worker.url, attach)).ids == streams[0].ids
    finally:
        assert await worker.stop() == 0


async def test_kill_9_of_the_http_process_leaves_nothing(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    worker = await started(tmp_path)
    await execute(session, worker.url, request(messages=[{"role": "user", "content": "hi"}]))
    children = worker.children()
    assert len(children) == 2, "the engine and the template process"
    worker.kill()
    await until_gone(children)


@pytest.mark.parametrize("seed", [CRASH, GARBAGE, STALL])
async def test_a_sick_engine_is_replaced(tmp_path: Path, session: aiohttp.ClientSession, seed: int) -> None:
    worker = await started(tmp_path, "--engine-stall-timeout", "1")
    try:
        stream = await execute(session, worker.url, request(seed=seed))
        stream.check()
        name, data = stream.terminal
        assert (name, data["retriable"]) == ("error", True)
        assert len(stream.tokens) == 2
        state = await until_health(session, worker.url, lambda state: state["status"] == "ready")
        assert state["engine_restarts"] == 1
        assert (await execute(session, worker.url, request())).end["tokens_out"] == 16
    finally:
        assert await worker.stop() == 0


async def test_health_says_why_while_the_engine_is_gone(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    worker = await started(tmp_path)
    try:
        # From now on it hangs while loading.
        scripted_model(tmp_path / "model", load="hang")
        os.kill(worker.engine_pid(), signal.SIGKILL)
        state = await until_health(
            session, worker.url, lambda state: state["status"] == "failed" and "reading" in (state["detail"] or "")
        )
        assert "SIGKILL" in state["detail"]
        assert state["slots_free"] == 0
        refused = await execute(session, worker.url, request())
        assert (refused.status, refused.refusal["code"]) == (503, "FAILED")
    finally:
        assert await worker.stop() == 0


async def test_a_model_that_cant_be_loaded_ends_the_worker(tmp_path: Path) -> None:
    model = scripted_model(tmp_path / "model", load="permanent")
    worker = WorkerProcess.scripted(tmp_path, model)
    await asyncio.to_thread(worker.spawn)
    assert await worker.wait() == 1
    assert "download the model again" in worker.tail()
    assert not worker.ready_file.exists()


async def test_or_it_stays_and_says_so(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    model = scripted_model(tmp_path / "model", load="permanent")
    port = free_port()
    worker = WorkerProcess.scripted(tmp_path, model, "--stay-on-load-failure", "--port", str(port))
    await asyncio.to_thread(worker.spawn)
    url = f"http://127.0.0.1:{port}"
    try:
        await until_answering(session, url)
        state = await until_health(session, url, lambda state: state["status"] == "failed")
        assert "download the model again" in state["detail"]
        assert state["engine_restarts"] == 0, "it isn't tried again"
        refused = await execute(session, url, request())
        assert (refused.status, refused.refusal["code"]) == (503, "FAILED")
    finally:
        assert await worker.stop() == 0


async def test_an_engine_that_refuses_its_options_isnt_tried_again(tmp_path: Path) -> None:
    model = scripted_model(tmp_path / "model", load="usage")
    worker = WorkerProcess.scripted(tmp_path, model)
    await asyncio.to_thread(worker.spawn)
    assert await worker.wait() == 1
    assert "doesn't take one of its options" in worker.tail()


@pytest.mark.parametrize("how", ["transient", "die", "hang"])
async def test_a_load_that_may_work_later_is_tried_again(
    tmp_path: Path, session: aiohttp.ClientSession, how: str
) -> None:
    worker = await started(tmp_path, "--load-timeout", "8" if how == "hang" else "60", load=how, load_once=True)
    try:
        assert (await health(session, worker.url))["engine_restarts"] == 1
        assert (await execute(session, worker.url, request())).end["tokens_out"] == 16
    finally:
        assert await worker.stop() == 0


async def test_comments_come_while_the_engine_computes_for_long(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """The orchestrator takes 2.5 s without a byte for a stall, and a long prompt may take longer than that."""
    worker = await started(tmp_path, step_ms=3000)
    try:
        longest = 0.0
        comments = 0
        async with session.post(f"{worker.url}/execute", json=request(max_tokens=1)) as reply:
            last = time.monotonic()
            async for chunk in reply.content.iter_any():
                now = time.monotonic()
                longest, last = max(longest, now - last), now
                comments += chunk.count(b": keep-alive\n\n")
        assert comments >= 3
        assert longest < 2.5
    finally:
        assert await worker.stop() == 0


async def test_drain_refuses_new_work_and_lets_the_rest_end(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    worker = await started(tmp_path, step_ms=10)
    try:
        short, long = request(seed=1, max_tokens=20), request(seed=2, max_tokens=None)
        tasks = [asyncio.create_task(execute(session, worker.url, body)) for body in (short, long)]
        await until_health(session, worker.url, lambda state: state["slots_free"] == 2)
        status, state = await post(session, worker.url, "/drain", {"deadline_ms": 1000})
        assert (status, state["status"], state["slots_free"]) == (200, "draining", 0)
        refused = await execute(session, worker.url, request())
        assert (refused.status, refused.refusal["code"]) == (503, "DRAINING")
        assert "Retry-After" in refused.headers
        attached = await execute(session, worker.url, short)
        assert attached.end["tokens_out"] == 20
        ended, moved = await asyncio.gather(*tasks)
        assert ended.end["tokens_out"] == 20
        moved.check()
        assert moved.terminal == ("preempted", {"tokens_out": len(moved.tokens)})
        rest = {**long, "attempt": 2, "resume_token_ids": moved.ids}
        assert (await execute(session, worker.url, rest)).status == 503
        await post(session, worker.url, "/undrain", {})
        stream = await execute(session, worker.url, rest)
        assert moved.ids + stream.ids == [token_at(2, index) for index in range(255)]
    finally:
        assert await worker.stop() == 0


async def test_sigterm_waits_for_running_work_and_ends_with_0(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    worker = await started(tmp_path, step_ms=10)
    running = asyncio.create_task(execute(session, worker.url, request(max_tokens=100)))
    await until_health(session, worker.url, lambda state: state["slots_free"] == 3)
    assert await worker.stop() == 0
    assert (await running).end["tokens_out"] == 100
    assert not worker.ready_file.exists()


async def test_sigterm_moves_what_doesnt_end_in_time(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    worker = await started(tmp_path, "--drain-timeout", "0.3", step_ms=20)
    running = asyncio.create_task(execute(session, worker.url, request(max_tokens=None)))
    await until_health(session, worker.url, lambda state: state["slots_free"] == 3)
    assert await worker.stop() == 0
    stream = await running
    stream.check()
    assert stream.terminal[0] == "preempted"


async def test_a_second_signal_doesnt_wait(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    worker = await started(tmp_path, "--drain-timeout", "600", step_ms=50)
    running = asyncio.create_task(execute(session, worker.url, request(max_tokens=None)))
    await until_health(session, worker.url, lambda state: state["slots_free"] == 3)
    children = worker.children()
    os.kill(worker.pid, signal.SIGTERM)
    await until_health(session, worker.url, lambda state: state["status"] == "draining")
    os.kill(worker.pid, signal.SIGTERM)
    assert await worker.wait() == 0
    await until_gone(children)
    assert (await running).events[-1][0] in ("preempted", "token", "metrics")


async def test_shutdown_over_http(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    worker = await started(tmp_path)
    status, state = await post(session, worker.url, "/shutdown", {})
    assert (status, state["status"]) == (202, "draining")
    assert await worker.wait() == 0


async def test_an_idle_worker_ends_when_it_was_asked_to(tmp_path: Path) -> None:
    worker = await started(tmp_path, "--idle-timeout", "0.5")
    assert await worker.wait() == 0


async def test_a_hostile_template_ends_its_own_process_only(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    model = scripted_model(tmp_path / "model", template=template)
    worker = await WorkerProcess.scripted(tmp_path, model).start()
    try:
        other = asyncio.create_task(execute(session, worker.url, request(max_tokens=200)))
        for _ in range(4):
            stream = await execute(session, worker.url, request(messages=[{"role": "user", "content": "hi"}]))
            assert stream.status == 400
            assert stream.refusal["errors"][0]["field"] == "messages"
        assert "switched off" in stream.refusal["errors"][0]["message"]
        assert (await other).end["tokens_out"] == 200
        assert len(children_of(worker.pid)) == 1, "only the engine is left"
        assert (await health(session, worker.url))["slots_free"] == 4
    finally:
        assert await worker.stop() == 0


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until_answering(session: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                await health(session, url)
                return
            except aiohttp.ClientError:
                await asyncio.sleep(0.02)
