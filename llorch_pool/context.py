"""What a running command has: a place to report to, a way to be stopped, and the environment it may read.

Every wait in llorch-pool goes through `Context.wait`, every loop calls `Context.check`: that is how a closed
connection, Ctrl-C or the deadline ends a command within moments, after it has cleaned up.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from llorch_pool.errors import AbortedError
from llorch_pool.paths import Paths
from llorch_wire.pool import Log, Progress

Emit: TypeAlias = Callable[[Progress | Log], None]


class Context:
    """Shared by all threads of one command."""

    def __init__(self, emit: Emit, *, environ: Mapping[str, str] | None = None, timeout_s: float | None = None) -> None:
        self.environ: Mapping[str, str] = dict(os.environ if environ is None else environ)
        self.paths = Paths.from_environ(self.environ)
        self._emit = emit
        self._stop = threading.Event()
        self._reason: AbortedError | None = None
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._last_progress = 0.0

    def abort(self, reason: str, *, deadline: bool = False) -> None:
        """Ask the command to stop; the first reason given counts. Safe from any thread."""
        if self._reason is None:
            self._reason = AbortedError(reason, deadline=deadline)
        self._stop.set()

    @property
    def aborted(self) -> bool:
        """Whether the command has been asked to stop."""
        return self._stop.is_set()

    def check(self) -> None:
        """Raise AbortedError if the command has to stop."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.abort(f"not done within {self._timeout_s:g} s", deadline=True)
        if self._reason is not None:
            raise self._reason

    def wait(self, seconds: float) -> None:
        """Sleep up to `seconds`; raise AbortedError as soon as the command has to stop."""
        if self._deadline is not None:
            seconds = min(seconds, max(0.0, self._deadline - time.monotonic()))
        self._stop.wait(seconds)
        self.check()

    def log(self, text: str, level: Literal["info", "warning", "error"] = "info") -> None:
        """A line for the operator."""
        self._emit(Log(text=text, level=level))

    def progress(self, event: Progress, *, force: bool = False) -> None:
        """Report where the command is, at most ten times a second (`force` for a change of phase)."""
        now = time.monotonic()
        if force or now - self._last_progress >= 0.1:
            self._last_progress = now
            self._emit(event)
