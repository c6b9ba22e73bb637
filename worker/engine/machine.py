"""What the machine lends this process: cores and memory. No torch, no policy beyond sensible defaults."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

SPIN_COUNT = "3000"
MAX_CPU_KV_BYTES = 4 * 2**30
CPU_KV_SHARE = 0.25


def cores() -> int:
    """Cores that this process may use, by affinity and cgroup quota; at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read_words("/sys/fs/cgroup/cpu.max")
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]) > 0:
        count = min(count, max(1, int(quota[0]) // int(quota[1])))
    return max(1, count)


def default_threads(cores_available: int) -> int:
    """Most threads for an engine: the cores, rounded down to a power of two (see thread_choice for what a step gets).

    A power of two, because elementwise work is split evenly between threads and a split inside a vector register
    would let the number of rows decide how a number is rounded.
    """
    return 1 << (max(1, cores_available).bit_length() - 1)


def settle_threads(threads: int, environment: MutableMapping[str, str]) -> None:
    """Say in the environment how many threads the numeric libraries may use; before torch is imported.

    And how long one spins at a barrier before it sleeps: some microseconds. One that spins on takes the core from the
    thread it waits for, wherever anything else runs on the machine (libgomp's default made a step take 262 ms instead
    of 15); one that sleeps at once is woken too late (twice the time of a small model's step on a quiet machine).
    """
    environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(threads)
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


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
