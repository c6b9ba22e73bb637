"""`/v1` calls with an Idempotency-Key, over a real Redis: a repeat joins, begins anew or is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import openai
import pytest

from llorch_wire.errors import ApiError, ErrorCode
from llorch_wire.events import EndEvent, terminal_position
from orchestratord.runtime import Orchestrator
from tests.api.harness import MemoryOrchestrator, until
from tests.api.test_leaving import until_tasks
from tests.api.test_real import daemon as daemon
from tests.api.test_real import worker as worker
from tests.support.scripted_worker import ScriptedWorker

BODY: dict[str, Any] = {"model": "scripted", "prompt": "hello", "max_tokens": 100_000, "ignore_eos": True, "seed": 1}
SHORT = {**BODY, "max_tokens": 8}


def keyed(key: str) -> dict[str, str]:
    return {"Idempotency-Key": key}


async def refusal(http: aiohttp.ClientSession, url: str, key: str, **changes: Any) -> tuple[int, str]:
    async with http.post(f"{url}/v1/completions", json={**BODY, **changes}, headers=keyed(key)) as reply:
        return reply.status, (await reply.json())["error"]["code"]


async def ask(http: aiohttp.ClientSession, url: str, key: str, **changes: Any) -> dict[str, Any]:
    async with http.post(f"{url}/v1/completions", json={**SHORT, **changes}, headers=keyed(key)) as reply:
        assert reply.status == 200, await reply.text()
        return await reply.json()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_repeat_after_a_broken_connection_begins_anew(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession, stream: bool
) -> None:
    body = {**BODY, "max_tokens": 300, "stream": stream}

    async def call() -> bytes:
        async with http.post(f"{daemon}/v1/completions", json=body, headers=keyed("k")) as reply:
            assert reply.status == 200, await reply.text()
            return await reply.read()

    first = asyncio.ensure_future(call())
    await until(lambda: worker.counts["tokens"] > 3)
    first.cancel()
    await until_tasks(http, daemon, ["cancelled"])
    answer = await call()
    assert b'"finish_reason":"length"' in answer
    await until_tasks(http, daemon, ["completed", "cancelled"])
    assert await call() and len(worker.running) == 0
    await until_tasks(http, daemon, ["completed", "cancelled"])


async def test_a_repeat_that_joins_before_the_first_call_is_seen_to_leave_begins_anew(
    memory: MemoryOrchestrator, server: str, http: aiohttp.ClientSession
) -> None:
    """The task that it joined is then cancelled, before any of its tokens has come."""
    memory.hold = True
    body = {"model": "demo", "prompt": "hello", "max_tokens": 3}

    async def call() -> dict[str, Any]:
        async with http.post(f"{server}/v1/completions", json=body, headers=keyed("k")) as reply:
            return await reply.json()

    joined = asyncio.ensure_future(call())
    await until(lambda: any(task.readers for task in memory.tasks_by_id.values()))
    (task,) = memory.tasks_by_id.values()
    end = EndEvent(stop_reason="CANCELLED", tokens_in=0, tokens_out=0)
    task.log[2:] = [(terminal_position(1), end)]
    memory.hold, memory.keys = False, {}  # as the store does: cancelled by its reader's leaving, the key is free
    task.released.set()
    answer = await joined
    assert answer["choices"][0]["text"] == "Once upon a"
    assert answer["id"].endswith(list(memory.tasks_by_id)[-1]) and len(memory.tasks_by_id) == 2
    task = memory.tasks_by_id[memory.keys["k"]]
    task.log[2:] = [(terminal_position(1), end)]
    assert (await call())["error"]["code"] == "conflict"  # this one was cancelled on purpose


async def test_another_body_under_a_key_is_refused_and_the_first_call_goes_on(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession
) -> None:
    first = asyncio.ensure_future(
        http.post(f"{daemon}/v1/completions", json={**BODY, "stream": True}, headers=keyed("k"))
    )
    await until(lambda: worker.counts["tokens"] > 3)
    for changes in ({"n": 2}, {"stream": False}, {"prompt": "other"}, {"user": "u"}):
        assert await refusal(http, daemon, "k", **{"stream": True, **changes}) == (409, "conflict")
    await until_tasks(http, daemon, ["running"])
    (await first).close()
    await until_tasks(http, daemon, ["cancelled"])


async def test_a_choices_key_is_no_key_that_a_client_may_send(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession
) -> None:
    both = await ask(http, daemon, "zz", n=2)
    assert len(both["choices"]) == 2
    for key in ("zz#1", "zz1"):
        assert len((await ask(http, daemon, key, prompt="other"))["choices"]) == 1
    assert (await ask(http, daemon, "zz", n=2))["id"] == both["id"]


async def test_the_order_of_fields_makes_no_other_body(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession
) -> None:
    first = await ask(http, daemon, "k")
    data = json.dumps({**dict(reversed(SHORT.items())), "user": None})
    async with http.post(f"{daemon}/v1/completions", data=data, headers=keyed("k")) as reply:
        assert (await reply.json())["id"] == first["id"]


async def test_a_call_that_finds_no_room_leaves_what_it_joined_alone(
    daemon: str, worker: ScriptedWorker, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call joins the first one's task; handing in its other choice is refused."""
    body = {**BODY, "n": 2}
    first = asyncio.ensure_future(http.post(f"{daemon}/v1/completions", json=body, headers=keyed("k")))
    await until(lambda: len(worker.running) == 2)
    submit = Orchestrator.submit

    async def full(self: Orchestrator, *given: Any, **named: Any) -> Any:
        if named["idempotency_key"] != "k":
            raise ApiError(ErrorCode.QUEUE_FULL, "full")
        return await submit(self, *given, **named)

    monkeypatch.setattr(Orchestrator, "submit", full)
    assert (await refusal(http, daemon, "k", n=2))[0] == 429
    assert len(worker.running) == 2
    await until_tasks(http, daemon, ["running", "running"])
    first.cancel()
    await until_tasks(http, daemon, ["cancelled", "cancelled"])


async def test_what_was_handed_in_before_a_refusal_is_no_obstacle_to_the_repeat(
    daemon: str, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = Orchestrator.submit

    async def full(self: Orchestrator, *given: Any, **named: Any) -> Any:
        if named["idempotency_key"] != "k":
            raise ApiError(ErrorCode.QUEUE_FULL, "full")
        return await submit(self, *given, **named)

    async with openai.AsyncOpenAI(base_url=f"{daemon}/v1", api_key="any", max_retries=0, timeout=20) as client:

        async def call() -> Any:
            return await client.completions.create(
                model="scripted", prompt="hello", n=2, max_tokens=8, extra_headers=keyed("k")
            )

        with monkeypatch.context() as patched:
            patched.setattr(Orchestrator, "submit", full)
            with pytest.raises(openai.RateLimitError):
                await call()
        assert len((await call()).choices) == 2
