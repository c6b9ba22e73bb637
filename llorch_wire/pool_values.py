"""What a pool machine answers with: models, devices, workers, findings. `llorch_wire.pool.RESULTS` says which when."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

WorkerState: TypeAlias = Literal[
    "planned", "starting", "ready", "draining", "failed", "stopping", "unresponsive", "exited", "rebooted", "pid-reused"
]


class DeviceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One device. `device` is what `--device` takes: a GPU's UUID, or "cpu". Memory in bytes."""

    device: str
    kind: Literal["cuda", "cpu"]
    index: int
    name: str
    memory_total_bytes: int
    memory_free_bytes: int
    promised_bytes: int = 0
    driver: str = ""
    compute_capability: str = ""
    workers: list[str] = []


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a model: its path relative to the folder, its size and its sha256 in hex."""

    path: str
    size: int
    sha256: str


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`model.json`. `digest` is over every file's path and sha256: equal digests mean equal bytes."""

    name: str
    ref: str
    revision: str
    digest: str
    bytes: int
    format: str
    architecture: str
    context_length: int
    dtype: str = ""
    files: list[FileRecord] = []
    downloaded_at_ms: int = 0
    path: str = ""
    """Where it is; filled when read, not stored."""


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """`problems` names each damaged, missing or unexpected file."""

    name: str
    ok: bool
    bytes: int
    problems: list[str] = []


class PartialFile(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a file is already here; whole files have been verified."""

    path: str
    have_bytes: int
    whole: bool


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as this machine knows it. `state` is what was found now, not what was written down.

    `supervisor` names the program that started it and starts it again, such as `llorch up`; empty for a worker that
    stands by itself. `supervisor_pid` is 0 once that program is gone.
    """

    worker_id: str
    state: WorkerState
    detail: str = ""
    pid: int = 0
    start_time: int = 0
    boot_id: str = ""
    url: str = ""
    model: str = ""
    model_ref: str = ""
    model_digest: str = ""
    device: str = ""
    engine: str = ""
    instance_id: str = ""
    orchestrator: str = ""
    pool: str = ""
    slots_total: int = 0
    slots_free: int = 0
    need_bytes: int = 0
    vram_bytes: int = 0
    uptime_s: float = 0.0
    engine_restarts: int = 0
    idle_timeout_s: float | None = None
    on_boot: bool = False
    started_at_ms: int = 0
    log: str = ""
    version: str = ""
    supervisor: str = ""
    supervisor_pid: int = 0


class StopOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker ended: `drained`, `terminated`, `killed`, or `was-dead`."""

    worker_id: str
    how: Literal["drained", "terminated", "killed", "was-dead"]
    took_ms: int


class Stray(msgspec.Struct, frozen=True, kw_only=True):
    """A process that belongs to no live worker on record."""

    pid: int
    worker_id: str
    command: str


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that doctor saw. `fixed` when it was repaired; `repair` is the command that would."""

    level: Literal["ok", "warning", "error"]
    subject: str
    text: str
    repair: str = ""
    fixed: bool = False


class CleanupReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was (or with dry_run would be) removed."""

    entries: list[str] = []
    strays: list[Stray] = []
    files: list[str] = []
    dry_run: bool = False


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One machine at a glance. Disk figures are of the file system that holds the models."""

    host: str
    version: str
    python: str
    devices: list[DeviceInfo]
    models: list[ModelInfo]
    workers: list[WorkerInfo]
    strays: list[Stray]
    models_dir: str
    state_dir: str
    disk_free_bytes: int
    disk_total_bytes: int
