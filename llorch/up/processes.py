"""Which process is which: a pid is reused, a pid with its start time is not (proc(5), pidfd_open(2))."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is being torn down doesn't."""
    return pid > 0 and _stat(pid, 0) not in (None, "Z", "X", "x")


def start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot: with its pid, that names it. None for a dead one."""
    return _stat(pid, 19) if is_alive(pid) else None


def _stat(pid: int, field: int) -> str | None:
    """Field 3 + `field` of /proc/PID/stat (proc(5)); what comes before may hold spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[field]
    except (OSError, IndexError):
        return None


def kill_if(pid: int, started: str) -> None:
    """SIGKILL, if this pid is still that process: the descriptor pins it between look and signal."""
    with contextlib.suppress(OSError):
        handle = os.pidfd_open(pid)
        try:
            if start_time(pid) == started:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)
