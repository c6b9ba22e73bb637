"""uvicorn with bounds: header size and time, dead peers, connections. Read `BoundedProtocol` first.

What uvicorn's httptools protocol leaves open, and what closes it here:

    request head of any size               MAX_HEAD_BYTES → 431
    request head that never ends           HEAD_TIMEOUT_S from the first byte (or from the connect) → closed;
                                           while an answer is on its way, from the end of that answer
    body that goes on after the answer     LINGER_S → closed
    peer that vanished without a FIN       TCP keep-alive and TCP_USER_TIMEOUT, together below 20 s → closed
    malformed HTTP                         answered in our error shape
    more connections than allowed          closed at once (requests are bounded earlier, with 429, in context.py)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Generator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llorch_wire.errors import ErrorCode, LlorchError
from orchestratord.api.context import new_correlation_id

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 10.0
LINGER_S = 10.0
PEER_TIMEOUT_MS = 12_000
_HEAD_TOO_LARGE = f"the request head is larger than {MAX_HEAD_BYTES} bytes; send fewer or shorter headers"

# Linux: probe an idle peer after 5 s, every 3 s, three times; elsewhere the system's defaults apply.
_TCP_OPTIONS = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", PEER_TIMEOUT_MS))


class HeadTooLargeError(LlorchError):
    """A request's head is larger than the bound."""


class BoundedServer(uvicorn.Server):
    """uvicorn's server, without its signal handlers: the program has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals alone."""
        yield


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    _head_bytes = 0
    _parsed_bytes = 0
    _in_head = True
    _head_begun = False
    _head_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start the clock for the first request's head."""
        super().connection_made(transport)
        limit = self.config.limit_concurrency
        if limit is not None and len(self.connections) >= limit:
            transport.abort()
            return
        _watch_peer(transport.get_extra_info("socket"))
        self._arm_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop every clock."""
        self._stop_head_timer()
        self._stop_linger_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head before they are parsed."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and not self._is_answering():  # any byte, for uvicorn stops its own clock at any byte
            self._arm_head_timer()
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, ErrorCode.INVALID_PARAMS, _HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        """A request begins; hand the app a way to cut this connection at once."""
        super().on_message_begin()
        self._head_begun = True
        self._parsed_bytes = 0
        self.scope["extensions"] = {"llorch.connection": {"abort": self.transport.abort}}

    def on_url(self, url: bytes) -> None:
        """Count what the parser has seen: a head that comes whole, in one piece, is bounded too."""
        self._parsed_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count, as for the URL."""
        self._parsed_bytes += len(name) + len(value) + len(b": \r\n")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete: from here the body's own bounds count."""
        if self._parsed_bytes > MAX_HEAD_BYTES:
            raise HeadTooLargeError  # the parser stops, and uvicorn asks for a 400
        self._in_head = self._head_begun = False
        self._stop_head_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next byte belongs to another head."""
        self._in_head = True
        self._head_bytes = 0
        self._stop_linger_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Answered before the body was complete: give the client a while to stop sending."""
        unfinished = self.cycle.more_body
        super().on_response_complete()
        if unfinished and not self.transport.is_closing():
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.abort)
        if self._head_begun and not self._is_answering():
            self._arm_head_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer what isn't HTTP, or has too large a head, in our own shape."""
        if self._parsed_bytes > MAX_HEAD_BYTES:
            self._refuse(431, ErrorCode.INVALID_PARAMS, _HEAD_TOO_LARGE)
        else:
            self._refuse(400, ErrorCode.INVALID_PARAMS, "this is not a valid HTTP/1.1 request")

    def _refuse(self, status: int, code: ErrorCode, message: str) -> None:
        identity = new_correlation_id()
        error: dict[str, Any] = {"code": code.value, "message": message, "param": "head", "retriable": False}
        body = json.dumps({"error": {**error, "correlation_id": identity}}).encode()
        reason = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}[status]
        self.transport.write(
            b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"x-correlation-id: %b\r\nconnection: close\r\n\r\n%b"
            % (status, reason, len(body), identity.encode(), body)
        )
        self.transport.close()

    def _is_answering(self) -> bool:
        """Whether an answer is on its way: until it is complete, nothing that follows the request may cut it short,
        least of all a line end after the body, which RFC 9112 (2.2) has a server ignore."""
        cycle: Any = self.cycle  # None before the first request, whatever its type says
        return cycle is not None and not cycle.response_complete

    def _arm_head_timer(self) -> None:
        if self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_linger_timer(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None


def _watch_peer(connection: socket.socket | None) -> None:
    """Have the kernel notice a peer that is gone without a word."""
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in _TCP_OPTIONS:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def make_server(app: Any, *, max_connections: int, graceful_s: float) -> BoundedServer:
    """A server for `app`; give it bound sockets with `serve(sockets=[...])`."""
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=2 * max_connections,  # room for those who ask for /health while requests are refused
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(graceful_s)),
        backlog=2048,
    )
    return BoundedServer(config)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
