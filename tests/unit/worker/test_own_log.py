"""A worker's log stays bounded while it runs; nothing that was logged is lost or doubled."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from worker.own_log import OwnLog


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "worker.log"


def behind(path: Path, flags: int, limit: int = 100) -> OwnLog | None:
    descriptor = os.open(path, flags | os.O_CREAT, 0o600)
    try:
        return OwnLog.behind(descriptor, limit)
    finally:
        os.close(descriptor)


def test_only_a_file_open_for_appending_is_touched(log: Path):
    assert behind(log, os.O_WRONLY | os.O_APPEND) is not None
    assert behind(log, os.O_WRONLY) is None
    assert behind(log, os.O_WRONLY | os.O_APPEND, limit=0) is None
    reading, writing = os.pipe()
    try:
        assert OwnLog.behind(writing, 100) is None
    finally:
        os.close(reading)
        os.close(writing)
    assert OwnLog.behind(writing, 100) is None  # closed


def test_a_file_that_was_removed_is_left_alone(log: Path):
    with log.open("ab") as handle:
        found = OwnLog.behind(handle.fileno(), 1)
        assert found is not None
        log.unlink()
        assert OwnLog.behind(handle.fileno(), 1) is None
        assert not found.is_too_large()


async def test_it_moves_on_to_numbered_files_that_only_the_owner_reads(log: Path):
    own = OwnLog(log, limit=100, keep=3)
    with log.open("ab", buffering=0) as handle:
        for number in range(6):
            handle.write(f"{number}".encode() * 101)
            assert own.is_too_large()
            await own.rotate()
            assert log.stat().st_size == 0
        handle.write(b"next")  # through the descriptor that was open all the time
    assert log.read_bytes() == b"next"
    assert [Path(f"{log}.{n}").read_bytes()[:1] for n in (1, 2, 3)] == [b"5", b"4", b"3"]
    assert not Path(f"{log}.4").exists()
    assert stat.S_IMODE(Path(f"{log}.1").stat().st_mode) == 0o600


async def test_where_nothing_can_be_written_the_log_goes_on(log: Path):
    log.write_bytes(b"x" * 200)
    Path(f"{log}.1").mkdir()
    with pytest.raises(IsADirectoryError):
        await OwnLog(log, limit=100, keep=1).rotate()
    assert log.read_bytes() == b"x" * 200
