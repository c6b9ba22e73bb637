"""How much memory the embedded Redis may take. Read `default_bound`.

Without a bound the queue could take all there is – 5,000 waiting tasks of one tenant, each with a prompt of 4 MiB, are
20 GB – and the kernel would end whatever it likes. At the bound, only admissions are refused (docs/redis-state.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

SHARE = 4
"""A quarter: rewriting the append-only file may take as much again for a while, and the rest is not ours alone."""
LEAST_BYTES = 64 * 2**20


def default_bound(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes for Redis where nobody has said how many: a quarter of what this process may have, at least 64 MiB.

    That is the machine's memory, or the least limit of the control groups that this process is in (versions 1 and 2).
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(LEAST_BYTES, min([machine, *_limits(proc, cgroups)]) // SHARE)


def _limits(proc: Path, cgroups: Path) -> Iterator[int]:
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be the host's, of which only the last part, or nothing, can be seen from inside.
        folder = Path("/", group)
        for one in (folder, *folder.parents):
            limit = _text(root / one.relative_to("/") / name).strip()
            if limit.isdigit() and int(limit) > 0:  # `max` says that there is none
                yield int(limit)


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""
