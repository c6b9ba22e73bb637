"""Keeps a worker's log bounded: 50 MB, ten of them. Read `rotate`."""

from __future__ import annotations

from pathlib import Path

ROTATE_BYTES, KEEP_FILES = 50 << 20, 10


def rotate(path: Path, limit: int = ROTATE_BYTES, keep: int = KEEP_FILES) -> bool:
    """Copy a log that is too large to `<log>.1` (older ones move on to .2 ...) and empty it. True if it did.

    The worker has it open with O_APPEND, so what it writes next lands at the new end; a line written between copy and
    truncation would be lost, which is why the rest is copied until nothing more comes.
    """
    try:
        if path.stat().st_size <= limit:
            return False
        Path(f"{path}.{keep}").unlink(missing_ok=True)
        for number in range(keep - 1, 0, -1):
            older = Path(f"{path}.{number}")
            if older.exists():
                older.replace(f"{path}.{number + 1}")
        with path.open("r+b") as source, Path(f"{path}.1").open("wb") as target:
            while chunk := source.read(1 << 20):
                target.write(chunk)
            source.truncate(0)
    except OSError:
        return False  # a full disk or a log that went away: listing workers must work all the same
    return True
