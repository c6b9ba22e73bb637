"""Children's output: files of bounded size that the children write themselves, and the lines worth showing.

Read `LogFile` first. A child holds the file itself, not a pipe to us: an `up` that is stopped or busy never blocks the
data plane. Rotation copies and truncates; the child's descriptor is in append mode, so it goes on at the new end.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_BYTES = 10 * 2**20
KEPT_FILES = 3
READ_BYTES = 256 * 2**10
TAIL_BYTES = 16 * 2**10
SHOWN_LEVELS = frozenset({"warning", "error", "critical"})
SHOWN_CHARS = 400
REPEAT_AFTER_S = 30.0
_DULL_FIELDS = frozenset({"event", "level", "timestamp", "logger", "stack", "exceptions", "correlation_id"})


class LogFile:
    """One part's log: `NAME.log`, and `NAME.log.1` … `.3`, the newest first."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._read_to = path.stat().st_size if path.exists() else 0
        self._rest = b""
        self._child_from = 0

    @contextmanager
    def open_for_child(self) -> Generator[int]:
        """A descriptor for a child's stdout and stderr."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._child_from = os.fstat(descriptor).st_size
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def new_lines(self) -> list[str]:
        """Whole lines written since the last call, at most READ_BYTES of them; what is skipped stays in the file."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                if size < self._read_to:
                    self._read_to, self._rest = 0, b""
                if size - self._read_to > READ_BYTES:
                    self._read_to, self._rest = size - READ_BYTES, b""
                file.seek(self._read_to)
                data = self._rest + file.read(READ_BYTES)
                self._read_to = file.tell()
        except FileNotFoundError:
            return []
        *lines, self._rest = data.split(b"\n")
        self._rest = self._rest[-READ_BYTES:]
        return [line.decode("utf-8", "replace") for line in lines]

    def tail(self, count: int = 12) -> list[str]:
        """The last lines of the child that was started last, for people."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(min(self._child_from, size), size - TAIL_BYTES))
                lines = file.read().decode("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return []
        return [plain(line) for line in lines[-count:]]

    def rotate(self) -> bool:
        """Move the content on when the file has grown over its bound."""
        try:
            if self.path.stat().st_size <= self._max_bytes:
                return False
        except FileNotFoundError:
            return False
        for number in range(KEPT_FILES - 1, 0, -1):
            older = self._numbered(number)
            if older.exists():
                older.replace(self._numbered(number + 1))
        shutil.copyfile(self.path, self._numbered(1))
        self._numbered(1).chmod(0o600)
        os.truncate(self.path, 0)
        self._read_to, self._rest, self._child_from = 0, b"", 0
        return True

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


class Highlights:
    """Chooses what of a log is shown: warnings and worse, the same one at most twice a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shown_at: OrderedDict[str, float] = OrderedDict()

    def choose(self, part: str, lines: list[str]) -> list[str]:
        """The lines to show, made readable."""
        chosen: list[str] = []
        now = self._clock()
        for line in lines:
            record = parse(line)
            if record is None or str(record.get("level", "")).lower() not in SHOWN_LEVELS:
                continue
            key = f"{part} {record.get('event')}"
            if now - self._shown_at.get(key, -REPEAT_AFTER_S) < REPEAT_AFTER_S:
                continue
            self._shown_at[key] = now
            self._shown_at.move_to_end(key)
            while len(self._shown_at) > 256:
                self._shown_at.popitem(last=False)
            chosen.append(plain(line))
        return chosen


def parse(line: str) -> dict[str, Any] | None:
    """A structured line's fields, None for any other line."""
    if not line.startswith("{"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def plain(line: str) -> str:
    """A line for people: `event key=value …` of a structured one."""
    record = parse(line)
    if record is None:
        return line[:SHOWN_CHARS]
    fields = [
        f"{key}={value}"
        for key, value in record.items()
        if key not in _DULL_FIELDS and isinstance(value, str | int | float)
    ]
    return " ".join([str(record.get("event", "")), *fields])[:SHOWN_CHARS]
