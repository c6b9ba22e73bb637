"""Frames over a socket: a 4-byte little-endian length and a msgpack message. The engine process' end; no asyncio.

Read `EngineChannel.receive` first: it doesn't wait while the engine has work, and waits without spinning otherwise.
"""

from __future__ import annotations

import select
import socket

import msgspec

from worker.engine.protocol import MAX_FRAME_BYTES, FromEngine, ToEngine

_READ_BYTES = 256 * 1024


class ChannelClosedError(Exception):
    """The other side is gone, or said something that isn't a frame."""


class EngineChannel:
    """Owns the socket on a file descriptor that the parent passed down."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        self._buffer = bytearray()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def send(self, message: FromEngine) -> None:
        """Write one message; waits while the other side is slow to read. Raises ChannelClosedError."""
        body = self._encoder.encode(message)
        try:
            self._socket.sendall(len(body).to_bytes(4, "little") + body)
        except OSError as error:
            raise ChannelClosedError("the worker's HTTP process is gone") from error

    def receive(self, *, wait: bool) -> list[ToEngine]:
        """Every message that has arrived; with `wait`, at least one. Raises ChannelClosedError."""
        messages = self._frames()
        while True:
            readable, _, _ = select.select([self._socket], [], [], None if wait and not messages else 0)
            if not readable:
                return messages
            try:
                data = self._socket.recv(_READ_BYTES)
            except OSError as error:
                raise ChannelClosedError("the worker's HTTP process is gone") from error
            if not data:
                raise ChannelClosedError("the worker's HTTP process is gone")
            self._buffer += data
            messages.extend(self._frames())

    def _frames(self) -> list[ToEngine]:
        messages: list[ToEngine] = []
        while len(self._buffer) >= 4:
            length = int.from_bytes(self._buffer[:4], "little")
            if length > MAX_FRAME_BYTES:
                raise ChannelClosedError(f"a frame of {length} bytes is longer than any message")
            if len(self._buffer) < 4 + length:
                break
            try:
                messages.append(self._decoder.decode(bytes(self._buffer[4 : 4 + length])))
            except msgspec.DecodeError as error:
                raise ChannelClosedError(f"not a message: {error}") from error
            del self._buffer[: 4 + length]
        return messages

    def close(self) -> None:
        """Close the socket; the other side sees the end of the stream."""
        self._socket.close()
