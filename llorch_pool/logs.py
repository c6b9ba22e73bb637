"""A worker's log: its last lines, and what follows while the caller stays."""

from __future__ import annotations

from pathlib import Path

from llorch_pool.context import Context
from llorch_pool.lifecycle import tail
from llorch_pool.paths import check_name
from llorch_pool.registry import Registry
from llorch_wire.pool import WorkerLogs

POLL_S = 0.2
MAX_LINES = 100_000


def show(context: Context, registry: Registry, command: WorkerLogs) -> None:
    """Give the lines to `context.log`. The log of a worker that is gone is shown too, as long as it is there."""
    path = registry.file(check_name(command.worker_id, "worker", "the worker id"), "log")
    if not path.exists():
        registry.load(command.worker_id)  # raises with the names that there are
    position = path.stat().st_size if path.exists() else 0
    for line in tail(path, min(max(command.lines, 0), MAX_LINES)):
        context.log(line)
    if command.follow:
        _follow(context, path, position)


def _follow(context: Context, path: Path, position: int) -> None:
    """What is appended from now on; a log that became shorter was rotated and is read from its start."""
    rest = b""
    while True:
        context.wait(POLL_S)
        size = path.stat().st_size if path.exists() else 0
        if size < position:
            position, rest = 0, b""
        if size == position:
            continue
        with path.open("rb") as stream:
            stream.seek(position)
            data = stream.read(1 << 20)
        position += len(data)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            context.log(line.decode("utf-8", "replace"))
