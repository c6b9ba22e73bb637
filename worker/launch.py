"""How this process starts children that must not outlive it: `python -m MODULE ARGS`, killed when the parent dies.

Read `child_command` first. The kernel signal (PR_SET_PDEATHSIG, Linux prctl(2)) fires when the *thread* that started
the child ends, so children are started from the main thread only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

# Runs in a fresh interpreter, not between fork and exec: a Python callback there can deadlock on another thread's lock.
# Both settings survive the exec. Elsewhere than on Linux the child ends when its pipe does.
_TRAMPOLINE = """
import os, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent process is gone")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def child_command(module: str, *arguments: str) -> list[str]:
    """Command line that becomes `python -P -m module arguments…` and dies with this process."""
    return [sys.executable, "-I", "-S", "-c", _TRAMPOLINE, str(os.getpid()), "-P", "-m", module, *arguments]


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment of a child: without llorch's keys, and with this package on the path where it isn't installed."""
    kept = {name: value for name, value in environment.items() if not name.startswith("LLORCH_")}
    paths = [str(Path(__file__).resolve().parent.parent), *filter(None, [environment.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}
