"""Server-sent events on the wire: render frames, parse them incrementally (WHATWG HTML, "Server-sent events").

Read `frame` and `SseParser.feed` first. Rendered frames use LF only and one `data` line (JSON has no raw newline).
"""

from __future__ import annotations

from typing import NamedTuple

from llorch_wire.errors import LlorchError

KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
MEDIA_TYPE = "text/event-stream"


class SseOverflowError(LlorchError):
    """A peer sent one event larger than the bound; the connection must be dropped."""


class SseFrame(NamedTuple):
    """One event as read: `data` is UTF-8 bytes, `id` is the last id seen on the stream (None before the first)."""

    event: str
    data: bytes
    id: str | None


def frame(event: str, data: bytes, id: str | None = None) -> bytes:
    """One rendered event, ready to be sent."""
    if id is None:
        return b"event: %b\ndata: %b\n\n" % (event.encode(), data)
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (id.encode(), event.encode(), data)


class SseParser:
    """Incremental parser. `feed` takes what the socket gave and returns the events that it completed.

    CRLF, CR and LF line ends are all understood; comments (keep-alives) are dropped, but count as traffic for the
    caller, who sees that bytes came. An event over `max_event_bytes` raises SseOverflowError.
    """

    def __init__(self, *, max_event_bytes: int = 4 * 2**20) -> None:
        self._buffer = bytearray()
        self._max = max_event_bytes
        self._event = ""
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._id: str | None = None
        self._skip_lf = False

    def feed(self, chunk: bytes) -> list[SseFrame]:
        """Events completed by `chunk`, in order."""
        if self._skip_lf and chunk:
            if chunk[:1] == b"\n":
                chunk = chunk[1:]
            self._skip_lf = False
        if b"\r" in chunk:
            if chunk.endswith(b"\r"):
                self._skip_lf = True
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        self._buffer += chunk
        frames: list[SseFrame] = []
        *lines, rest = self._buffer.split(b"\n")
        if len(rest) + self._data_bytes > self._max:
            raise SseOverflowError(f"an event is larger than {self._max} bytes")
        self._buffer = bytearray(rest)
        for line in lines:
            if not line:
                if self._data:
                    frames.append(SseFrame(self._event or "message", b"\n".join(self._data), self._id))
                self._event, self._data, self._data_bytes = "", [], 0
                continue
            self._field(bytes(line))
        return frames

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._data_bytes += len(value)
            if self._data_bytes > self._max:
                raise SseOverflowError(f"an event is larger than {self._max} bytes")
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"id" and b"\0" not in value:
            self._id = value.decode("utf-8", "replace")
