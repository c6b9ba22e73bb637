"""uvicorn with bounds: header size and time, dead peers, connections. Read `Connection` first.

What uvicorn's httptools protocol leaves open, and what closes it here (heads: see llorch_wire.bounded_http):

    request head of any size               431
    request head that never ends           closed
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

from llorch_wire.bounded_http import BoundedProtocol
from llorch_wire.errors import ErrorCode
from orchestratord.api.context import new_correlation_id

LINGER_S = 10.0
PEER_TIMEOUT_MS = 12_000

# Linux: probe an idle peer after 5 s, every 3 s, three times; elsewhere the system's defaults apply.
_TCP_OPTIONS = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", PEER_TIMEOUT_MS))


class BoundedServer(uvicorn.Server):
    """uvicorn's server, without its signal handlers: the program has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals alone."""
        yield


class Connection(BoundedProtocol):
    """One connection."""

    _linger_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Refuse connections over the bound, and have the kernel watch the others' peers."""
        super().connection_made(transport)
        limit = self.config.limit_concurrency
        if limit is not None and len(self.connections) >= limit:
            transport.abort()
            return
        _watch_peer(transport.get_extra_info("socket"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop every clock."""
        self._stop_linger_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A request begins; hand the app a way to cut this connection at once."""
        super().on_message_begin()
        self.scope["extensions"] = {"llorch.connection": {"abort": self.transport.abort}}

    def on_message_complete(self) -> None:
        """The body has come whole."""
        self._stop_linger_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Answered before the body was complete: give the client a while to stop sending."""
        unfinished = self.cycle.more_body
        super().on_response_complete()
        if unfinished and not self.transport.is_closing():
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.abort)

    def head_too_large(self) -> None:
        """431."""
        message = f"the request head is larger than {self.max_head_bytes} bytes; send fewer or shorter headers"
        self._refuse(431, ErrorCode.INVALID_PARAMS, message)

    def malformed(self) -> None:
        """400, in our own shape."""
        self._refuse(400, ErrorCode.INVALID_PARAMS, "this is not a valid HTTP/1.1 request")

    def head_too_slow(self) -> None:
        """Closed without a word: nobody waits for one."""
        self.transport.abort()

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
        http=Connection,
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
