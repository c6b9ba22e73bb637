"""The HTTP process' end of the pipe to its engine: frames in and out, and what the engine still owes an answer for.

Read `EngineClient.data_received` first. The counterpart is `worker/engine/channel.py`.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import cast

import msgspec

from worker.engine.protocol import (
    MAX_FRAME_BYTES,
    AddSequence,
    CancelSequence,
    FromEngine,
    Shutdown,
    StepOutput,
    ToEngine,
)

_LENGTH = struct.Struct("<I")


class EngineClient(asyncio.Protocol):
    """One connection to one engine process. `on_message` runs on the loop for each message.

    What the engine says is decoded strictly: anything that isn't a message of the protocol closes the connection, and
    the supervisor replaces the process.
    """

    def __init__(self, on_message: Callable[[FromEngine], None], clock: Callable[[], float]) -> None:
        self._on_message = on_message
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._owed: dict[str, int] = {}  # sequence → prompt tokens that it still has to compute
        self.closed = asyncio.Event()
        self.failure: str | None = None
        """Why the connection was closed from this side."""
        self.last_sign_at = clock()
        """When the engine last said something, or got work after having none."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The pipe is open."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's isn't a subclass

    def connection_lost(self, exc: Exception | None) -> None:
        """The engine is gone."""
        self.closed.set()

    def data_received(self, data: bytes) -> None:
        """Take what came and hand on every complete message."""
        self.last_sign_at = self._clock()
        self._buffer += data
        start, size = 0, len(self._buffer)
        while size - start >= 4 and not self.closed.is_set():
            length = _LENGTH.unpack_from(self._buffer, start)[0]
            if length > MAX_FRAME_BYTES:
                return self.fail(f"the engine sent a frame of {length} bytes")
            if size - start < 4 + length:
                break
            try:
                with memoryview(self._buffer) as view:
                    message = self._decoder.decode(view[start + 4 : start + 4 + length])
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                return self.fail(f"the engine sent what isn't a message ({type(error).__name__})")
            start += 4 + length
            self._deliver(message)
        del self._buffer[:start]

    def add(self, sequence: AddSequence) -> None:
        """Start a sequence; nothing after the engine's death."""
        if not self._owed:
            self.last_sign_at = self._clock()
        self._owed[sequence.sequence_id] = len(sequence.prompt_token_ids) + len(sequence.output_token_ids)
        self._send(sequence)

    def cancel(self, sequence_id: str) -> None:
        """Stop a sequence."""
        self._send(CancelSequence(sequence_id=sequence_id))

    def shut_down(self) -> None:
        """Ask the process to end."""
        self._send(Shutdown())

    def close(self) -> None:
        """Close the pipe."""
        if self._transport is not None:
            self._transport.abort()

    def fail(self, reason: str) -> None:
        """Close the pipe because the engine can't be trusted any more."""
        self.failure = reason
        self.close()
        self.closed.set()

    def silent_for(self, now: float, *, seconds_per_prompt_token: float) -> float:
        """Seconds that the engine has owed an answer without a sign of life, less what its prompts may take it."""
        if not self._owed:
            return 0.0
        return now - self.last_sign_at - seconds_per_prompt_token * sum(self._owed.values())

    def _deliver(self, message: FromEngine) -> None:
        if isinstance(message, StepOutput):
            for token in message.tokens:
                if self._owed.get(token.sequence_id):
                    self._owed[token.sequence_id] = 0
            for end in message.ended:
                self._owed.pop(end.sequence_id, None)
        self._on_message(message)

    def _send(self, message: ToEngine) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        body = self._encoder.encode(message)
        self._transport.write(_LENGTH.pack(len(body)) + body)
