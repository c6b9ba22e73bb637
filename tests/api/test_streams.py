"""Streams over a real socket: order, cursors, headers, clients that leave, readers that don't read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

import aiohttp
import psutil
import pytest

from llorch_wire.errors import ApiError, ErrorCode
from llorch_wire.events import ErrorEvent, TokenEvent
from llorch_wire.sse import SseFrame, SseParser
from orchestratord.runtime import StreamItem, Tenant
from orchestratord.settings import Settings
from tests.api.harness import MemoryOrchestrator, golden, serving, until

TASK_ID = "00000000-0000-0000-0000-000000000001"
GOOD = {"model": "demo", "prompt": "Once", "max_tokens": 3, "seed": 7}
STREAM = {"Accept": "text/event-stream"}


async def frames_of(reply: aiohttp.ClientResponse) -> AsyncIterator[SseFrame]:
    parser = SseParser()
    async for chunk in reply.content.iter_any():
        for frame in parser.feed(chunk):
            yield frame


async def test_a_posted_task_streams_its_events_in_order(
    server: str, http: aiohttp.ClientSession, memory: MemoryOrchestrator
) -> None:
    async with http.post(f"{server}/v2/tasks", json=GOOD, headers=STREAM) as reply:
        assert reply.status == 200
        assert reply.headers["Content-Type"].startswith("text/event-stream")
        assert reply.headers["Cache-Control"] == "no-cache"
        assert reply.headers["X-Accel-Buffering"] == "no"
        assert reply.headers["Location"] == f"/v2/tasks/{TASK_ID}"
        transcript = await reply.read()
    assert transcript == golden("task", transcript)
    assert memory.left == []


async def test_a_second_reader_gets_exactly_the_rest(
    server: str, http: aiohttp.ClientSession, memory: MemoryOrchestrator
) -> None:
    async with http.post(f"{server}/v2/tasks", json=GOOD) as reply:
        assert reply.status == 202
        url = server + (await reply.json())["events_url"]
    async with http.get(url) as reply:
        whole = [frame async for frame in frames_of(reply)]
    assert [frame.event for frame in whole] == ["queued", "started", "token", "token", "token", "end"]
    for seen, frame in enumerate(whole[:-1], start=1):
        assert frame.id is not None
        async with http.get(url, headers={"Last-Event-ID": frame.id}) as reply:
            assert [rest async for rest in frames_of(reply)] == whole[seen:]
        async with http.get(url, params={"after": frame.id}) as reply:
            assert [rest async for rest in frames_of(reply)] == whole[seen:]


async def test_a_header_cursor_wins_over_the_query(server: str, http: aiohttp.ClientSession) -> None:
    async with http.post(f"{server}/v2/tasks", json=GOOD) as reply:
        url = server + (await reply.json())["events_url"]
    async with http.get(url, params={"after": "0-1"}, headers={"Last-Event-ID": "1-3"}) as reply:
        assert [frame.event async for frame in frames_of(reply)] == ["end"]


async def test_a_failed_task_ends_with_an_error_event(
    server: str, http: aiohttp.ClientSession, memory: MemoryOrchestrator
) -> None:
    memory.fail_with = ErrorEvent(code="CONTEXT_LENGTH_EXCEEDED", message="the prompt has 9000 tokens", param="prompt")
    async with http.post(f"{server}/v2/tasks", json=GOOD, headers=STREAM) as reply:
        transcript = await reply.read()
    assert transcript == golden("task_failed", transcript)


async def test_a_client_that_leaves_before_the_first_token_is_noticed(
    server: str, http: aiohttp.ClientSession, memory: MemoryOrchestrator
) -> None:
    memory.hold = True
    body = {**GOOD, "on_disconnect": "cancel"}
    async with http.post(f"{server}/v2/tasks", json=body, headers=STREAM) as reply:
        assert (await anext(frames_of(reply))).event == "queued"
    await until(lambda: memory.left == [TASK_ID])
    assert memory.tasks_by_id[TASK_ID].cancelled
    assert memory.tasks_by_id[TASK_ID].readers == 0


async def test_a_client_that_leaves_before_the_headers_is_noticed(server: str, memory: MemoryOrchestrator) -> None:
    """The cursor stands at the end of what there is: nothing comes, not even the status line, when the client goes."""
    memory.hold = True
    async with aiohttp.ClientSession() as http:
        async with http.post(f"{server}/v2/tasks", json=GOOD) as reply:
            url = server + (await reply.json())["events_url"]
        with contextlib.suppress(TimeoutError):
            async with http.get(url, params={"after": "0-1"}, timeout=aiohttp.ClientTimeout(total=0.2)):
                raise AssertionError("nothing should have come")
    await until(lambda: memory.left == [TASK_ID])


async def test_a_half_closed_connection_counts_as_left(server: str, memory: MemoryOrchestrator) -> None:
    memory.hold = True
    body = json.dumps(GOOD).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.rpartition(":")[2]))
    writer.write(
        b"POST /v2/tasks HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body)
    )
    async with asyncio.timeout(10):
        await reader.readuntil(b"event: queued")
    writer.write_eof()
    await until(lambda: memory.left == [TASK_ID])
    writer.close()


async def test_headers_come_soon_although_nothing_happens(memory: MemoryOrchestrator) -> None:
    memory.hold = True
    async with serving(memory, Settings(keep_alive_ms=50)) as server, aiohttp.ClientSession() as http:
        async with http.post(f"{server}/v2/tasks", json=GOOD) as reply:
            url = server + (await reply.json())["events_url"]
        async with asyncio.timeout(10), http.get(url, params={"after": "0-1"}) as reply:
            assert reply.status == 200
            assert await reply.content.readline() == b": keep-alive\n"
            memory.tasks_by_id[TASK_ID].released.set()
            assert [frame.event async for frame in frames_of(reply)][-1] == "end"
    assert memory.left == []


async def test_a_reader_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is cut in mid-body, not closed: closing would wait for the bytes that it never takes."""
    monkeypatch.setattr("orchestratord.api.server._TCP_OPTIONS", ())  # the kernel would give up in the end, too

    class Flood(MemoryOrchestrator):
        async def follow(
            self, task_id: str, tenant: Tenant | None, after: str | None = None
        ) -> AsyncIterator[list[StreamItem]]:
            for index in range(100_000):
                yield [StreamItem(TokenEvent(t="x" * 4096, i=index, id=1), f"1-{index + 1}")]

    memory = Flood()
    settings = Settings(send_timeout_ms=200)
    async with serving(memory, settings) as server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", int(server.rpartition(":")[2])))
        body = json.dumps(GOOD).encode()
        head = f"POST /v2/tasks HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\nContent-Length: {len(body)}"
        await loop.sock_sendall(sock, head.encode() + b"\r\n\r\n" + body)
        await until(lambda: memory.left == [TASK_ID])
        await until(lambda: sock.getsockname()[1] not in peers_of(int(server.rpartition(":")[2])))
        tail = b""
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionResetError):
                while more := await loop.sock_recv(sock, 1 << 20):
                    tail = more[-5:]
        sock.close()
    assert tail != b"0\r\n\r\n"


def peers_of(port: int) -> set[int]:
    """Ports of those whose connections to `port` this process holds open."""
    connections = psutil.Process().net_connections(kind="tcp4")
    return {one.raddr.port for one in connections if one.laddr.port == port and one.raddr}


async def test_a_stopping_replica_ends_streams_without_cancelling(
    server: str, http: aiohttp.ClientSession, memory: MemoryOrchestrator
) -> None:
    memory.hold = True
    async with http.post(f"{server}/v2/tasks", json={**GOOD, "on_disconnect": "cancel"}, headers=STREAM) as reply:
        frames = frames_of(reply)
        assert (await anext(frames)).event == "queued"
        memory.state = "draining"
        memory.tasks_by_id[TASK_ID].released.set()
        assert [frame async for frame in frames] == []
    assert memory.left == []
    assert not memory.tasks_by_id[TASK_ID].cancelled


async def test_refusals_carry_their_backoff(
    server: str, http: aiohttp.ClientSession, memory: MemoryOrchestrator
) -> None:
    for code, status in (("QUEUE_FULL", 429), ("STORE_UNAVAILABLE", 503), ("NO_WORKERS", 503), ("DRAINING", 503)):
        memory.refuse_with = ApiError(ErrorCode(code), "not now", retry_after_ms=2500)
        async with http.post(f"{server}/v2/tasks", json=GOOD) as reply:
            assert reply.status == status
            assert (reply.headers["Retry-After"], reply.headers["X-Backoff-Ms"]) == ("3", "2500")
            error = (await reply.json())["error"]
            assert (error["code"], error["retriable"], error["retry_after_ms"]) == (code, True, 2500)


async def test_the_fleet_feed_streams(server: str, http: aiohttp.ClientSession) -> None:
    async with http.get(f"{server}/v2/fleet/events") as reply:
        (frame,) = [frame async for frame in frames_of(reply)]
    assert (frame.event, frame.id) == ("registered", "1-0")
    assert json.loads(frame.data)["text"] == "worker w0 registered"


async def test_an_idle_connection_without_a_request_is_closed(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestratord.api.server.Connection.head_timeout_s", 0.2)
    for start in (b"", b"GET /health HTTP/1.1\r\nHost: localh"):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.rpartition(":")[2]))
        writer.write(start)
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("stray", [b"\r\n", b"\n", b"GET /health HTT"])
async def test_what_follows_a_request_never_cuts_its_stream(
    memory: MemoryOrchestrator, monkeypatch: pytest.MonkeyPatch, stray: bytes
) -> None:
    """RFC 9112, 2.2: a line end after a body is ignored. What begins the next request waits for this one's answer."""
    monkeypatch.setattr("orchestratord.api.server.Connection.head_timeout_s", 0.2)
    memory.hold = True
    async with serving(memory, Settings(keep_alive_ms=100)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.rpartition(":")[2]))
        body = json.dumps(GOOD).encode()
        head = "POST /v2/tasks HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\nContent-Length: "
        writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body + stray)
        async with asyncio.timeout(20):
            for _ in range(10):  # a second, of comments
                await reader.readuntil(b"\n:")
            for task in memory.tasks_by_id.values():
                task.released.set()
            answer = await reader.readuntil(b"\r\n0\r\n\r\n")
            assert b"event: end" in answer
            if stray.startswith(b"GET"):  # the clock for its head runs from here
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
            else:
                writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


@pytest.mark.parametrize("start", [b"\r\n", b"GET /health HTTP/1.1\r\nHost: localh"])
async def test_a_kept_connection_has_a_deadline_for_its_next_head(
    server: str, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.rpartition(":")[2]))
    async with asyncio.timeout(10):
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"}")
        monkeypatch.setattr("orchestratord.api.server.Connection.head_timeout_s", 0.2)
        writer.write(start)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    writer.close()


async def test_a_body_that_never_ends_has_a_deadline(memory: MemoryOrchestrator) -> None:
    async with serving(memory, Settings(body_timeout_ms=100)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.rpartition(":")[2]))
        writer.write(b"POST /v2/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        async with asyncio.timeout(10):
            assert (await reader.readline()).startswith(b"HTTP/1.1 400")
        writer.close()
