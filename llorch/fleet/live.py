"""A line for each host while a command runs: redrawn in place on a terminal, plain lines elsewhere. On stderr.

Progress is drawn here from events; the remote side never draws anything and never gets a terminal.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from typing import TextIO

from llorch.output import clean, duration, size
from llorch_wire.pool import Log, Progress

REDRAW_S = 0.1
PLAIN_INTERVAL_S = 5.0


class Live:
    """Shared by the threads of a fan-out. `names` fixes the order of the lines."""

    def __init__(self, names: list[str], *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._names = names
        self._width = max((len(name) for name in names), default=0)
        self._lines: dict[str, str] = {}
        self._lock = threading.Lock()
        self._drawn = 0
        self._drawn_at = 0.0
        self._said: dict[str, tuple[str, float]] = {}
        self._quiet = quiet
        self._redraw = self._stream.isatty() and os.environ.get("TERM") != "dumb" and not quiet

    @property
    def moving(self) -> bool:
        """Whether lines are redrawn in place, so that one that says little does no harm."""
        return self._redraw

    def event(self, name: str, event: Progress | Log) -> None:
        """Show what a host reports."""
        if isinstance(event, Log):
            self.say(name, event.text if event.level == "info" else f"{event.level}: {event.text}")
        else:
            self.set(name, describe(event), phase=event.phase)

    def set(self, name: str, text: str, *, phase: str = "", final: bool = False) -> None:
        """Set a host's line; elsewhere than on a terminal a line is printed for a new phase, and every 5 s."""
        with self._lock:
            self._lines[name] = clean(text)
            if self._redraw:
                if final or time.monotonic() - self._drawn_at > REDRAW_S:
                    self._draw()
                return
            last_phase, last_at = self._said.get(name, ("", 0.0))
            now = time.monotonic()
            if not self._quiet and (final or phase != last_phase or now - last_at > PLAIN_INTERVAL_S):
                self._said[name] = (phase, now)
                print(f"{name}: {clean(text)}", file=self._stream, flush=True)

    def failed(self, name: str) -> None:
        """Show that a host failed. Why is said at the end; of one host alone that is the next line, and will do."""
        if len(self._names) > 1:
            self.set(name, "failed", final=True)

    def say(self, name: str, text: str) -> None:
        """A line that stays."""
        with self._lock:
            self._erase()
            print(f"{name.ljust(self._width)}  {clean(text)}" if name else clean(text), file=self._stream, flush=True)
            if self._redraw:
                self._draw()

    def close(self) -> None:
        """Take the moving lines away; what was said stays."""
        with self._lock:
            self._erase()
            self._stream.flush()
            self._lines.clear()

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0

    def _draw(self) -> None:
        columns, rows = shutil.get_terminal_size()
        self._erase()
        shown = [name for name in self._names if name in self._lines][: max(1, rows - 2)]
        for name in shown:
            # Cut to the terminal's width: a wrapped line would make the cursor's way back wrong.
            self._stream.write(f"{name.ljust(self._width)}  {self._lines[name]}"[: columns - 1] + "\n")
        self._drawn = len(shown)
        self._drawn_at = time.monotonic()
        self._stream.flush()


def describe(event: Progress) -> str:
    """One line for a progress event: phase, what, how much of how much, rate, time left."""
    parts = [event.phase, event.text]
    if event.done is not None and event.total:
        amount = (
            f"{size(event.done)} of {size(event.total)}" if event.unit == "bytes" else f"{event.done}/{event.total}"
        )
        parts.append(f"{100 * event.done // event.total:3d} %  {amount}")
    if event.rate and event.unit == "bytes":
        parts.append(f"{size(event.rate)}/s")
    if event.eta_s is not None:
        parts.append(f"{duration(event.eta_s * 1000)} left")
    return "  ".join(part for part in parts if part)
