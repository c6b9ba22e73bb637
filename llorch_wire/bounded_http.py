"""uvicorn's HTTP/1.1 protocol with bounds on what a request's head may cost, for every server of the house.

Read `BoundedProtocol` first. uvicorn bounds none of these with httptools:

    request head of any size     max_head_bytes → `head_too_large`
    request head that never ends head_timeout_s from the first byte (or from the connect) → `head_too_slow`;
                                 while an answer is on its way, from the end of that answer
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llorch_wire.errors import LlorchError


class HeadTooLargeError(LlorchError):
    """A request's head is larger than the bound."""


class BoundedProtocol(HttpToolsProtocol, ABC):
    """One connection. A subclass says how it refuses; `transport` is closed by that."""

    max_head_bytes = 64 * 1024
    head_timeout_s = 10.0

    _head_bytes = 0
    _parsed_bytes = 0
    _in_head = True
    _head_begun = False
    _head_timer: asyncio.TimerHandle | None = None

    # ---- what a subclass says

    @abstractmethod
    def head_too_large(self) -> None:
        """Answer, and close."""

    @abstractmethod
    def malformed(self) -> None:
        """What came isn't HTTP: answer, and close."""

    @abstractmethod
    def head_too_slow(self) -> None:
        """Answer, if at all, and close."""

    # ---- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start the clock for the first request's head."""
        super().connection_made(transport)
        self._arm_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head before they are parsed."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and not self._is_answering():  # any byte, for uvicorn stops its own clock at any byte
            self._arm_head_timer()
        if self._in_head and self._head_bytes > self.max_head_bytes and not self.transport.is_closing():
            self.head_too_large()

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._head_begun = True
        self._parsed_bytes = 0

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
        if self._parsed_bytes > self.max_head_bytes:
            raise HeadTooLargeError  # the parser stops, and uvicorn asks for a 400
        self._in_head = self._head_begun = False
        self._stop_head_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next byte belongs to another head."""
        self._in_head = True
        self._head_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A head that began meanwhile has its time from now on."""
        super().on_response_complete()
        if self._head_begun and not self._is_answering():
            self._arm_head_timer()

    def send_400_response(self, msg: str) -> None:
        """The parser gave up: what came isn't HTTP, or has too large a head."""
        if self._parsed_bytes > self.max_head_bytes:
            self.head_too_large()
        else:
            self.malformed()

    def _is_answering(self) -> bool:
        """Whether an answer is on its way: until it is complete, nothing that follows the request may cut it short,
        least of all a line end after the body, which RFC 9112 (2.2) has a server ignore."""
        cycle: Any = self.cycle  # None before the first request, whatever its type says
        return cycle is not None and not cycle.response_complete

    def _arm_head_timer(self) -> None:
        if self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.head_timeout_s, self.head_too_slow)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
