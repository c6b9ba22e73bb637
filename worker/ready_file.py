"""The file that says where a worker is, for whoever started it. Read `write` first."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path


def write(path: Path, *, worker_id: str, url: str, instance_id: str | None) -> None:
    """JSON {worker_id, url, pid, instance_id}, renamed into place, so that nobody ever reads half of it.

    Raises OSError.
    """
    content = {"worker_id": worker_id, "url": url, "pid": os.getpid(), "instance_id": instance_id}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Take away a file that this process wrote; one that a successor wrote stays."""
    with suppress(OSError, ValueError, AttributeError):
        if json.loads(path.read_text("utf-8")).get("pid") == os.getpid():
            path.unlink()
