"""The whole of orchestratord but its process: HTTP, orchestrator, store, a real Redis, scripted workers over HTTP."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
from redis.asyncio import Redis

from llorch_wire.events import TokenEvent, decode_task_event
from llorch_wire.sse import SseFrame, SseParser
from orchestratord.api.server import bind, make_server
from orchestratord.app import create_app
from orchestratord.metrics import Metrics
from orchestratord.runtime import Orchestrator, RuntimeSettings
from orchestratord.settings import Settings
from orchestratord.store.keys import key
from orchestratord.store.store import Store
from tests.api.harness import DEADLINE_S, until
from tests.api.test_bad_input import BODIES
from tests.integration.house import RedisProcess
from tests.support.scripted_tokens import expected
from tests.support.scripted_worker import ScriptedWorker

GOOD = {"model": "scripted", "prompt": "hello", "max_tokens": 12, "seed": 5}


@pytest.fixture
async def daemon(redis: RedisProcess) -> AsyncIterator[str]:
    """URL of a running orchestrator over a real Redis; no worker yet."""
    store: Store | None = None
    async with asyncio.timeout(DEADLINE_S):
        while store is None:
            try:
                store = await Store.connect(redis.url, timeout_s=2.0)
            except Exception:
                await asyncio.sleep(0.02)
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    orchestrator = Orchestrator(store, RuntimeSettings(replica_url=url, dispatch_s=0.2, sweep_s=0.2))
    app = create_app(orchestrator, Settings(), Metrics(orchestrator.observations, ["default"]))
    server = make_server(app, max_connections=256, graceful_s=1)
    async with asyncio.TaskGroup() as group:
        group.create_task(orchestrator.run())
        group.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started and orchestrator.state == "ready")
        yield url
        await orchestrator.stop(2.0)
        server.should_exit = True
    listener.close()
    await store.aclose()


@pytest.fixture
async def worker(daemon: str, http: aiohttp.ClientSession) -> AsyncIterator[ScriptedWorker]:
    """A worker that registered over HTTP and takes work."""
    worker = ScriptedWorker([daemon], "w1", slots=4, token_ms=2)
    await worker.start()
    await registered(http, daemon, "w1")
    yield worker
    await worker.die()


async def registered(http: aiohttp.ClientSession, url: str, worker_id: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            async with http.get(f"{url}/v2/workers") as reply:
                workers = (await reply.json())["workers"]
            if any(view["worker_id"] == worker_id and view["state"] == "ready" for view in workers):
                return
            await asyncio.sleep(0.02)


async def frames_of(reply: aiohttp.ClientResponse) -> AsyncIterator[SseFrame]:
    parser = SseParser()
    async for chunk in reply.content.iter_any():
        for frame in parser.feed(chunk):
            yield frame


async def post(http: aiohttp.ClientSession, url: str, **changes: Any) -> dict[str, Any]:
    async with http.post(f"{url}/v2/tasks", json={**GOOD, **changes}) as reply:
        body = await reply.json()
        assert reply.status == 202, body
        return body


def text_of(seed: int, max_tokens: int) -> str:
    return "".join(token.t for token in expected(seed, max_tokens)[0])


async def test_a_workers_health_is_asked_from_here(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession
) -> None:
    async with http.get(f"{daemon}/v2/workers/w1/health") as reply:
        answer = await reply.json()
    assert answer["reachable"] is True and answer["health"]["worker_id"] == "w1"
    with socket.socket() as unheard:  # bound, so that nobody else gets the port; not listening, so that nobody answers
        unheard.bind(("127.0.0.1", 0))
        async with http.get(f"{daemon}/v2/workers/w1") as reply:
            view = await reply.json()
        registration = {"worker_id": "w2", "instance_id": "i2", "url": f"http://127.0.0.1:{unheard.getsockname()[1]}"}
        registration |= {"context_length": 512, "slots_total": 1}
        registration |= {name: view[name] for name in ("model", "model_digest", "dtype", "device")}
        async with http.post(f"{daemon}/v2/workers/register", json=registration) as reply:
            assert reply.status == 200, await reply.text()
        async with http.get(f"{daemon}/v2/workers/w2/health") as reply:
            assert (await reply.json()) == {"reachable": False, "health": None}
    async with http.get(f"{daemon}/v2/workers/nobody/health") as reply:
        assert reply.status == 404


async def test_a_task_from_post_to_end_and_a_reader_that_resumes(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession
) -> None:
    task = await post(http, daemon)
    url = daemon + task["events_url"]
    async with http.get(url) as reply:
        live = [frame async for frame in frames_of(reply)]
    names = [frame.event for frame in live if frame.id]
    tokens = expected(5, 12)[0]
    assert names == ["queued", "started", *["token"] * len(tokens), "end"]
    events = [decode_task_event(frame.event, frame.data) for frame in live]
    assert [event for event in events if isinstance(event, TokenEvent)] == tokens
    with_id = [frame for frame in live if frame.id]
    for seen in range(1, len(with_id)):
        async with http.get(url, headers={"Last-Event-ID": with_id[seen - 1].id or ""}) as reply:
            assert [f async for f in frames_of(reply)] == with_id[seen:]
    async with http.get(f"{daemon}/v2/tasks/{task['task_id']}") as reply:
        shown = await reply.json()
    assert (shown["status"], shown["text"], shown["worker_id"]) == ("completed", text_of(5, 12), "w1")
    assert shown["usage"]["tokens_out"] == len(tokens) and shown["stop_reason"] in ("EOS", "MAX_TOKENS")
    async with http.get(url, params={"after": "9-1"}) as reply:
        assert (reply.status, (await reply.json())["error"]["code"]) == (409, "CONFLICT")


async def test_the_same_id_or_key_is_the_same_task_and_another_body_a_conflict(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession
) -> None:
    identity = "6a1f0c5e-3f0a-4f6e-9a51-2f4f6a1f9d10"
    first, again = [await post(http, daemon, task_id=identity) for _ in range(2)]
    assert (first["task_id"], first["created"], again["task_id"], again["created"]) == (identity, True, identity, False)
    async with http.post(f"{daemon}/v2/tasks", json={**GOOD, "task_id": identity, "prompt": "other"}) as reply:
        assert (reply.status, (await reply.json())["error"]["code"]) == (409, "CONFLICT")
    ids = set()
    for _ in range(2):
        async with http.post(f"{daemon}/v2/tasks", json=GOOD, headers={"Idempotency-Key": "k"}) as reply:
            ids.add((await reply.json())["task_id"])
    assert len(ids) == 1


async def test_a_waiting_task_is_seen_listed_and_cancelled(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession
) -> None:
    async with http.post(f"{daemon}/v2/workers/w1/drain", json={"deadline_ms": 1000}) as reply:
        assert (reply.status, (await reply.json())["state"]) == (200, "draining")
    ids = [(await post(http, daemon, seed=n))["task_id"] for n in range(5)]
    async with http.get(f"{daemon}/v2/queue") as reply:
        queue = await reply.json()
    assert queue["depth"] == 5 and queue["queues"][0]["tenant"] == "default"
    listed: list[str] = []
    cursor = ""
    while cursor is not None:
        query = {"status": "queued", "model": "scripted", "limit": "2", **({"after": cursor} if cursor else {})}
        async with http.get(f"{daemon}/v2/tasks", params=query) as reply:
            page = await reply.json()
        listed += [task["task_id"] for task in page["tasks"]]
        cursor = page["next"]
    assert sorted(listed) == sorted(ids)
    async with http.get(f"{daemon}/v2/tasks", params={"after": "banana"}) as reply:
        assert (reply.status, (await reply.json())["error"]["param"]) == (400, "after")
    for task_id in ids[:2]:
        for method, path in (("POST", f"{task_id}/cancel"), ("DELETE", task_id)):
            async with http.request(method, f"{daemon}/v2/tasks/{path}") as reply:
                assert (reply.status, (await reply.json())["status"]) == (200, "cancelled")
    async with http.get(f"{daemon}/v2/tasks/{ids[0]}/events") as reply:
        frames = [frame async for frame in frames_of(reply)]
    assert [frame.event for frame in frames] == ["queued", "end"]
    async with http.post(f"{daemon}/v2/workers/w1/undrain") as reply:
        assert (await reply.json())["state"] == "ready"
    for task_id in ids[2:]:
        async with http.get(f"{daemon}/v2/tasks/{task_id}/events") as reply:
            assert [frame.event async for frame in frames_of(reply)][-1] == "end"


async def test_bad_input_writes_nothing_to_redis(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession, redis: RedisProcess
) -> None:
    client = Redis.from_url(redis.url)
    before = await client.dbsize()
    for name, body, *_ in BODIES:
        async with http.post(f"{daemon}/v2/tasks", data=io.BytesIO(body)) as reply:
            assert reply.status in (400, 404, 413), name
            error = (await reply.json())["error"]
            assert error["message"] and error.get("param"), name
    for path in ("/v2/tasks/banana", "/v2/tasks/banana/events", "/v2/tasks/6a1f0c5e-3f0a-4f6e-9a51-2f4f6a1f9d10"):
        async with http.get(daemon + path) as reply:
            assert reply.status in (400, 404)
    for body in (
        {"model": "scripted"},
        {"model": "nothing", "prompt": "x"},
        {"model": "scripted", "prompt": "x", "n": 0},
    ):
        async with http.post(f"{daemon}/v1/completions", json=body) as reply:
            assert reply.status in (400, 404)
    assert await client.dbsize() == before
    await client.aclose()
    task = await post(http, daemon)
    async with http.get(daemon + task["events_url"]) as reply:
        assert [frame.event async for frame in frames_of(reply)][-1] == "end"


async def test_the_openai_client(daemon: str, worker: ScriptedWorker) -> None:
    async with openai.AsyncOpenAI(base_url=f"{daemon}/v1", api_key="none", max_retries=0, timeout=20) as client:
        assert [model.id async for model in client.models.list()] == ["scripted"]
        messages: list[Any] = [{"role": "user", "content": "hello"}]
        whole = await client.chat.completions.create(model="scripted", messages=messages, seed=5, max_tokens=12)
        stream = await client.chat.completions.create(
            model="scripted",
            messages=messages,
            seed=5,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content == text_of(5, 12)
        assert chunks[-1].usage == whole.usage and whole.usage is not None
        many = await client.completions.create(model="scripted", prompt=["a", "b"], n=2, seed=5, max_tokens=4)
        assert [choice.text for choice in many.choices][::2] == [text_of(5, 4)] * 2
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="nothing", prompt="x")
        for stream_it in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.completions.create(model="scripted", prompt="!refuse", stream=stream_it)
            assert caught.value.code == "context_length_exceeded"


async def test_a_client_that_leaves_frees_the_slot(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession
) -> None:
    body = {"model": "scripted", "prompt": "hello", "max_tokens": 100_000, "ignore_eos": True}
    for path in ("/v1/completions", "/v2/tasks"):
        more = {"stream": True} if path.startswith("/v1") else {"on_disconnect": "cancel"}
        async with http.post(daemon + path, json={**body, **more}, headers={"Accept": "text/event-stream"}) as reply:
            assert reply.status == 200
            await reply.content.readany()
            await until(lambda: len(worker.running) == 1)
        await until(lambda: not worker.running)
    async with asyncio.timeout(DEADLINE_S):
        while True:
            async with http.get(f"{daemon}/v2/workers/w1") as reply:
                if (await reply.json())["slots_free"] == 4:
                    break
            await asyncio.sleep(0.02)


async def test_redis_away_is_a_503_and_comes_back(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession, redis: RedisProcess
) -> None:
    redis.kill()
    async with http.post(f"{daemon}/v2/tasks", json=GOOD) as reply:
        error = (await reply.json())["error"]
        assert (reply.status, error["code"], error["retriable"]) == (503, "STORE_UNAVAILABLE", True)
        assert reply.headers["Retry-After"] and reply.headers["X-Backoff-Ms"]
    async with http.get(f"{daemon}/health") as reply:
        assert reply.status == 200
    async with http.get(f"{daemon}/ready") as reply:
        assert (reply.status, (await reply.json())["reason"]) == (503, "Redis doesn't answer")
    async with http.get(f"{daemon}/metrics") as reply:
        assert "llorch_store_up 0.0" in await reply.text()
    redis.start()
    async with asyncio.timeout(DEADLINE_S):
        while True:
            async with http.post(f"{daemon}/v2/tasks", json=GOOD) as reply:
                if reply.status == 202:
                    task = await reply.json()
                    break
                assert reply.status in (503, 404)
            await asyncio.sleep(0.1)
    async with http.get(daemon + task["events_url"]) as reply:
        assert [frame.event async for frame in frames_of(reply)][-1] == "end"


async def test_a_stream_that_cannot_begin_without_redis_is_a_503(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession, redis: RedisProcess
) -> None:
    """It was a 200 with keep-alives that closed after some seconds without a word."""
    task = await post(http, daemon)
    async with http.get(daemon + task["events_url"]) as reply:
        whole = [frame async for frame in frames_of(reply)]
    last = {"Last-Event-ID": str(whole[-2].id)}
    redis.pause()
    try:
        for path in (task["events_url"], f"{task['events_url']}?after=0-1", "/v2/fleet/events?after=0-0",
                     "/v2/fleet/events"):  # fmt: skip
            async with http.get(daemon + path) as reply:
                error = (await reply.json())["error"]
                assert (reply.status, error["code"]) == (503, "STORE_UNAVAILABLE"), path
                assert reply.headers["Retry-After"]
    finally:
        redis.resume()
    async with asyncio.timeout(DEADLINE_S):
        while True:
            async with http.get(daemon + task["events_url"], headers=last) as reply:
                if reply.status == 200:
                    assert [frame async for frame in frames_of(reply)] == whole[-1:]
                    break
            await asyncio.sleep(0.1)


async def test_no_start_is_predicted_where_no_ready_worker_may_take_the_task(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession
) -> None:
    here = {"mode": "pin", "pin_worker": "w1"}
    assert (await post(http, daemon, placement=here))["predicted_start_ms"] is not None
    for placement in (
        {"mode": "pin", "pin_worker": "nobody"},
        {"mode": "pin", "pin_pool": "nowhere"},
        {"mode": "prefer", "prefer_pools": ["nowhere"], "allow_fallback": False},
    ):
        task = await post(http, daemon, placement=placement)
        assert (task["status"], task["predicted_start_ms"], task["predicted_start_p90_ms"]) == ("queued", None, None)
        async with http.get(f"{daemon}/v2/tasks/{task['task_id']}") as reply:
            assert (await reply.json()).get("predicted_start_ms") is None
        async with http.get(daemon + task["events_url"]) as reply:
            seen = [frame async for frame in _first(frames_of(reply), 2)]
        assert [json.loads(frame.data).get("predicted_start_ms") for frame in seen] == [None, None]
        async with http.delete(f"{daemon}/v2/tasks/{task['task_id']}") as reply:
            assert reply.status == 200


async def _first(frames: AsyncIterator[SseFrame], count: int) -> AsyncIterator[SseFrame]:
    """That many; the second `queued` of a waiting task comes within a second or two."""
    async for frame in frames:
        yield frame
        count -= 1
        if not count:
            return


async def test_undraining_answers_the_state_to_come(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession, redis: RedisProcess
) -> None:
    async def state() -> str:
        async with http.get(f"{daemon}/v2/workers/w1") as reply:
            return (await reply.json())["state"]

    async with http.post(f"{daemon}/v2/workers/w1/drain", json={"deadline_ms": 1000}) as reply:
        assert reply.status == 200
    client = Redis.from_url(redis.url)
    async with asyncio.timeout(DEADLINE_S):  # until the worker itself says so: from its next heartbeat but one
        while await client.hget(key("worker", "w1"), "status") != b"draining":
            await asyncio.sleep(0.02)
    await client.aclose()
    async with http.post(f"{daemon}/v2/workers/w1/undrain") as reply:
        view = await reply.json()
        assert (view["state"], view["drain_deadline_at_ms"]) == ("ready", None)
    async with asyncio.timeout(DEADLINE_S):
        while await state() != "ready":
            await asyncio.sleep(0.02)


async def test_workers_pools_and_the_feed(daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession) -> None:
    async with http.get(f"{daemon}/v2/pools") as reply:
        (pool,) = (await reply.json())["pools"]
    assert (pool["workers_ready"], pool["slots_total"], pool["models"]) == (1, 4, ["scripted"])
    async with http.get(f"{daemon}/v2/fleet/events", params={"after": "0-0"}) as reply:
        kinds = []
        async for frame in frames_of(reply):
            data = json.loads(frame.data)
            assert frame.id and data["text"] and data["at_ms"] > 0 and data["kind"] == frame.event
            kinds.append((frame.event, data["subject"]))
            if data["subject"] == "w1":
                break
    assert kinds[-1][0].endswith("registered"), kinds
    async with http.post(f"{daemon}/v2/workers/w9/heartbeat", json={"instance_id": "x"}) as reply:
        assert reply.status == 404
    for method, path in (("GET", "w9"), ("POST", "w9/drain"), ("POST", "w9/undrain"), ("DELETE", "w9")):
        async with http.request(method, f"{daemon}/v2/workers/{path}") as reply:
            assert (reply.status, (await reply.json())["error"]["code"]) == (404, "NOT_FOUND"), path
    async with http.post(f"{daemon}/v2/workers/register", json={"worker_id": "w2"}) as reply:
        assert (reply.status, (await reply.json())["error"]["param"]) == (400, "instance_id")
    async with http.delete(f"{daemon}/v2/workers/w1") as reply:
        assert (await reply.json())["removed"] is True


async def test_metrics_count_what_happened(daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession) -> None:
    task = await post(http, daemon)
    async with http.get(daemon + task["events_url"]) as reply:
        await reply.read()
    async with http.get(f"{daemon}/metrics") as reply:
        text = await reply.text()
    tokens = len(expected(5, 12)[0])
    for line in (
        "llorch_store_up 1.0",
        'llorch_admissions_total{outcome="admitted"} 1.0',
        f'llorch_tokens_relayed_total{{model="scripted"}} {tokens}.0',
        'llorch_scheduling_latency_seconds_count{priority="interactive"} 1.0',
        'llorch_time_to_first_token_seconds_count{priority="interactive"} 1.0',
        'llorch_workers{model="scripted",state="ready"} 1.0',
        'llorch_redis_latency_seconds_count{operation="append"}',
    ):
        assert line in text, line
    assert task["task_id"] not in text
