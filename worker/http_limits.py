"""Bounds on what an HTTP client may cost before a handler sees it: header bytes, header time, connections, body.

Read `Connection` and `read_body` first; the bounds on heads are llorch_wire.bounded_http's.
"""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from llorch_wire.bounded_http import BoundedProtocol
from llorch_wire.errors import LlorchError

BODY_DEADLINE_S = 60.0
MAX_CONNECTIONS = 8192


class BodyTooLargeError(LlorchError):
    """The body is larger than the bound."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is larger than {limit} bytes; send less")


class BodyTimeoutError(LlorchError):
    """The body didn't come within its deadline."""


class Connection(BoundedProtocol):
    """One connection: over a bound it gets a status line, or is closed."""

    head_timeout_s = 15.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Refuse connections over the bound."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()

    def head_too_large(self) -> None:
        """431."""
        self._refuse(b"431 Request Header Fields Too Large")

    def malformed(self) -> None:
        """400."""
        self._refuse(b"400 Bad Request")

    def head_too_slow(self) -> None:
        """408."""
        if not self.transport.is_closing():
            self._refuse(b"408 Request Timeout")

    def _refuse(self, status: bytes) -> None:
        self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
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


__all__ = ["BodyTimeoutError", "BodyTooLargeError", "ClientDisconnect", "Connection", "read_body"]
