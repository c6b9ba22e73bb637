"""Every bad input is a 4xx with code, message and param; the daemon keeps serving and no task is made."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import aiohttp
import pytest

from tests.api.harness import MemoryOrchestrator

GOOD: dict[str, Any] = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 4}


def with_(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


BODIES: list[tuple[str, bytes, int, str, str]] = [
    ("no prompt", json.dumps({"model": "demo"}).encode(), 400, "INVALID_PARAMS", "prompt"),
    ("two prompts", with_(messages=[{"role": "user", "content": "hi"}]), 400, "INVALID_PARAMS", "prompt"),
    ("no model", b'{"prompt": "hi"}', 400, "INVALID_PARAMS", "model"),
    ("unknown model", with_(model="nothing"), 404, "MODEL_NOT_FOUND", "model"),
    ("negative max_tokens", with_(max_tokens=-1), 400, "INVALID_PARAMS", "max_tokens"),
    ("zero max_tokens", with_(max_tokens=0), 400, "INVALID_PARAMS", "max_tokens"),
    ("max_tokens as text", with_(max_tokens="5"), 400, "INVALID_PARAMS", "max_tokens"),
    ("max_tokens true", with_(max_tokens=True), 400, "INVALID_PARAMS", "max_tokens"),
    ("max_tokens 4.5", with_(max_tokens=4.5), 400, "INVALID_PARAMS", "max_tokens"),
    ("temperature 9", with_(temperature=9), 400, "INVALID_PARAMS", "temperature"),
    ("temperature NaN", b'{"model":"demo","prompt":"x","temperature":NaN}', 400, "INVALID_PARAMS", "body"),
    ("temperature 1e999", b'{"model":"demo","prompt":"x","temperature":1e999}', 400, "INVALID_PARAMS", "body"),
    ("top_p 0", with_(top_p=0), 400, "INVALID_PARAMS", "top_p"),
    ("seed too large", with_(seed=2**63), 400, "INVALID_PARAMS", "seed"),
    ("nine stops", with_(stop=list("abcdefghi")), 400, "INVALID_PARAMS", "stop"),
    ("empty stop", with_(stop=[""]), 400, "INVALID_PARAMS", "stop.0"),
    ("unknown field", with_(max_token=5), 400, "INVALID_PARAMS", "max_token"),
    ("two names of the model", with_(model_ref="demo"), 400, "INVALID_PARAMS", "model_ref"),
    ("an endless name", with_(**{"x" * 8_000_000: 1}), 400, "INVALID_PARAMS", "body"),
    ("a name with NUL", with_(**{"a\0b": 1}), 400, "INVALID_PARAMS", "body"),
    ("an endless nested name", with_(placement={"x" * 65: 1}), 400, "INVALID_PARAMS", "placement"),
    ("an endless metadata key", with_(metadata={"x" * 1_000_000: "v"}), 400, "INVALID_PARAMS", "metadata"),
    ("a metadata key with NUL", with_(metadata={"a\0b": "v"}), 400, "INVALID_PARAMS", "metadata"),
    ("unknown nested field", with_(placement={"mood": "auto"}), 400, "INVALID_PARAMS", "placement.mood"),
    ("pin without target", with_(placement={"mode": "pin"}), 400, "INVALID_PARAMS", "placement"),
    ("empty prompt", with_(prompt=""), 400, "INVALID_PARAMS", "prompt"),
    ("NUL in the prompt", with_(prompt="a\0b"), 400, "INVALID_PARAMS", "prompt"),
    ("lone surrogate", b'{"model":"demo","prompt":"\\ud800"}', 400, "INVALID_PARAMS", "body"),
    ("invalid UTF-8", b'{"model":"demo","prompt":"\xff"}', 400, "INVALID_PARAMS", "body"),
    ("no JSON", b"prompt=hi", 400, "INVALID_PARAMS", "body"),
    ("half JSON", b'{"model": "demo", ', 400, "INVALID_PARAMS", "body"),
    ("an array", b"[]", 400, "INVALID_PARAMS", "body"),
    ("a number", b"1", 400, "INVALID_PARAMS", "body"),
    ("null", b"null", 400, "INVALID_PARAMS", "body"),
    ("nothing", b"", 400, "INVALID_PARAMS", "body"),
    ("deep nesting", b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "INVALID_PARAMS", "body"),
    ("less deep nesting", b'{"model":' + b"[" * 900 + b"]" * 900 + b"}", 400, "INVALID_PARAMS", "model"),
    ("20 MB", b'{"model":"demo","prompt":"' + b"x" * 20_000_000 + b'"}', 413, "PAYLOAD_TOO_LARGE", "body"),
    ("wrong task_id", with_(task_id="banana"), 400, "INVALID_PARAMS", "task_id"),
    ("wrong role", json.dumps({"model": "demo", "messages": [{"role": "robot", "content": "x"}]}).encode(), 400,
     "INVALID_PARAMS", "messages.0.role"),
    ("no messages", json.dumps({"model": "demo", "messages": []}).encode(), 400, "INVALID_PARAMS", "messages"),
    ("negative token id", json.dumps({"model": "demo", "prompt_token_ids": [-1]}).encode(), 400, "INVALID_PARAMS",
     "prompt_token_ids.0"),
    ("embedding", with_(workload="embedding"), 400, "INVALID_PARAMS", "workload"),
    ("17 metadata", with_(metadata={str(n): "x" for n in range(17)}), 400, "INVALID_PARAMS", "metadata"),
    ("JSON schema", with_(response_format={"type": "json_object"}), 400, "INVALID_PARAMS", "response_format.type"),
    ("logit bias", with_(logit_bias={"x": 1}), 400, "INVALID_PARAMS", "logit_bias.x"),
    ("file callback", with_(callback_url="file:///etc/passwd"), 400, "INVALID_PARAMS", "callback_url"),
]  # fmt: skip


async def refused(reply: aiohttp.ClientResponse, status: int, code: str, param: str | None) -> dict[str, Any]:
    body = await reply.json()
    error = body["error"]
    assert (reply.status, error["code"], error.get("param")) == (status, code, param), error
    assert error["message"] and error["correlation_id"] == reply.headers["X-Correlation-Id"]
    assert error["retriable"] is (status in (429, 503))
    return error


@pytest.mark.parametrize(("body", "status", "code", "param"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES])
async def test_a_bad_task_is_refused_by_name(
    server: str,
    http: aiohttp.ClientSession,
    memory: MemoryOrchestrator,
    body: bytes,
    status: int,
    code: str,
    param: str,
) -> None:
    async with http.post(f"{server}/v2/tasks", data=io.BytesIO(body)) as reply:
        error = await refused(reply, status, code, param)
    assert "Once upon" not in error["message"]
    assert len(error["message"]) < 400 and "\0" not in error["message"]
    assert not memory.tasks_by_id
    async with http.post(f"{server}/v2/tasks", json=GOOD) as reply:
        assert reply.status == 202


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code", "param"),
    [
        ("GET", "/v2/tasks/banana", {}, 400, "INVALID_PARAMS", "task_id"),
        ("GET", "/v2/tasks/banana/events", {}, 400, "INVALID_PARAMS", "task_id"),
        ("DELETE", "/v2/tasks/banana", {}, 400, "INVALID_PARAMS", "task_id"),
        ("POST", "/v2/tasks/banana/cancel", {}, 400, "INVALID_PARAMS", "task_id"),
        ("GET", "/v2/tasks/6a1f0c5e-3f0a-4f6e-9a51-2f4f6a1f9d10", {}, 404, "NOT_FOUND", "task_id"),
        ("GET", "/v2/tasks/6a1f0c5e-3f0a-4f6e-9a51-2f4f6a1f9d10/events", {}, 404, "NOT_FOUND", "task_id"),
        ("GET", "/v2/tasks?status=sleeping", {}, 400, "INVALID_PARAMS", "status"),
        ("GET", "/v2/tasks?limit=0", {}, 400, "INVALID_PARAMS", "limit"),
        ("GET", "/v2/tasks?limit=-1", {}, 400, "INVALID_PARAMS", "limit"),
        ("GET", "/v2/tasks?limit=1e9", {}, 400, "INVALID_PARAMS", "limit"),
        ("GET", "/v2/tasks?after=%00", {}, 400, "INVALID_PARAMS", "after"),
        ("GET", "/v2/tasks?state=queued", {}, 400, "INVALID_PARAMS", "state"),
        ("POST", "/v2/tasks", {"Idempotency-Key": "x" * 300}, 400, "INVALID_PARAMS", "Idempotency-Key"),
        ("GET", "/v2/workers/..%2f..", {}, 404, "NOT_FOUND", None),
        ("GET", "/v2/workers/-x", {}, 400, "INVALID_PARAMS", "worker_id"),
        ("POST", "/v2/workers/w0/drain", {}, 400, "INVALID_PARAMS", "deadline_ms"),
        ("GET", "/v2/nothing", {}, 404, "NOT_FOUND", None),
        ("PUT", "/v2/tasks", {}, 405, "METHOD_NOT_ALLOWED", None),
        ("GET", "/v2/tasks/", {}, 404, "NOT_FOUND", None),
    ],
)
async def test_a_bad_call_is_refused_by_name(
    server: str,
    http: aiohttp.ClientSession,
    method: str,
    path: str,
    headers: dict[str, str],
    status: int,
    code: str,
    param: str | None,
) -> None:
    data = b'{"deadline_ms": -1}' if path.endswith("drain") else None
    url = aiohttp.client.URL(server + path, encoded=True)
    async with http.request(method, url, headers=headers, data=data) as reply:
        await refused(reply, status, code, param)
        if status == 405:
            assert reply.headers["Allow"]


async def test_refusals_name_what_is_wrong(server: str, http: aiohttp.ClientSession) -> None:
    for body, words in (
        (with_(model_ref="demo"), "`model` and `model_ref` are the same"),
        (b'{"model":"demo","prompt":"\xff"}', "not valid UTF-8: byte 26"),
        (b'{"model":"demo","prompt":"\\ud800"}', "a lone surrogate"),
    ):
        async with http.post(f"{server}/v2/tasks", data=body) as reply:
            assert words in (await reply.json())["error"]["message"]
    async with http.get(f"{server}/v2/fleet/events", params={"after": "banana"}) as reply:
        error = await refused(reply, 400, "INVALID_PARAMS", "after")
        assert "task" not in error["message"] and "feed" in error["message"]


@pytest.mark.parametrize("cursor", ["banana", "1", "-", "1-", "-1", "1-x", "1-1-1", "１-１", "9" * 400 + "-1"])
async def test_a_bad_cursor_is_refused(
    server: str, http: aiohttp.ClientSession, memory: MemoryOrchestrator, cursor: str
) -> None:
    async with http.post(f"{server}/v2/tasks", json=GOOD) as reply:
        task_id = (await reply.json())["task_id"]
    url = f"{server}/v2/tasks/{task_id}/events"
    async with http.get(url, params={"after": cursor}) as reply:
        await refused(reply, 400, "INVALID_PARAMS", "after")
    if cursor.isascii():
        async with http.get(url, headers={"Last-Event-ID": cursor}) as reply:
            await refused(reply, 400, "INVALID_PARAMS", "Last-Event-ID")
    async with http.get(url, params={"after": "77-1"}) as reply:
        await refused(reply, 409, "CONFLICT", "Last-Event-ID")


async def test_a_chunked_body_over_the_bound_is_refused_while_it_arrives(
    server: str, http: aiohttp.ClientSession, memory: MemoryOrchestrator
) -> None:
    async def endless() -> Any:
        yield b'{"model":"demo","prompt":"'
        for _ in range(400):
            yield b"x" * 65536

    async with http.post(f"{server}/v2/tasks", data=endless()) as reply:
        await refused(reply, 413, "PAYLOAD_TOO_LARGE", "body")
    assert memory.calls == 0


async def test_any_content_type_will_do_and_a_key_twice_counts_as_the_last(
    server: str, http: aiohttp.ClientSession, memory: MemoryOrchestrator
) -> None:
    body = b'{"model":"demo","prompt":"x","seed":1,"seed":2}'
    for content_type in ("text/plain", "application/json; charset=utf-8", "application/x-www-form-urlencoded"):
        async with http.post(f"{server}/v2/tasks", data=body, headers={"Content-Type": content_type}) as reply:
            assert (reply.status, (await reply.json())["seed"]) == (202, 2)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"BANANA\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 30_000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 12_000 + b"\r\n", 431),
        (b"POST /v2/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", 400),
    ],
)
async def test_what_is_not_http_gets_an_error_too(server: str, raw: bytes, status: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.rpartition(":")[2]))
    async with asyncio.timeout(15):
        writer.write(raw)
        answer = b""
        while b"}}" not in answer and (more := await reader.read(65536)):
            answer += more
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), head[:80]
    assert json.loads(body)["error"]["code"] == "INVALID_PARAMS"


async def test_a_correlation_id_is_taken_or_made(server: str, http: aiohttp.ClientSession) -> None:
    async with http.get(f"{server}/health", headers={"X-Correlation-Id": "abc.DEF-1_2"}) as reply:
        assert reply.headers["X-Correlation-Id"] == "abc.DEF-1_2"
    for bad in ("a b", "x" * 65, "é"):
        async with http.get(f"{server}/health", headers={"X-Correlation-Id": bad}) as reply:
            made = reply.headers["X-Correlation-Id"]
            assert made != bad and len(made) == 32


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v2/tasks", {"GET", "POST"}),
        ("PATCH", "/v2/tasks/00000000-0000-0000-0000-000000000001", {"GET", "DELETE"}),
        ("GET", "/v2/tasks/00000000-0000-0000-0000-000000000001/cancel", {"POST"}),
        ("PUT", "/v2/workers/w1", {"GET", "DELETE"}),
        ("DELETE", "/health", {"GET", "HEAD"}),
        ("POST", "/", {"GET", "HEAD"}),
        ("HEAD", "/v2/tasks", {"GET", "POST"}),
        ("GET", "/v1/completions", {"POST"}),
    ],
)
async def test_a_405_names_every_method_of_the_path(
    server: str, http: aiohttp.ClientSession, method: str, path: str, allowed: set[str]
) -> None:
    async with http.request(method, server + path) as reply:
        assert reply.status == 405
        assert set(reply.headers["Allow"].split(", ")) == allowed
        if method != "HEAD":
            assert reply.headers["Allow"] in (await reply.json())["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/docs", "/health", "/ready", "/dashboard/style.css", "/openapi.json"])
async def test_probes_and_pages_answer_head_as_get_without_the_body(
    server: str, http: aiohttp.ClientSession, path: str
) -> None:
    async with http.get(server + path) as whole, http.head(server + path) as reply:
        assert (reply.status, await reply.read()) == (200, b"")
        for name in ("Content-Type", "Content-Length"):
            assert reply.headers[name] == whole.headers[name]
