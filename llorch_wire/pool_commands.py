"""What a pool machine can be asked for: one struct a command, and their sum. Sent by `llorch_wire.pool`."""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class Command(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="command"):
    """Base of everything that a pool machine can be asked for."""


class ModelDownload(Command, frozen=True, kw_only=True, tag="model.download"):
    """Bring a model here. `ref`: `hf:org/name[@rev]`, `file:/abs/path` or an alias; `token` is never stored."""

    ref: str
    name: str | None = None
    offline: bool = False
    endpoint: str | None = None
    token: str | None = None


class ModelList(Command, frozen=True, kw_only=True, tag="model.list"):
    """The models on this machine."""


class ModelShow(Command, frozen=True, kw_only=True, tag="model.show"):
    """One model with its files."""

    name: str


class ModelVerify(Command, frozen=True, kw_only=True, tag="model.verify"):
    """Read every byte of a model again and compare with what was recorded."""

    name: str


class ModelRemove(Command, frozen=True, kw_only=True, tag="model.remove"):
    """Delete a model. Refused while a worker uses it, unless `force`."""

    name: str
    force: bool = False


class ModelPartial(Command, frozen=True, kw_only=True, tag="model.partial"):
    """What is already here of a model that is about to be copied in from another pool."""

    name: str
    digest: str


class WorkerSpawn(Command, frozen=True, kw_only=True, tag="worker.spawn"):
    """Start a worker and wait until it is ready. `worker_key` goes into a 0600 file, never on a command line."""

    model: str
    orchestrator: str | None = None
    worker_key: str | None = None
    worker_id: str | None = None
    pool: str | None = None
    device: str | None = None
    engine: str = "torch"
    slots: int | None = None
    idle_timeout_s: float | None = None
    host: str | None = None
    port: int = 0
    advertise_url: str | None = None
    on_boot: bool = False
    ready_timeout_s: float = 600.0
    force: bool = False
    dry_run: bool = False
    extra_args: list[str] = []


class WorkerList(Command, frozen=True, kw_only=True, tag="worker.list"):
    """Every worker on record here, with what it really is."""


class WorkerStop(Command, frozen=True, kw_only=True, tag="worker.stop"):
    """Drain, then SIGTERM, then SIGKILL. Empty `worker_ids` with `all` stops every worker here.

    A worker that another program looks after is refused (with `all`: left out) unless `force`.
    """

    worker_ids: list[str] = []
    all: bool = False
    grace_s: float = 30.0
    force: bool = False


class WorkerLogs(Command, frozen=True, kw_only=True, tag="worker.logs"):
    """The last lines of a worker's log; `follow` goes on until the caller leaves."""

    worker_id: str
    lines: int = 100
    follow: bool = False


class WorkerCleanup(Command, frozen=True, kw_only=True, tag="worker.cleanup"):
    """Remove what dead workers left: entries, key files, stray processes, old logs."""

    dry_run: bool = False


class WorkerRestore(Command, frozen=True, kw_only=True, tag="worker.restore"):
    """Bring back the workers that were spawned with --on-boot and died with a reboot."""


class DeviceList(Command, frozen=True, kw_only=True, tag="device.list"):
    """Devices with free and promised memory."""


class Status(Command, frozen=True, kw_only=True, tag="status"):
    """Everything about this machine in one answer."""


class Doctor(Command, frozen=True, kw_only=True, tag="doctor"):
    """Check this machine; `fix` repairs what can be repaired safely."""

    fix: bool = False


AnyCommand: TypeAlias = (
    ModelDownload
    | ModelList
    | ModelShow
    | ModelVerify
    | ModelRemove
    | ModelPartial
    | WorkerSpawn
    | WorkerList
    | WorkerStop
    | WorkerLogs
    | WorkerCleanup
    | WorkerRestore
    | DeviceList
    | Status
    | Doctor
)
