"""Bounds on what an HTTP client may cost before a handler sees it: header bytes, header time, connections, body.

Read `BoundedHttpProtocol` and `read_body` first. uvicorn bounds none of these with httptools.
"""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle

from starlette.requests import ClientDisconnect, Request
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llorch_wire.errors import LlorchError

MAX_HEADER_BYTES = 64 * 1024
HEADER_DEADLINE_S = 15.0
BODY_DEADLINE_S = 60.0
MAX_CONNECTIONS = 8192
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\n"


class HeadTooLargeError(LlorchError):
    """The request's head is larger than the bound."""


class BodyTooLargeError(LlorchError):
    """The body is larger than the bound."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is larger than {limit} bytes; send less")


class BodyTimeoutError(LlorchError):
    """The body didn't come within its deadline."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with a limit on the bytes and the time that a request's head may take.

    A request head starts with the first byte after the previous request was complete; an idle kept-alive connection
    isn't in a head. Over the limit: 431 or a closed connection.
    """

    _head_bytes = 0
    _parsed_bytes = 0
    _in_head = False
    _head_timer: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Refuse connections over the bound; a new one must send its first head in time."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        self._start_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count bytes while a head is being read."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse(TOO_LARGE)

    def on_message_begin(self) -> None:
        """A head starts."""
        super().on_message_begin()
        self._parsed_bytes = 0
        if not self._in_head:
            self._start_head()

    def on_url(self, url: bytes) -> None:
        """Count what the parser has seen: a head that comes whole, in one piece, is bounded too."""
        self._parsed_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count, as for the URL."""
        self._parsed_bytes += len(name) + len(value) + len(b": \r\n")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete: what follows is bounded by `read_body`."""
        self._end_head()
        if self._parsed_bytes > MAX_HEADER_BYTES:
            raise HeadTooLargeError  # the parser stops, and uvicorn asks for a 400
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser refused, and what was refused to it."""
        if self._parsed_bytes > MAX_HEADER_BYTES:
            self._refuse(TOO_LARGE)
        else:
            super().send_400_response(msg)

    def _start_head(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._head_timer = self.loop.call_later(HEADER_DEADLINE_S, self._too_slow)

    def _end_head(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        if self._in_head and not self.transport.is_closing():
            self._refuse(b"HTTP/1.1 408 Request Timeout\r\n")

    def _refuse(self, status_line: bytes) -> None:
        self._end_head()
        self.transport.write(status_line + b"connection: close\r\ncontent-length: 0\r\n\r\n")
        self.transport.close()


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body. Raises BodyTooLargeError, BodyTimeoutError or starlette's ClientDisconnect."""
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > limit:
        raise BodyTooLargeError(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise BodyTooLargeError(limit)
    except TimeoutError:
        raise BodyTimeoutError(f"the body didn't come within {BODY_DEADLINE_S:.0f} s; send it again") from None
    return bytes(body)


__all__ = ["BodyTimeoutError", "BodyTooLargeError", "BoundedHttpProtocol", "ClientDisconnect", "read_body"]
