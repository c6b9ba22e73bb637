"""Bounds the file that this process' stderr goes to, where it is one: `<log>.1` to `<log>.10`, then it begins anew.

Read `OwnLog.rotate` first. Whoever started the worker opened the file and passed it on, to children of ours too, so it
is copied and emptied, never renamed: everybody's next line lands at the new end. Only a file that is open for appending
is touched; in another, the next write would leave a hole as large as what was removed.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from structlog.typing import FilteringBoundLogger as BoundLogger

KEEP_FILES = 10
CHECK_EVERY_S = 2.0
_COPY_BYTES = 1 << 20


class OwnLog:
    """The log at `path`, allowed `limit` bytes before it is rotated."""

    def __init__(self, path: Path, limit: int, keep: int = KEEP_FILES) -> None:
        self._path = path
        self._limit = limit
        self._keep = keep

    @classmethod
    def behind(cls, descriptor: int, limit: int) -> OwnLog | None:
        """The log behind a file descriptor; None where that is no file that can be rotated, or `limit` is 0."""
        if not limit:
            return None
        try:
            status = os.fstat(descriptor)
            appends = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if not (stat.S_ISREG(status.st_mode) and appends and os.path.samestat(status, path.stat())):
                return None
        except OSError:  # closed, deleted, or no /proc
            return None
        return cls(path, limit)

    def is_too_large(self) -> bool:
        """Whether it is time to rotate."""
        try:
            return self._path.stat().st_size > self._limit
        except OSError:
            return False  # it was removed; who wants a new one restarts the worker

    async def keep_bounded(self, logger: BoundLogger) -> None:
        """Rotate whenever it is time, until cancelled; a trouble that lasts is worth one line."""
        complained = False
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            if not self.is_too_large():
                continue
            try:
                await self.rotate()
                complained = False
            except OSError as error:
                if not complained:
                    logger.error("the log can't be rotated and grows on", reason=error.strerror)
                complained = True

    async def rotate(self) -> None:
        """Move older files on, copy the log to `<log>.1`, empty it. Raises OSError; the log then goes on as it is.

        Most of it is copied in a thread. The rest, and what was written meanwhile, is copied on the event loop, where
        nothing of this process can be logged between the last byte copied and the end of the file.
        """
        await asyncio.to_thread(self._move_older)
        copy = Path(f"{self._path}.1")
        try:
            with self._path.open("r+b") as log, _private(copy) as target:
                await asyncio.to_thread(_copy, log, target)
                _copy(log, target)
                target.flush()
                log.truncate(0)
        except OSError:
            await asyncio.to_thread(_remove, copy)
            raise

    def _move_older(self) -> None:
        for number in range(self._keep - 1, 0, -1):
            with suppress(FileNotFoundError):
                Path(f"{self._path}.{number}").replace(f"{self._path}.{number + 1}")


def _private(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    while chunk := source.read(_COPY_BYTES):
        target.write(chunk)
