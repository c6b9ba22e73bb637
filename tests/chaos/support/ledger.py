"""What the clients of a chaos run hold, on disk. Nothing counts as held before it was fsynced. Read `Ledger.write`.

One JSON line an entry; `k` is its kind:

    intent  c task body                                             before the first POST
    ack     task at                                                 202 came
    conn    task n replica after                                    a stream was opened (the n-th of this task)
    ev      task n e=[[name, id, data], …]                          events, as one read gave them
    cancel  task status                                             a cancel was answered 200
    left    task                                                    the client has walked away
    gone    task why                                                an acknowledged task is unknown, or its cursor is
    over    task                                                    the client is done with it
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Ledger:
    """An append-only file with group commit: while one fsync is under way, what comes meanwhile waits for the next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._pending: list[bytes] = []
        self._waiting: asyncio.Future[None] | None = None
        self._wake = asyncio.Event()

    async def write(self, entry: dict[str, Any]) -> None:
        """Returns once the entry is on disk."""
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().create_future()
            self._wake.set()
        self._pending.append(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        await asyncio.shield(self._waiting)

    async def run(self) -> None:
        """Commit until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            lines, self._pending = self._pending, []
            waiting, self._waiting = self._waiting, None
            await asyncio.to_thread(self._commit, b"".join(lines))
            if waiting is not None and not waiting.done():
                waiting.set_result(None)
            await asyncio.sleep(0.01)  # hundreds of streams share one fsync

    def _commit(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Every entry in order. A torn last line is left out."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)
