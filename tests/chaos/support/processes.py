"""Processes of a chaos run: started, killed, stopped, continued, started again, and reaped whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
START_S = 90.0


class Part:
    """One process with a name, a command and a log. Spawn it from the main thread: it dies with that thread."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, env: dict[str, str]) -> None:
        self.name, self.command, self.folder, self.env = name, list(command), folder, env
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log_file = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.busy = asyncio.Lock()
        """Held by the fault that has this process in its hands."""

    def spawn(self) -> None:
        """Start it, or start it again."""
        assert self.process is None or self.process.poll() is not None, f"{self.name} still runs"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
        environment |= {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "XDG_CONFIG_HOME": str(self.folder),
            **self.env,
        }  # fmt: skip
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=environment,
                preexec_fn=die_with_parent(),
            )  # fmt: skip
        self.starts += 1

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs (a stopped process does)."""
        return self.process is not None and self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """A signal to a process that is known to be this one: it hasn't been reaped."""
        if self.alive:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        if self.process is not None:
            self.send(signal.SIGKILL)
            self.process.wait(20)

    async def ended(self, deadline_s: float = 30.0) -> int:
        """Its exit status once it has ended. Raises TimeoutError."""
        assert self.process is not None
        async with asyncio.timeout(deadline_s):
            while (status := self.process.poll()) is None:
                await asyncio.sleep(0.02)
        return status

    def tail(self, lines: int = 30) -> str:
        """The end of its log."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])
        return ""


def die_with_parent() -> Callable[[], None] | None:
    """For `preexec_fn`: the child gets SIGKILL when the thread that started it ends."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(1, signal.SIGKILL, 0, 0, 0)


def children_of(pid: int) -> list[tuple[int, bytes]]:
    """Living children of a process with their command lines."""
    found: list[tuple[int, bytes]] = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append((int(path.name), (path / "cmdline").read_bytes()))
        except OSError:
            continue
    return found


async def until(condition: Callable[[], bool], what: str, deadline_s: float = START_S) -> None:
    """Wait for a condition. Raises TimeoutError that says what for."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline_s:g} s: {what}")
        await asyncio.sleep(0.02)
