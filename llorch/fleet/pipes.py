"""The three pipes of a process, none of which can block its caller, who has a deadline. Read `Pipes.step` first.

An ssh that is stuck (its connection is dead, or the shared one is) takes nothing more from its stdin; a write that
waits for it would wait for good.
"""

from __future__ import annotations

import os
import selectors
import subprocess
from typing import Any, BinaryIO

from llorch.fleet import connection

CHUNK_BYTES = 1 << 16
MAX_STDERR_BYTES = 64 << 10


class Pipes:
    """Sends `data`, then what `source` holds, as the process takes it; keeps the newest of its stderr."""

    def __init__(self, process: subprocess.Popen[bytes], data: bytes = b"", source: BinaryIO | None = None) -> None:
        self._process, self._data, self._source = process, data, source
        self._selector = selectors.DefaultSelector()
        self._reading = 0
        for stream in (process.stdout, process.stderr):
            self._selector.register(_there(stream), selectors.EVENT_READ)
            self._reading += 1
        self._stdin = _there(process.stdin).fileno()
        os.set_blocking(self._stdin, False)
        self._sending = bool(data) or source is not None
        if self._sending:
            self._selector.register(self._stdin, selectors.EVENT_WRITE)
        self.stderr = bytearray()

    def __enter__(self) -> Pipes:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()

    @property
    def open(self) -> bool:
        """Whether the process may still say something."""
        return self._reading > 0

    def step(self, seconds: float = 0.1) -> bytes:
        """Wait a moment for anything to do, and do it. What came on stdout."""
        found = b""
        for key, _ in self._selector.select(seconds):
            if key.fd == self._stdin:
                self._send()
            elif not (data := os.read(key.fd, CHUNK_BYTES)):
                self._selector.unregister(key.fileobj)
                self._reading -= 1
            elif key.fileobj is self._process.stdout:
                found += data
            else:
                self.stderr += data
                del self.stderr[:-MAX_STDERR_BYTES]
        return found

    def tick(self) -> None:
        """A sign of life on stdin, when everything is sent and there is room for it."""
        if not self._sending:
            self._write(b"\n")

    def hang_up(self) -> None:
        """Close stdin, the lifeline."""
        self._stop_sending()
        self._stdin = -1
        connection.close_quietly(self._process.stdin)

    def _send(self) -> None:
        if not self._data and self._source is not None:
            self._data = self._source.read(CHUNK_BYTES)
        sent = self._write(self._data) if self._data else None
        self._data = self._data[sent:] if sent is not None else b""
        if sent is None or not (self._data or self._source):
            self._stop_sending()

    def _write(self, data: bytes) -> int | None:
        """How much of it the pipe took; None when nobody reads it any more."""
        try:
            return os.write(self._stdin, data)
        except BlockingIOError:
            return 0
        except OSError:
            return None

    def _stop_sending(self) -> None:
        if self._sending:
            self._sending = False
            self._selector.unregister(self._stdin)


def _there(stream: Any) -> Any:
    assert stream is not None
    return stream
