"""What `llorch` and `llorch-pool rpc` say to each other over ssh: one request line in, one event per line out.

Read `Request` and `Event` first. Everything is a msgspec struct, because the remote side starts for every call and an
import must cost milliseconds.

    stdin   {"version": "0.1.0", "protocol": 1, "timeout_s": 60, "command": {"command": "worker.list"}}\\n
            then a bare "\\n" every few seconds (the lifeline); EOF or silence aborts the command, never a worker
    stdout  {"event": "hello", ...}                      first line; anything before it, or not JSON, is a login banner
            {"event": "progress" | "log", ...}*
            {"event": "result", "value": ...}            at most one
            {"event": "end", "rc": 0}                    always last; no end line means that the transport failed
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

VERSION = "0.1.0"
"""The release, as in pyproject.toml (a test holds the two together); importlib.metadata would cost every call 15 ms."""

POOL_PROTOCOL = 1
"""Raised when a message here changes so that an older peer would misread it."""

MAX_REQUEST_BYTES = 1 << 20
LIFELINE_INTERVAL_S = 5.0
LIFELINE_TIMEOUT_S = 30.0

RC_OK, RC_FAILED, RC_USAGE, RC_PARTIAL, RC_AUTH, RC_UNREACHABLE, RC_TIMEOUT, RC_INTERRUPTED = 0, 1, 2, 3, 4, 5, 124, 130
"""Exit codes of both command lines."""

WorkerState: TypeAlias = Literal[
    "planned", "starting", "ready", "draining", "failed", "stopping", "unresponsive", "exited", "rebooted", "pid-reused"
]


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


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The one line that the remote side reads. `lifeline_s` None: stdin is not a lifeline."""

    command: AnyCommand
    version: str
    protocol: int = POOL_PROTOCOL
    timeout_s: float = 60.0
    lifeline_s: float | None = LIFELINE_TIMEOUT_S


class EventBase(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event"):
    """Base of everything that the remote side answers."""


class Hello(EventBase, frozen=True, kw_only=True, tag="hello"):
    """Who answers. Versions are compared at every contact."""

    version: str
    protocol: int
    host: str
    pid: int


class Progress(EventBase, frozen=True, kw_only=True, tag="progress"):
    """Where a long command is. `done` and `total` are bytes when `unit` is "bytes"; `eta_s` is None while unknown."""

    phase: str
    text: str = ""
    done: int | None = None
    total: int | None = None
    unit: str = ""
    rate: float | None = None
    eta_s: float | None = None


class Log(EventBase, frozen=True, kw_only=True, tag="log"):
    """A line meant for the operator."""

    text: str
    level: Literal["info", "warning", "error"] = "info"


class Result(EventBase, frozen=True, kw_only=True, tag="result"):
    """The command's answer; its type follows from the command (see `RESULTS`)."""

    value: Any


class Failure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a command failed and what to do next. `detail` holds a log's tail or a table of figures."""

    code: str
    message: str
    next_step: str = ""
    detail: str = ""


class End(EventBase, frozen=True, kw_only=True, tag="end"):
    """Always the last line."""

    rc: int
    failure: Failure | None = None


Event: TypeAlias = Hello | Progress | Log | Result | End


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


RESULTS: dict[type[Command], Any] = {
    ModelDownload: ModelInfo,
    ModelList: list[ModelInfo],
    ModelShow: ModelInfo,
    ModelVerify: VerifyReport,
    ModelRemove: ModelInfo,
    ModelPartial: list[PartialFile],
    WorkerSpawn: WorkerInfo,
    WorkerList: list[WorkerInfo],
    WorkerStop: list[StopOutcome],
    WorkerLogs: None,
    WorkerCleanup: CleanupReport,
    WorkerRestore: list[WorkerInfo],
    DeviceList: list[DeviceInfo],
    Status: PoolStatus,
    Doctor: list[Finding],
}
"""Type of a command's `Result.value`."""


class StreamRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """First line on stdin of `llorch-pool stream`: bytes of a model out, or in.

    `send`: stdout carries one JSON `hello` line, then frames. `receive`: frames follow on stdin, stdout carries events.
    A frame is one JSON line (`StreamFile`) and then exactly `size - offset` bytes; an empty line ends the stream.
    """

    op: Literal["send", "receive"]
    name: str
    version: str
    protocol: int = POOL_PROTOCOL
    have: list[PartialFile] = []
    model: ModelInfo | None = None
    timeout_s: float = 6 * 3600.0


class StreamFile(msgspec.Struct, frozen=True, kw_only=True):
    """Header of one file in a stream."""

    path: str
    size: int
    offset: int


_encoder = msgspec.json.Encoder()
_request_decoder = msgspec.json.Decoder(Request)
_event_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def encode_line(message: msgspec.Struct) -> bytes:
    """One message as one line, newline included."""
    return _encoder.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """Request from its line. Raises msgspec.DecodeError or msgspec.ValidationError."""
    return _request_decoder.decode(line)


def decode_event(line: bytes) -> Event | None:
    """Event from a line; None for anything that isn't one (a login banner, a stray echo)."""
    if not line.lstrip().startswith(b"{"):
        return None
    try:
        return _event_decoder.decode(line)
    except msgspec.MsgspecError:
        return None


def decode_result(command: Command, value: Any) -> Any:
    """`Result.value` as the command's own type. Raises msgspec.ValidationError."""
    kind = RESULTS[type(command)]
    return None if kind is None else msgspec.convert(value, kind)
