"""Bring a source's files into a folder: resumable, checked byte for byte, four files at a time. Read `fetch` first.

    <folder>/<path>          whole and verified
    <folder>/<path>.part     what has come so far      <folder>/<path>.etag   what makes resuming it safe

A .part is trusted only as far as the digest at the end says so: if it doesn't match, the file is brought once more.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any

from llorch_pool.context import Context
from llorch_pool.errors import PoolError, disk_full
from llorch_pool.files import sync_folder
from llorch_pool.model_source import CHUNK_BYTES, Source, SourceFile, TransientError
from llorch_wire.pool import FileRecord, Progress

PARALLEL_FILES = 4
TRIES_WITHOUT_PROGRESS = 6
RATE_WINDOW_S = 5.0


class Meter:
    """Bytes so far of all files together, with rate and time left, from any thread."""

    def __init__(self, context: Context, name: str, total: int) -> None:
        self._context, self._name, self._total = context, name, total
        self._lock = threading.Lock()
        self._done = 0
        self._samples: list[tuple[float, int]] = []

    def add(self, count: int) -> None:
        """`count` bytes more (negative when a file starts again)."""
        with self._lock:
            self._done += count

    def report(self, *, force: bool = False) -> None:
        """Tell how far it is. Called at intervals, so that a stall shows as a falling rate."""
        now = time.monotonic()
        with self._lock:
            done = self._done
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[0][0] > RATE_WINDOW_S:
            self._samples.pop(0)
        began, before = self._samples[0]
        rate = (done - before) / (now - began) if now - began > 0.2 else None
        left = (self._total - done) / rate if rate and rate > 0 else None
        self._context.progress(
            Progress(
                phase="downloading",
                text=self._name,
                done=done,
                total=self._total,
                unit="bytes",
                rate=None if rate is None else round(max(0.0, rate)),
                eta_s=None if left is None else round(left, 1),
            ),
            force=force,
        )


def fetch(
    context: Context, source: Source, folder: Path, name: str, parallel: int = PARALLEL_FILES
) -> list[FileRecord]:
    """Bring every file of `source` into `folder` and return what was recorded of each. Raises PoolError.

    Several at a time, the largest first; with `parallel` 1 in the order in which the source has them.
    """
    meter = Meter(context, name, sum(file.size for file in source.files))
    threads = ThreadPoolExecutor(parallel, thread_name_prefix="fetch")
    try:
        files = source.files if parallel == 1 else sorted(source.files, key=lambda file: -file.size)
        jobs = [threads.submit(_fetch_file, context, source, file, folder, meter) for file in files]
        pending = set(jobs)
        while pending:
            done, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
            failed = next((job.exception() for job in done if job.exception()), None)
            if failed:
                context.abort("another file of the model failed")
                raise failed
            context.check()
            meter.report()
        meter.report(force=True)
        return sorted((job.result() for job in jobs), key=lambda record: record.path)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _fetch_file(context: Context, source: Source, file: SourceFile, folder: Path, meter: Meter) -> FileRecord:
    target = folder / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    sha256 = _digest_of(context, target, file, meter)
    for again in (True, False):
        if sha256 is None:
            sha256 = _Download(context, source, file, target, meter).run()
        if sha256 is not None:
            return FileRecord(path=file.path, size=file.size, sha256=sha256)
        if again:
            context.log(f"{file.path}: what came does not match its digest; bringing it from the start", "warning")
    raise PoolError(
        f"{file.path}: what comes does not match the digest that the source promises",
        next_step="Try again later; if it stays, the source or something between (a proxy) damages it.",
        code="damaged",
    )


class _Download:
    """One file on its way into its .part. What has been hashed is what counts: the rest is cut off on opening."""

    def __init__(self, context: Context, source: Source, file: SourceFile, target: Path, meter: Meter) -> None:
        self._context, self._source, self._file, self._target, self._meter = context, source, file, target, meter
        self._part, self._mark = Path(f"{target}.part"), Path(f"{target}.etag")
        self._hashes = _Hashes(file)

    def run(self) -> str | None:
        """Bring the file into place. Its sha256, or None (and nothing left) when what came has another digest."""
        if self._part.exists():
            _hash_file(self._context, self._part, self._hashes, self._meter)
        tries = 0
        while self._hashes.count < self._file.size:
            self._context.check()
            before = self._hashes.count
            reason, pause = self._one_connection()
            have = self._hashes.count
            if have >= self._file.size:
                break
            tries = 0 if have > before else tries + 1
            if tries >= TRIES_WITHOUT_PROGRESS:
                raise PoolError(
                    f"{self._file.path}: gave up after {tries} tries in a row without a byte: {reason}",
                    next_step="Run it again: it goes on with what has come.",
                    code="download",
                )
            self._context.log(f"{self._file.path}: {reason}; going on at byte {have}", "warning")
            self._context.wait(max(pause, min(8.0, 0.25 * 2**tries)))
        return self._finish()

    def _one_connection(self) -> tuple[str, float]:
        """Read until the source has no more to give. Why it ended, and how long the source wants to be left alone."""
        try:
            self._read()
        except TransientError as error:
            return str(error), error.retry_after_s
        except http.client.HTTPException as error:
            return type(error).__name__, 0.0
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full(str(self._target)) from error
            return error.strerror or str(error) or type(error).__name__, 0.0
        return "the connection ended early", 0.0

    def _read(self) -> None:
        validator = self._mark.read_text() if self._mark.exists() else ""
        with self._source.open(self._file, self._hashes.count, validator) as reading:
            if reading.offset != self._hashes.count:
                self._meter.add(-self._hashes.count)
                self._hashes = _Hashes(self._file)
            self._mark.write_text(reading.validator)
            with self._part.open("r+b" if self._part.exists() else "xb", buffering=0) as part:
                part.truncate(self._hashes.count)
                part.seek(self._hashes.count)
                while self._hashes.count < self._file.size:
                    self._context.check()
                    chunk = _read_chunk(reading.stream, self._file.size - self._hashes.count)
                    if not chunk:
                        return
                    _write_all(part, chunk)
                    self._hashes.update(chunk)
                    self._meter.add(len(chunk))

    def _finish(self) -> str | None:
        if not self._part.exists():
            self._part.touch()  # an empty file: there was nothing to read
        self._mark.unlink(missing_ok=True)
        if not self._hashes.match():
            self._part.unlink()
            self._meter.add(-self._hashes.count)
            return None
        with self._part.open("rb") as part:
            os.fsync(part.fileno())
        self._part.replace(self._target)
        sync_folder(self._target.parent)
        return self._hashes.sha256.hexdigest()


def _read_chunk(stream: Any, left: int) -> bytes:
    """At most a chunk. `read1` gives what has come instead of waiting until the chunk is full."""
    read = getattr(stream, "read1", None) or stream.read
    return read(min(CHUNK_BYTES, left))


def _write_all(stream: IO[bytes], chunk: bytes) -> None:
    """An unbuffered write may take less than all of it."""
    view = memoryview(chunk)
    while view:
        view = view[stream.write(view) :]


class _Hashes:
    """sha256 of the bytes, and git's blob id where that is what the source promises (git-hash-object(1))."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % self._file.size, usedforsecurity=False) if self._file.git_sha1 else None
        self.count = 0

    def update(self, chunk: bytes) -> None:
        self.sha256.update(chunk)
        if self._git is not None:
            self._git.update(chunk)
        self.count += len(chunk)

    def match(self) -> bool:
        """Whether what came is what was promised."""
        if self.count != self._file.size:
            return False
        if self._file.sha256:
            return self.sha256.hexdigest() == self._file.sha256
        return self._git is None or self._git.hexdigest() == self._file.git_sha1


def _hash_file(context: Context, path: Path, hashes: _Hashes, meter: Meter | None) -> None:
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            context.check()
            hashes.update(chunk)
            if meter is not None:
                meter.add(len(chunk))


def _digest_of(context: Context, target: Path, file: SourceFile, meter: Meter) -> str | None:
    """sha256 of a file that is in place already; None (and the file removed) if it isn't what the source promises."""
    if not target.exists():
        return None
    hashes = _Hashes(file)
    if target.stat().st_size == file.size:
        _hash_file(context, target, hashes, meter)
        if hashes.match():
            return hashes.sha256.hexdigest()
        meter.add(-hashes.count)
    target.unlink()
    return None


def sha256_of(context: Context, path: Path) -> str:
    """sha256 of a whole file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            context.check()
            digest.update(chunk)
    return digest.hexdigest()
