"""What a client may cost before a handler sees it, with short deadlines and a trivial application."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from worker import http_limits
from worker.http_limits import BodyTimeoutError, BodyTooLargeError, read_body
from worker.http_server import serving


async def echo(request: Request) -> PlainTextResponse:
    try:
        return PlainTextResponse(str(len(await read_body(request, 1000))))
    except BodyTooLargeError:
        return PlainTextResponse("too large", status_code=413)
    except BodyTimeoutError:
        return PlainTextResponse("too slow", status_code=408)


@asynccontextmanager
async def server() -> AsyncIterator[int]:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    app = Starlette(routes=[Route("/", echo, methods=["POST"])])
    with sock:
        async with asyncio.timeout(30), asyncio.TaskGroup() as group, serving(group, app, sock):
            yield sock.getsockname()[1]


async def talk(port: int, *pieces: bytes) -> bytes:
    """Send pieces, then read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        return await reader.read()
    finally:
        writer.close()


HEAD = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"


async def test_a_head_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits.Connection, "head_timeout_s", 0.2)
    async with server() as port:
        assert (await talk(port, b"POST / HTTP/1.1\r\nx: ")).startswith(b"HTTP/1.1 408")
        assert (await talk(port)).startswith(b"HTTP/1.1 408"), "nor may a connection say nothing at all"


async def test_a_head_that_is_too_long() -> None:
    async with server() as port:
        assert (await talk(port, HEAD, b"x: " + b"y" * 70_000)).startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("filler", [b"x: " + b"y" * 70_000 + b"\r\n", b"x: y\r\n" * 12_000], ids=["long", "many"])
async def test_a_head_that_is_too_long_but_comes_whole(filler: bytes) -> None:
    tail = b"content-length: 3\r\n\r\nabc"
    small = HEAD.replace(b"connection: close\r\n", b"content-length: 3\r\n") + b"\r\nabc"
    async with server() as port:
        answer = await talk(port, HEAD + filler + tail)
        assert answer.startswith(b"HTTP/1.1 431") and b"200 OK" not in answer
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(small)
        assert (await reader.readuntil(b"\r\n\r\n3")).startswith(b"HTTP/1.1 200")
        writer.write(HEAD + filler + tail)
        assert (await reader.read()).startswith(b"HTTP/1.1 431"), "the second one of a connection too"
        writer.close()
        assert (await talk(port, HEAD + b"x: " + b"y" * 60_000 + b"\r\n" + tail)).startswith(b"HTTP/1.1 200")
        assert (await talk(port, b"BANANA\r\n\r\n")).startswith(b"HTTP/1.1 400")


async def test_a_body_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "BODY_DEADLINE_S", 0.2)
    async with server() as port:
        assert (await talk(port, HEAD + b"content-length: 10\r\n\r\nabc")).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("framing", [b"content-length: 2000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n7d0\r\n"])
async def test_a_body_that_is_too_large(framing: bytes) -> None:
    async with server() as port:
        answer = await talk(port, HEAD + framing + b"z" * 2000 + (b"\r\n0\r\n\r\n" if b"chunked" in framing else b""))
        assert answer.startswith(b"HTTP/1.1 413")


async def test_an_idle_kept_alive_connection_is_not_in_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits.Connection, "head_timeout_s", 0.1)
    request = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc"
    async with server() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        assert (await reader.readuntil(b"\r\n\r\n3")).startswith(b"HTTP/1.1 200")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.4):
                await reader.read(1)
        writer.write(request)
        assert (await reader.readuntil(b"\r\n\r\n3")).startswith(b"HTTP/1.1 200")
        writer.close()


@pytest.mark.parametrize("start", [b"\r\n", b"POST / HTTP/1.1\r\nhos"])
async def test_a_kept_connection_has_a_deadline_for_its_next_head(
    start: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_limits.Connection, "head_timeout_s", 0.1)
    async with server() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc")
        assert (await reader.readuntil(b"\r\n\r\n3")).startswith(b"HTTP/1.1 200")
        writer.write(start)
        assert (await reader.read()).startswith(b"HTTP/1.1 408")
        writer.close()


async def test_too_many_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "MAX_CONNECTIONS", 2)
    async with server() as port:
        kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        with pytest.raises((ConnectionError, AssertionError)):
            assert await talk(port, HEAD + b"content-length: 0\r\n\r\n") != b""
        for _, writer in kept:
            writer.close()
