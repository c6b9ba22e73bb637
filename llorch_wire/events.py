"""The events of a task's stream, as clients, orchestratord and workers exchange them.

Read `decode_event` and `encode_data` first. An event is an immutable struct; its SSE name is its class' `EVENT`.

    order on a stream:  queued → started → token* (→ migrated → token*)* → exactly one of end | error

Log positions, which are also the SSE ids (`<attempt>-<n>`), are Redis stream ids:

    0-1               queued
    <attempt>-<k>     started (first attempt, k = 0) or migrated (later attempts), k tokens being kept
    <attempt>-<i+1>   the token with index i
    <attempt>-<max>   the terminal event (max = 2^64 - 1)

So an id says how many tokens its holder has, which a failover that undoes the log's tail can't take from it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeAlias

import msgspec

StopReason: TypeAlias = Literal["EOS", "MAX_TOKENS", "STOP_SEQUENCE", "CANCELLED"]
Determinism: TypeAlias = Literal["exact", "prefix"]

QUEUED_POSITION = "0-1"
TERMINAL_SEQUENCE = 2**64 - 1


def token_position(attempt: int, index: int) -> str:
    """Log position and SSE id of the token with 0-based `index`."""
    return f"{attempt}-{index + 1}"


def start_position(attempt: int, tokens_kept: int = 0) -> str:
    """Log position of `started` or `migrated` of an attempt that goes on after `tokens_kept` tokens."""
    return f"{attempt}-{tokens_kept}"


def terminal_position(attempt: int) -> str:
    """Log position of the terminal event of a task whose last attempt was `attempt` (0: never started)."""
    return f"{attempt}-{TERMINAL_SEQUENCE}"


def parse_position(text: str) -> tuple[int, int]:
    """Split a log position into (attempt, n). Raises ValueError for anything that isn't one."""
    left, separator, right = text.partition("-")
    if not separator or not (left.isascii() and left.isdigit() and right.isascii() and right.isdigit()):
        raise ValueError(f"not a log position: {text[:64]!r}")
    attempt, number = int(left), int(right)
    if attempt >= 2**53 or number > TERMINAL_SEQUENCE:
        raise ValueError(f"not a log position: {text[:64]!r}")
    return attempt, number


class QueuedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The task waits. Sent again, without an id, when the position changes."""

    EVENT: ClassVar[str] = "queued"
    task_id: str
    queue_position: int
    predicted_start_ms: int | None = None
    """Milliseconds from now until the predicted start (median), None while nothing has been measured."""
    predicted_start_p90_ms: int | None = None


class StartedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The first attempt was claimed for a worker."""

    EVENT: ClassVar[str] = "started"
    task_id: str
    worker_id: str
    model: str
    model_digest: str
    seed: int
    attempt: int
    determinism: Determinism
    started_at_ms: int


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One alternative for a token: its id, its text and its natural-log probability."""

    id: int
    t: str
    logprob: float


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One generated token. `t` is whole UTF-8 and may be empty; `i` has no gap and no repeat."""

    EVENT: ClassVar[str] = "token"
    t: str
    i: int
    id: int
    logprob: float | None = None
    top: tuple[TopLogprob, ...] | None = None


class MigratedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The task goes on at another worker (or the same one, later) with all of its tokens."""

    EVENT: ClassVar[str] = "migrated"
    task_id: str
    worker_id: str
    attempt: int
    reason: str
    tokens_kept: int


class MetricsEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Running figures; additive, never logged, the first to be dropped under pressure."""

    EVENT: ClassVar[str] = "metrics"
    tokens_per_second: float
    queue_depth: int | None = None


class EndEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The task ended as asked. Times are milliseconds."""

    EVENT: ClassVar[str] = "end"
    stop_reason: StopReason
    tokens_in: int
    tokens_out: int
    cached_tokens: int = 0
    queue_time_ms: int = 0
    prefill_time_ms: int = 0
    decode_time_ms: int = 0
    stop_sequence_matched: str | None = None
    determinism: Determinism | None = None


class ErrorEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The task failed for good (at a worker: this attempt failed)."""

    EVENT: ClassVar[str] = "error"
    code: str
    message: str
    retriable: bool = False
    retry_after_ms: int | None = None
    param: str | None = None


class PreemptedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Worker → orchestratord only: the attempt yielded at a token boundary on request. Never reaches a client."""

    EVENT: ClassVar[str] = "preempted"
    tokens_out: int


class WorkerStartedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Worker → orchestratord only: the generation was accepted (or re-attached) by this engine instance."""

    EVENT: ClassVar[str] = "started"
    task_id: str
    attempt: int
    instance_id: str
    tokens_in: int
    determinism: Determinism


TaskEvent: TypeAlias = QueuedEvent | StartedEvent | TokenEvent | MigratedEvent | MetricsEvent | EndEvent | ErrorEvent
"""orchestratord → client."""

WorkerEvent: TypeAlias = WorkerStartedEvent | TokenEvent | MetricsEvent | EndEvent | ErrorEvent | PreemptedEvent
"""worker → orchestratord."""

_encoder = msgspec.json.Encoder()
_token_decoder = msgspec.json.Decoder(TokenEvent)
_task_decoders: dict[str, msgspec.json.Decoder[Any]] = {
    cls.EVENT: msgspec.json.Decoder(cls)
    for cls in (QueuedEvent, StartedEvent, TokenEvent, MigratedEvent, MetricsEvent, EndEvent, ErrorEvent)
}
_worker_decoders: dict[str, msgspec.json.Decoder[Any]] = {
    cls.EVENT: msgspec.json.Decoder(cls)
    for cls in (WorkerStartedEvent, TokenEvent, MetricsEvent, EndEvent, ErrorEvent, PreemptedEvent)
}


def encode_data(event: TaskEvent | WorkerEvent) -> bytes:
    """JSON of an event's data, one line, UTF-8."""
    return _encoder.encode(event)


def decode_task_event(name: str, data: bytes | str) -> TaskEvent | None:
    """Event from its SSE name and data as a client reads them; None for a name this version doesn't know.

    Raises msgspec.DecodeError or msgspec.ValidationError for data that isn't such an event.
    """
    decoder = _task_decoders.get(name)
    return None if decoder is None else decoder.decode(data)


def decode_worker_event(name: str, data: bytes | str) -> WorkerEvent | None:
    """Event from its SSE name and data as orchestratord reads them from a worker; None for an unknown name."""
    if name == "token":  # nearly every event of a stream
        return _token_decoder.decode(data)
    decoder = _worker_decoders.get(name)
    return None if decoder is None else decoder.decode(data)
