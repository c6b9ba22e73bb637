"""How results look on a pool machine: tables for people, TSV when piped, JSON on request. Words go to stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

import msgspec

from llorch_pool.estimate import gib
from llorch_wire.pool import Log, PoolStatus, Progress

COLUMNS: dict[str, list[str]] = {
    "ModelInfo": ["name", "bytes", "dtype", "context_length", "architecture", "ref", "revision"],
    "WorkerInfo": ["worker_id", "state", "model", "device", "url", "slots_free", "slots_total", "pid", "detail"],
    "DeviceInfo": ["device", "name", "memory_free_bytes", "promised_bytes", "memory_total_bytes", "driver", "workers"],
    "StopOutcome": ["worker_id", "how", "took_ms"],
    "Finding": ["level", "subject", "text", "repair", "fixed"],
    "FileRecord": ["path", "size", "sha256"],
    "Stray": ["pid", "worker_id", "command"],
}


def emit(value: Any, form: str) -> None:
    """Print a result to stdout as `form`: table, tsv, json, jsonl or name."""
    if value is None:
        return
    rows: Sequence[Any] = value if isinstance(value, list) else [value]
    if isinstance(value, PoolStatus) and form == "table":
        _status(value)
    elif form == "json" or (isinstance(value, PoolStatus) and form == "tsv"):
        print(msgspec.json.format(msgspec.json.encode(value)).decode())
    elif form == "jsonl":
        for row in rows:
            print(msgspec.json.encode(row).decode())
    elif form == "name":
        for row in rows:
            print(cell(row, _columns(row)[0], people=False))
    elif rows:
        _table(rows, people=form == "table")
    elif form == "table":
        print("none", file=sys.stderr)


def _status(status: PoolStatus) -> None:
    """The machine on one screen."""
    free, total = gib(status.disk_free_bytes), gib(status.disk_total_bytes)
    print(f"{status.host}: llorch-pool {status.version}, Python {status.python}")
    print(f"models in {status.models_dir} ({free} of {total} free), workers' files in {status.state_dir}")
    parts = {"devices": status.devices, "models": status.models, "workers": status.workers, "strays": status.strays}
    for name, rows in parts.items():
        if rows or name != "strays":
            print(f"\n{name}: {'' if rows else 'none'}".rstrip())
        if rows:
            _table(rows, people=True)


def use_color(stream: TextIO) -> bool:
    """Whether to colour: a terminal, and neither NO_COLOR (https://no-color.org) nor TERM=dumb is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _columns(row: Any) -> list[str]:
    return COLUMNS.get(type(row).__name__) or list(type(row).__struct_fields__)


def cell(row: Any, column: str, *, people: bool) -> str:
    """One field as text: sizes in GiB for people, bytes for programs; never a tab or a newline."""
    value = getattr(row, column)
    if isinstance(value, list):
        value = ",".join(str(item) for item in value)
    elif isinstance(value, bool):
        value = "yes" if value else "no"
    elif people and column.endswith("bytes"):
        value = gib(value)
    text = "".join(char if char.isprintable() else " " for char in str(value))
    return text or "-"


def _table(rows: Sequence[Any], *, people: bool) -> None:
    columns = _columns(rows[0])
    lines = [[cell(row, column, people=people) for column in columns] for row in rows]
    if not people:
        for line in lines:
            print("\t".join(line))
        return
    header = [column.removesuffix("_bytes").replace("_", " ").upper() for column in columns]
    widths = [max(len(line[at]) for line in [header, *lines]) for at in range(len(columns))]
    for line in [header, *lines]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


class Reporter:
    """Progress and log lines on stderr: one line that is redrawn on a terminal, a line every 5 s elsewhere."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._open = False
        self._last = ("", 0.0)

    def __call__(self, event: Progress | Log) -> None:
        """Show one event."""
        if isinstance(event, Log):
            self._line("" if event.level == "info" else f"{event.level}: ", event.text)
            return
        text = describe(event)
        if self._tty:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
            self._open = True
        elif event.phase != self._last[0] or time.monotonic() - self._last[1] > 5:
            self._last = (event.phase, time.monotonic())
            print(text, file=sys.stderr, flush=True)

    def _line(self, prefix: str, text: str) -> None:
        self.close()
        print(prefix + "".join(char if char.isprintable() or char == "\t" else "?" for char in text), file=sys.stderr)

    def close(self) -> None:
        """End the redrawn line, so that what follows starts on its own."""
        if self._open:
            print(file=sys.stderr)
            self._open = False


def describe(event: Progress) -> str:
    """One line for a progress event: phase, what, how much of how much, rate, time left."""
    parts = [event.phase, event.text]
    if event.done is not None and event.total:
        percent = 100 * event.done // event.total
        amount = f"{gib(event.done)} of {gib(event.total)}" if event.unit == "bytes" else f"{event.done}/{event.total}"
        parts.append(f"{percent:3d} % {amount}")
    if event.rate:
        parts.append(f"{gib(round(event.rate))}/s" if event.unit == "bytes" else f"{event.rate:g}/s")
    if event.eta_s is not None:
        parts.append(f"{event.eta_s:.0f} s left")
    return " ".join(part for part in parts if part)
