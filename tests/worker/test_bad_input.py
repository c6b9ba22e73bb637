"""Every bad request is answered with the field and the next step, and costs nobody else anything."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.worker_process import WorkerProcess, execute, health, post, request, scripted_model

INVALID: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "a\0b"}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt_token_ids": []}, "prompt_token_ids"),
    ({"prompt_token_ids": [1, 268]}, "prompt_token_ids.1"),
    ({"prompt_token_ids": [-1]}, "prompt_token_ids.0"),
    ({"prompt_token_ids": [2**31]}, "prompt_token_ids.0"),
    ({"resume_token_ids": [99999]}, "resume_token_ids.0"),
    ({"resume_token_ids": [5, 2, 5]}, "resume_token_ids"),
    ({"stop_token_ids": [300]}, "stop_token_ids.0"),
    ({"logit_bias": {"300": 1.0}}, "logit_bias.300"),
    ({"logit_bias": {"x": 1.0}}, "logit_bias.x"),
    ({"logit_bias": {"5": 100.0, "05": -100.0}}, "logit_bias.05"),
    ({"temperature": 9}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 0.0005}, "repetition_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"min_tokens": 20, "max_tokens": 10}, "min_tokens"),
    ({"stop": ["x"] * 10_000}, "stop"),
    ({"stop": [""]}, "stop.0"),
    ({"logprobs": 21}, "logprobs"),
    ({"seed": 2**63}, "seed"),
    ({"task_id": "not-a-uuid"}, "task_id"),
    ({"attempt": 0}, "attempt"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"tools": []}, "tools"),
    ({"model": "another"}, "model"),
    ({"messages": [{"role": "robot", "content": "a"}], "prompt": None}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "refuse"}], "prompt": None}, "messages"),
]


@pytest.mark.parametrize(("fields", "field"), INVALID, ids=[str(i) + "-" + f for i, (_, f) in enumerate(INVALID)])
async def test_invalid_fields(
    scripted: WorkerProcess, session: aiohttp.ClientSession, fields: dict[str, Any], field: str
) -> None:
    body = request(**fields)
    body = {name: value for name, value in body.items() if value is not None}
    if "prompt_token_ids" in fields:
        body.pop("prompt", None)
    stream = await execute(session, scripted.url, body)
    assert stream.status == 400, stream.events
    error = stream.refusal["errors"][0]
    assert error["field"] == field
    assert error["constraint"] and error["message"]
    assert stream.refusal["code"] == "INVALID_PARAMS"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"task_id": NaN}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        json.dumps(request()).replace('"seed": 1', '"seed": 1e999').encode(),
        json.dumps(request()).replace('"seed": 1', '"temperature": NaN').encode(),
        json.dumps(request()).replace('"seed": 1', '"temperature": Infinity').encode(),
    ],
)
async def test_what_isnt_a_request(scripted: WorkerProcess, session: aiohttp.ClientSession, raw: bytes) -> None:
    stream = await execute(session, scripted.url, raw)
    assert stream.status == 400
    assert stream.refusal["errors"][0]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt_token_ids": [5] * 256},
        {"prompt_token_ids": [5] * 5000},
        {"prompt": "q" * 256},
        {"prompt": "q" * 1_000_000},
        {"messages": [{"role": "user", "content": "q" * 300}]},
    ],
    ids=["context", "ids", "prompt", "megabyte", "messages"],
)
async def test_prompts_longer_than_the_context(
    scripted: WorkerProcess, session: aiohttp.ClientSession, body: dict[str, Any]
) -> None:
    stream = await execute(session, scripted.url, request(**body))
    assert (stream.status, stream.refusal["code"]) == (400, "CONTEXT_LENGTH_EXCEEDED")
    error = stream.refusal["errors"][0]
    assert (error["field"], error["constraint"]) == (next(iter(body)), "context_length")
    assert "256" in error["message"] and "qqqq" not in json.dumps(stream.refusal)


async def test_bodies_over_the_bound(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 2**20

    for data in (io.BytesIO(b"x" * 20 * 2**20), chunks()):
        try:
            async with session.post(f"{scripted.url}/execute", data=data) as reply:
                assert reply.status == 413
                assert (await reply.json())["code"] == "PAYLOAD_TOO_LARGE"
        except aiohttp.ClientOSError:  # the connection may close while the body is still being sent
            pass
    assert (await health(session, scripted.url))["status"] == "ready"


async def test_headers_over_the_bound(scripted: WorkerProcess) -> None:
    host, port = scripted.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n")
    try:
        for number in range(400):
            writer.write(b"x-%d: %b\r\n" % (number, b"y" * 1000))
            await writer.drain()
    except ConnectionError:
        pass
    try:
        answer = await asyncio.wait_for(reader.read(), 20)
    except ConnectionError:
        answer = b""
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431")
    writer.close()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/cancel", {}),
        ("/cancel", {"task_id": "x", "attempt": 1}),
        ("/cancel", {"task_id": "00000000-0000-0000-0000-000000000000", "attempt": 1, "reason": "whim"}),
        ("/ack", {"attempt": 1}),
        ("/drain", {"deadline_ms": -1}),
    ],
)
async def test_other_calls_check_their_bodies(
    scripted: WorkerProcess, session: aiohttp.ClientSession, path: str, body: dict[str, Any]
) -> None:
    status, answer = await post(session, scripted.url, path, body)
    assert status == 400
    assert answer["errors"][0]["field"]


async def test_after_must_be_an_index(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    for after in ("banana", "1.5", "99999999999", "²"):
        async with session.post(f"{scripted.url}/execute", params={"after": after}, json=request()) as reply:
            assert reply.status == 400
            assert (await reply.json())["errors"][0]["field"] == "after"


async def test_unknown_paths_and_methods(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    async with session.get(f"{scripted.url}/nothing") as reply:
        assert (reply.status, (await reply.json())["code"]) == (404, "NOT_FOUND")
    async with session.get(f"{scripted.url}/execute") as reply:
        assert (reply.status, (await reply.json())["code"]) == (405, "METHOD_NOT_ALLOWED")


async def test_bad_requests_leave_running_ones_alone(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    alone = await execute(session, scripted.url, request(seed=50, max_tokens=150))
    running = asyncio.create_task(execute(session, scripted.url, request(seed=50, max_tokens=150)))
    for fields, _ in INVALID:
        body = {name: value for name, value in request(**fields).items() if value is not None}
        await execute(session, scripted.url, body)
    disturbed = await running
    assert disturbed.ids == alone.ids
    assert (await health(session, scripted.url))["slots_free"] == 4


async def test_a_model_without_a_chat_template(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    model = scripted_model(tmp_path / "model", template=None)
    worker = await WorkerProcess.scripted(tmp_path, model).start()
    try:
        stream = await execute(session, worker.url, request(messages=[{"role": "user", "content": "hi"}]))
        assert stream.status == 400
        assert "chat_template.jinja" in stream.refusal["errors"][0]["message"]
    finally:
        assert await worker.stop() == 0


async def test_the_key_guards_every_route(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    model = scripted_model(tmp_path / "model")
    key = "correct-horse-battery"
    worker = await WorkerProcess.scripted(tmp_path, model, env={"LLORCH_WORKER_KEY": key}).start()
    try:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {key}é"}):
            async with session.get(f"{worker.url}/health", headers=headers) as reply:
                assert reply.status == 401
                assert (await reply.json())["code"] == "UNAUTHORIZED"
            async with session.post(f"{worker.url}/execute", json=request(), headers=headers) as reply:
                assert reply.status == 401
        async with session.get(f"{worker.url}/health", headers={"Authorization": f"Bearer {key}"}) as reply:
            assert reply.status == 200
        for pid in [worker.pid, *worker.children()]:
            assert key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert key.encode() not in Path(f"/proc/{worker.engine_pid()}/environ").read_bytes()
    finally:
        assert await worker.stop() == 0
    assert key not in worker.log_file.read_text()


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (("--host", "0.0.0.0", "--model", "demo"), 2, "LLORCH_WORKER_KEY"),
        ((), 2, "--model is missing"),
        (("--model", "/nowhere/at/all"), 1, "no model folder"),
        (("--model", "demo", "--slots", "0"), 2, "--slots"),
        (("--model", "demo", "--orchestrator", "ftp://x"), 2, "--orchestrator"),
        (("--model", "demo", "--worker-id", "a b"), 2, "--worker-id"),
        (("--model", "demo", "--host", "203.0.113.7", "--port", "1"), 2, "--host 203.0.113.7"),
    ],
    ids=["open-host", "no-model", "no-folder", "slots", "orchestrator", "worker-id", "other-host"],
)
async def test_wrong_flags(tmp_path: Path, flags: tuple[str, ...], status: int, words: str) -> None:
    worker = WorkerProcess(tmp_path, *flags)
    await asyncio.to_thread(worker.spawn)
    assert await worker.wait() == status
    assert words in worker.tail()
    assert "Traceback" not in worker.tail()
