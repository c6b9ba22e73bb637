"""Says in words why an engine process ended, and whether starting it again can help. Pure but for two small readers.

Read `explain` first.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_OUT_OF_VRAM = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
USAGE_STATUS = 2
"""What a program ends with that doesn't take its command line (argparse); another start would end the same way."""
_OWN_FAULTS = frozenset({"SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV"})
_CGROUP = Path("/sys/fs/cgroup")


class Death(NamedTuple):
    """`reason` is a sentence without a full stop; it never holds what the engine printed."""

    reason: str
    code: str
    unexplained: bool = False
    """The engine broke down by itself, for a reason that its status doesn't tell."""


def explain(
    returncode: int | None, stderr_tail: Sequence[str], *, oom_kills: int, connection_failure: str | None = None
) -> Death:
    """Reason for a process' end. `oom_kills`: kills by the kernel in this control group since it was started."""
    if any(mark in line for line in stderr_tail for mark in _OUT_OF_VRAM):
        return Death("the engine ran out of GPU memory; lower --slots, --kv-memory or --max-model-len", "VRAM_OOM")
    if connection_failure is not None:
        return Death(connection_failure, "INTERNAL")
    if returncode is None:
        return Death("the engine closed its connection", "INTERNAL")
    if returncode < 0:
        name = _signal_name(-returncode)
        if name == "SIGKILL" and oom_kills > 0:
            return Death(
                "the kernel killed the engine because memory ran out; lower --kv-memory or --slots, or add memory",
                "INTERNAL",
            )
        return Death(f"the engine was killed by {name}", "INTERNAL", unexplained=name in _OWN_FAULTS)
    if returncode == USAGE_STATUS:
        return Death("the engine doesn't take one of its options; the log says which, correct it", "INTERNAL")
    return Death(f"the engine ended with status {returncode}", "INTERNAL", unexplained=True)


def count_oom_kills(root: Path = _CGROUP) -> int:
    """Processes that the kernel's OOM killer ended in this process' control group (v2) so far; 0 where unknown."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next((line.partition("::")[2] for line in lines if line.startswith("0::")), "/")
        for folder in (root / own.lstrip("/"), root):
            events = folder / "memory.events"
            if events.is_file():
                for line in events.read_text().splitlines():
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return 0


def restart_delay_s(recent_deaths: int) -> float:
    """Pause before the next start: none for the first two deaths in a row, then 1 s doubling up to 300 s."""
    return 0.0 if recent_deaths <= 2 else min(300.0, 2.0 ** (recent_deaths - 3))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
