"""What the machine lends this process: cores and memory. No torch, no policy beyond sensible defaults."""

from __future__ import annotations

import os
from pathlib import Path

MAX_CPU_KV_BYTES = 4 * 2**30
CPU_KV_SHARE = 0.25


def cores() -> int:
    """Cores that this process may use, by affinity and cgroup quota; at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read_words("/sys/fs/cgroup/cpu.max")
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]) > 0:
        count = min(count, max(1, int(quota[0]) // int(quota[1])))
    return max(1, count)


def default_threads(cores_available: int, workers: int) -> int:
    """Threads for one of `workers` engines: its share of the cores, rounded down to a power of two.

    A power of two, because elementwise work is split evenly between threads and a split inside a vector register
    would let the number of rows decide how a number is rounded.
    """
    share = max(1, cores_available // max(1, workers))
    return 1 << (share.bit_length() - 1)


def available_memory_bytes() -> int:
    """Memory that can still be taken without swapping, within the cgroup's limit."""
    available = 2**62
    for line in _read_lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = _read_words("/sys/fs/cgroup/memory.max"), _read_words("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit() and used[0].isdigit():
        available = min(available, max(0, int(limit[0]) - int(used[0])))
    if available == 2**62 and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return available


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text("ascii", "replace").splitlines()
    except OSError:
        return []


def _read_words(path: str) -> list[str]:
    lines = _read_lines(path)
    return lines[0].split() if lines else []
