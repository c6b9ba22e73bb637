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

from llorch_wire.pool_commands import (
    AnyCommand,
    Command,
    DeviceList,
    Doctor,
    ModelDownload,
    ModelList,
    ModelPartial,
    ModelRemove,
    ModelShow,
    ModelVerify,
    Status,
    WorkerCleanup,
    WorkerList,
    WorkerLogs,
    WorkerRestore,
    WorkerSpawn,
    WorkerStop,
)
from llorch_wire.pool_values import (
    CleanupReport,
    DeviceInfo,
    FileRecord,
    Finding,
    ModelInfo,
    PartialFile,
    PoolStatus,
    StopOutcome,
    Stray,
    VerifyReport,
    WorkerInfo,
    WorkerState,
)

__all__ = [
    "LIFELINE_INTERVAL_S",
    "LIFELINE_TIMEOUT_S",
    "MAX_REQUEST_BYTES",
    "POOL_PROTOCOL",
    "RC_AUTH",
    "RC_FAILED",
    "RC_INTERRUPTED",
    "RC_OK",
    "RC_PARTIAL",
    "RC_TIMEOUT",
    "RC_UNREACHABLE",
    "RC_USAGE",
    "RESULTS",
    "VERSION",
    "AnyCommand",
    "CleanupReport",
    "Command",
    "DeviceInfo",
    "DeviceList",
    "Doctor",
    "End",
    "Event",
    "EventBase",
    "Failure",
    "FileRecord",
    "Finding",
    "Hello",
    "Log",
    "ModelDownload",
    "ModelInfo",
    "ModelList",
    "ModelPartial",
    "ModelRemove",
    "ModelShow",
    "ModelVerify",
    "PartialFile",
    "PoolStatus",
    "Progress",
    "Request",
    "Result",
    "Status",
    "StopOutcome",
    "Stray",
    "StreamFile",
    "StreamRequest",
    "VerifyReport",
    "WorkerCleanup",
    "WorkerInfo",
    "WorkerList",
    "WorkerLogs",
    "WorkerRestore",
    "WorkerSpawn",
    "WorkerState",
    "WorkerStop",
    "decode_event",
    "decode_request",
    "decode_result",
    "encode_line",
]

VERSION = "0.1.0"
"""The release, as in pyproject.toml (a test holds the two together); importlib.metadata would cost every call 15 ms."""

POOL_PROTOCOL = 1
"""Raised when a message here changes so that an older peer would misread it."""

MAX_REQUEST_BYTES = 1 << 20
LIFELINE_INTERVAL_S = 5.0
LIFELINE_TIMEOUT_S = 30.0

RC_OK, RC_FAILED, RC_USAGE, RC_PARTIAL, RC_AUTH, RC_UNREACHABLE, RC_TIMEOUT, RC_INTERRUPTED = 0, 1, 2, 3, 4, 5, 124, 130
"""Exit codes of both command lines."""


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
