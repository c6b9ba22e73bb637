"""Which process is meant, and signals that can't hit another one.

A pid alone is reused; (pid, start time, boot id) is not. On Linux a pidfd pins the process between the check and the
signal; elsewhere the check is repeated right before it. Read `Identity` first.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
_LINUX = sys.platform == "linux"


class Identity(NamedTuple):
    """A process for good: `start_time` is field 22 of /proc/<pid>/stat, in clock ticks since boot (proc(5))."""

    pid: int
    start_time: int
    boot_id: str


def boot_id() -> str:
    """New at every boot of the kernel."""
    if _LINUX:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return _said(["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"])


def start_time(pid: int) -> int | None:
    """Start time of a process, None if there is none (a zombie counts as none: it will not run again)."""
    if not _LINUX:
        return _start_time_by_ps(pid)
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The command in parentheses may hold spaces and parentheses itself: split behind the last one.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _start_time_by_ps(pid: int) -> int | None:
    text = _said(["/bin/ps", "-o", "lstart=", "-p", str(pid)])
    if not text:
        return None
    import calendar
    import time

    return calendar.timegm(time.strptime(text, "%a %b %d %H:%M:%S %Y"))


def _said(command: list[str]) -> str:
    """What a program says on stdout. (Not on Linux, which has /proc: so its import stays here.)"""
    import subprocess

    done = subprocess.run(command, capture_output=True, text=True, timeout=5, env={"LC_ALL": "C"})
    return done.stdout.strip()


def identify(pid: int) -> Identity | None:
    """Identity of a running process."""
    started = start_time(pid)
    return None if started is None else Identity(pid, started, boot_id())


def is_alive(process: Identity) -> bool:
    """Whether exactly this process still runs."""
    return process.boot_id == boot_id() and start_time(process.pid) == process.start_time


def send(process: Identity, number: signal.Signals, *, group: bool = False) -> bool:
    """Signal exactly this process, or its process group when it leads one. False if it is gone.

    A group has no pidfd; but a group's id stays taken while its leader is there, and the pidfd tells that it is.
    """
    with _pinned(process) as alive:
        if not alive:
            return False
        with contextlib.suppress(ProcessLookupError):
            if group and os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, number)
            else:
                os.kill(process.pid, number)
            return True
    return False


class _pinned:  # noqa: N801 - reads as a verb at its only call
    """Hold a pidfd for a process while its identity is checked and used.

    While the pidfd is open and the process not reaped the pid can't be given to another one; a process that ended in
    between makes the pidfd readable, which is checked last.
    """

    def __init__(self, process: Identity) -> None:
        self._process = process
        self._fd: int | None = None

    def __enter__(self) -> bool:
        if _LINUX and hasattr(os, "pidfd_open"):
            try:
                self._fd = os.pidfd_open(self._process.pid)
            except ProcessLookupError:
                return False
            except OSError:
                self._fd = None  # a kernel before 5.3: the check alone has to do
        if not is_alive(self._process):
            return False
        return self._fd is None or not select.select([self._fd], [], [], 0)[0]

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)


class Marked(NamedTuple):
    """A process whose environment carries a marker."""

    process: Identity
    value: str
    command: str


def marked_processes(variable: str) -> list[Marked]:
    """Own processes with `variable` in their environment as it was when they started (Linux; elsewhere none).

    A marker is inherited, so this also finds the children of a dead parent.
    """
    found: list[Marked] = []
    if not _LINUX:
        return found
    prefix = variable.encode() + b"="
    boot = boot_id()
    for entry in os.scandir(_PROC):
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        try:
            if entry.stat().st_uid != os.getuid():
                continue
            environ = (_PROC / entry.name / "environ").read_bytes()
            hit = next((item for item in environ.split(b"\0") if item.startswith(prefix)), None)
            started = start_time(pid) if hit is not None else None
            if hit is None or started is None:
                continue
            command = (_PROC / entry.name / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        shown = b" ".join(command).decode("utf-8", "replace").strip()
        found.append(Marked(Identity(pid, started, boot), hit[len(prefix) :].decode("utf-8", "replace"), shown[:200]))
    return found
