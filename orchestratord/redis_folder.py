"""One embedded Redis for each data folder: a lock that this process and its server hold together.

Read `lock_folder`.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import time
from pathlib import Path

from llorch_wire.errors import LlorchError

HOLDER_S = 10.0


class EmbeddedRedisError(LlorchError):
    """The embedded Redis can't run; the message says why and what to do."""


async def lock_folder(folder: Path, url: str) -> int:
    """Takes the folder's lock and returns its descriptor, which the server must inherit: the lock is free again when
    both have ended. `url` is where the holder's server would be reached. Raises EmbeddedRedisError, naming a living
    holder."""
    path = folder / "redis.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + HOLDER_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = _holder(path)
            # A killed holder's server lives for some milliseconds more, with the lock that it inherited.
            if (holder is not None and _is_alive(holder)) or time.monotonic() > deadline:
                os.close(descriptor)
                who = "another process" if holder is None else f"process {holder[0]}"
                raise EmbeddedRedisError(
                    f"{who} runs a Redis on the data folder {folder} already: stop it, give this one another "
                    f"--data-dir, or use that Redis with --redis-url {url}"
                ) from None
        await asyncio.sleep(0.05)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "started": _start_time(os.getpid())}).encode(), 0)
    return descriptor


def _holder(lock: Path) -> tuple[int, str | None] | None:
    try:
        content = json.loads(lock.read_text())
        return int(content["pid"]), content["started"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_alive(holder: tuple[int, str | None]) -> bool:
    pid, started = holder
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _stat(pid, 2) != "Z" and (started is None or _start_time(pid) == started)


def _start_time(pid: int) -> str | None:
    """Start time of a process, which tells it from a later one with the same id; None where there is no /proc."""
    return _stat(pid, 21)


def _stat(pid: int, index: int) -> str | None:
    """Field `index` (from 0) of /proc/<pid>/stat, see proc(5); at least 2, for the name before may hold spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[index - 2]
    except (OSError, IndexError):
        return None
