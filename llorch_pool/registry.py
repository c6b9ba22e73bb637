"""What this machine remembers of its workers: one JSON file each, written atomically, read without a lock.

An entry says what was started; whether it still runs is asked of the kernel and the worker (`lifecycle.inspect`).
Writers hold `<id>.lock`; a device is chosen under `spawn.lock`, so that two operators can't promise the same memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path

import msgspec

from llorch_pool.context import Context
from llorch_pool.errors import PoolError, usage_error
from llorch_pool.files import locked, write_atomic
from llorch_pool.paths import check_name, make_private
from llorch_pool.process import Identity, is_alive

MARKER = "_LLORCH_SPAWNED"
"""Environment variable of every worker process and its children: `<workers folder>:<worker id>`.

Its underscore keeps it out of `LLORCH_*`, which a worker does not hand on to its engine.
"""


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`<id>.json`. `pid` is 0 between the decision to start and the start itself."""

    worker_id: str
    pid: int = 0
    start_time: int = 0
    boot_id: str = ""
    url: str = ""
    model: str
    model_ref: str = ""
    model_path: str = ""
    device: str = ""
    need_bytes: int = 0
    ready: bool = False
    stopping: bool = False
    started_at_ms: int = 0
    log: str = ""
    engine: str = "torch"
    orchestrator: str = ""
    pool: str = ""
    slots: int | None = None
    idle_timeout_s: float | None = None
    host: str | None = None
    port: int = 0
    advertise_url: str | None = None
    on_boot: bool = False
    extra_args: list[str] = []
    supervisor: str = ""
    supervisor_pid: int = 0
    supervisor_start_time: int = 0

    @property
    def identity(self) -> Identity | None:
        """The process, None before it was started."""
        return Identity(self.pid, self.start_time, self.boot_id) if self.pid else None

    @property
    def live_supervisor_pid(self) -> int:
        """Pid of the program that starts this worker again when it dies; 0 where there is none, or none any more."""
        process = Identity(self.supervisor_pid, self.supervisor_start_time, self.boot_id)
        return self.supervisor_pid if self.supervisor_pid and is_alive(process) else 0


class _PortFile(msgspec.Struct):
    """What is read here of the file that a worker writes once it takes work."""

    pid: int


class Registry:
    """Entries of one workers folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, worker_id: str, suffix: str) -> Path:
        """`<id>.<suffix>`; the id is checked, because it may come from a command line."""
        return self.folder / f"{check_name(worker_id, 'worker', 'the worker id')}.{suffix}"

    def save(self, record: WorkerRecord) -> None:
        """Write an entry."""
        make_private(self.folder)
        write_atomic(self.file(record.worker_id, "json"), msgspec.json.format(msgspec.json.encode(record)))

    def load(self, worker_id: str) -> WorkerRecord:
        """One entry. Raises PoolError when there is none, or none that can be read."""
        path = self.file(worker_id, "json")
        try:
            return msgspec.json.decode(path.read_bytes(), type=WorkerRecord)
        except FileNotFoundError:
            known = ", ".join(record.worker_id for record in self.all()) or "none"
            raise usage_error(
                f"no worker {worker_id!r} on this machine (there is: {known})", "`llorch-pool worker list` shows them."
            ) from None
        except (msgspec.MsgspecError, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise PoolError(
                f"the entry {path} can't be read: {why}",
                next_step="`llorch-pool worker cleanup` removes damaged entries.",
            ) from error

    def is_ready(self, record: WorkerRecord) -> bool:
        """Whether the worker has been ready in this life, and so has taken its memory.

        For a supervised one nobody waits here; it says so itself, in its port file.
        """
        if record.ready or not record.supervisor:
            return record.ready
        try:
            written = msgspec.json.decode(self.file(record.worker_id, "ready").read_bytes(), type=_PortFile)
        except (OSError, msgspec.MsgspecError):
            return False
        return written.pid == record.pid

    def all(self) -> list[WorkerRecord]:
        """Every readable entry, oldest first."""
        records: list[WorkerRecord] = []
        for path in self._entries():
            with contextlib.suppress(msgspec.MsgspecError, OSError):
                records.append(msgspec.json.decode(path.read_bytes(), type=WorkerRecord))
        return sorted(records, key=lambda record: (record.started_at_ms, record.worker_id))

    def damaged(self) -> list[Path]:
        """Entries that can't be read."""
        bad: list[Path] = []
        for path in self._entries():
            try:
                msgspec.json.decode(path.read_bytes(), type=WorkerRecord)
            except FileNotFoundError:
                continue
            except (msgspec.MsgspecError, OSError):
                bad.append(path)
        return bad

    def _entries(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.glob("*.json") if not path.name.startswith(".")]

    def remove(self, worker_id: str) -> None:
        """Delete an entry with its key and port files. The log stays until cleanup."""
        for suffix in ("json", "env", "ready"):
            self.file(worker_id, suffix).unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self, worker_id: str, context: Context) -> Generator[None]:
        """Only one command at a time changes a worker."""
        make_private(self.folder)
        waiting = f"another command works on {worker_id}; waiting for it"
        lock, entry = self.file(worker_id, "lock"), self.file(worker_id, "json")
        with locked(lock, context, what=f"worker {worker_id}", waiting=waiting, keep=entry.exists):
            yield

    @contextlib.contextmanager
    def choosing(self, context: Context) -> Generator[None]:
        """Only one command at a time chooses a device."""
        make_private(self.folder)
        with locked(self.folder / "spawn.lock", context, what="the choice of a device"):
            yield

    def write_secrets(self, worker_id: str, values: dict[str, str]) -> None:
        """`<id>.env`, mode 0600: what a worker must know and nobody else may read."""
        make_private(self.folder)
        write_atomic(self.file(worker_id, "env"), msgspec.json.encode(values), mode=0o600)

    def secrets(self, worker_id: str) -> dict[str, str]:
        """What `write_secrets` stored, empty if nothing was."""
        try:
            return msgspec.json.decode(self.file(worker_id, "env").read_bytes(), type=dict[str, str])
        except (OSError, msgspec.MsgspecError):
            return {}
