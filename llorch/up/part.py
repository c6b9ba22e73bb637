"""One child process of `llorch up`: started so that it can't outlive us, waited for, stopped.

Read `Part.spawn` first. PR_SET_PDEATHSIG (prctl(2)) has the kernel kill the child when the *thread* that started it
ends, so `spawn` belongs on the main thread, which is where the event loop of `up` runs.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from llorch.up.logs import LogFile
from llorch.up.plan import Kind, PartPlan

# A fresh interpreter asks for the signal and then becomes the program: between fork and exec of a process that has
# threads, Python code can deadlock. The setting survives exec. Looking at the parent afterwards closes the gap in
# which it may have died before the setting took hold.
_LAUNCHER = """
import os, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    os._exit(0)
os.execv(sys.argv[2], sys.argv[2:])
"""

# Set for one of our children, these would make all of them write the same file or bind the same port.
_NOT_FOR_CHILDREN = ("LLORCH_READY_FILE", "LLORCH_WORKER_READY_FILE", "LLORCH_WORKER_PORT", "LLORCH_WORKER_WORKER_ID")


class Part:
    """A child process and its successors: same name, same command line, same address.

    `wanted` is cleared when it must not be started again.
    """

    def __init__(self, plan: PartPlan, url: str, log: LogFile) -> None:
        self.kind: Kind = plan.kind
        self.name = plan.name
        self.url = url
        self.log = log
        self.wanted = True
        self.ready = False
        self.was_ready = False
        self.own_exits = 0
        """How often it ended by itself, not by a signal."""
        self.deaths: deque[float] = deque(maxlen=64)
        self.begun = 0.0
        """When it was last started, on the monotonic clock."""
        self.released = asyncio.Event()
        """Set with `wanted` false: ends a pause before a restart."""
        self._plan = plan
        self._process: subprocess.Popen[bytes] | None = None
        self._pid: int | None = None

    @property
    def pid(self) -> int | None:
        """The pid of the process that runs, or of the last one that did; None before the first."""
        return self._pid

    @property
    def is_running(self) -> bool:
        """Whether a process was started and its end not yet seen."""
        return self._process is not None

    def spawn(self) -> None:
        """Start the process. Raises OSError where the system refuses."""
        self.ready = False
        self.begun = time.monotonic()
        with self.log.open_for_child() as output:
            self._process = subprocess.Popen(
                tied(self._plan.argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=child_environment(os.environ, self._plan.environment),
                # A session of its own: Ctrl-C on the terminal is for `up` alone, which stops its children in order.
                start_new_session=True,
            )
        self._pid = self._process.pid

    async def exited(self) -> int:
        """Wait for the process' end and return its code, negative for a signal."""
        process = self._process
        assert process is not None
        await _until_exit(process)
        status = process.wait()
        self._process = None
        self.ready = False
        self.deaths.append(time.monotonic())
        if status >= 0:
            self.own_exits += 1
        return status

    def signal(self, number: signal.Signals) -> None:
        """Signal the process, if it runs. It is our child and not yet waited for, so its pid can't be another's."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the process and whatever is in its session's group."""
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                self._process.kill()

    def release(self) -> None:
        """Don't start it again."""
        self.wanted = False
        self.released.set()


async def _until_exit(process: subprocess.Popen[bytes]) -> None:
    """Until the process is a zombie or gone; the caller reaps it."""
    if not hasattr(os, "pidfd_open"):  # not Linux
        await asyncio.to_thread(process.wait)
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    handle = os.pidfd_open(process.pid)
    try:
        loop.add_reader(handle, ended.set)
        await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


def tied(argv: Sequence[str]) -> list[str]:
    """A command line that becomes `argv` and is killed when this process ends."""
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *argv]


def child_environment(environ: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """A child's environment: ours, what the plan adds, and this installation on the path where it isn't installed."""
    kept = {name: value for name, value in environ.items() if name not in _NOT_FOR_CHILDREN}
    roots = [str(Path(__file__).resolve().parents[2]), *filter(None, [environ.get("PYTHONPATH")])]
    return {**kept, **extra, "PYTHONPATH": os.pathsep.join(roots), "PYTHONUNBUFFERED": "1"}


def describe_exit(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
