"""Files that survive a crash and two operators: atomic writes, and locks with a deadline."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Generator
from pathlib import Path

from llorch_pool.context import Context
from llorch_pool.errors import PoolError, disk_full


def write_atomic(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write, fsync, rename, fsync the folder: a reader or a crash sees the old file or the new one, never half.

    Raises PoolError when the disk is full, OSError otherwise.
    """
    import tempfile

    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary = Path(name)
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(str(path)) from error
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(
    path: Path, context: Context, *, what: str, waiting: str = "", keep: Callable[[], bool] = lambda: True
) -> Generator[None]:
    """Hold the lock file `path` exclusively. Waits as long as `context` allows; says once that it waits.

    The kernel drops the lock when its holder dies, so it can't go stale. Unless `keep` says at the end that what is
    locked is there, the file is removed while it is still held. Raises AbortedError.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    told = False
    while (handle := _lock(path, what)) is None:
        if not told and waiting:
            context.log(waiting)
            told = True
        context.wait(0.05)
    try:
        yield
    finally:
        try:
            if not keep():
                path.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _lock(path: Path, what: str) -> int | None:
    """A handle that holds the lock, None while another holds it.

    Whoever holds a lock may remove its file; so the lock counts only if, once it is held, the path still leads to the
    file that was opened. Otherwise two could hold "the" lock, one on the old file and one on the new.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _leads_to(path, handle):
            return handle
    except BlockingIOError:
        pass
    except OSError as error:
        os.close(handle)
        if error.errno == errno.ESTALE:  # on NFS: another machine has removed the file meanwhile
            return None
        raise PoolError(
            f"can't lock {what} ({path}): {error.strerror}",
            next_step="File locks must work there: on NFS, mount without `nolock` or set XDG_STATE_HOME and "
            "LLORCH_MODELS to a local disk.",
        ) from error
    os.close(handle)
    return None


def _leads_to(path: Path, handle: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(handle))
    return False


def drop_free_lock(path: Path, *, dry_run: bool = False) -> bool:
    """Remove a lock file that nobody holds; whether it was free (with `dry_run` it stays)."""
    if not path.exists():
        return False
    handle = _lock(path, path.name)
    if handle is None:
        return False
    try:
        if not dry_run:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)
    return True


def remove_tree(path: Path) -> None:
    """Delete a folder with all that is in it; of a symbolic link the link alone. Nothing there is fine."""
    import shutil

    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path)
