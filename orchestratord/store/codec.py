"""Between Redis' bytes and the store's types. No I/O. Read the field lists first: the scripts get the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from llorch_wire.events import EndEvent, ErrorEvent, TokenEvent, TopLogprob, parse_position
from llorch_wire.tasks import TaskStatus
from llorch_wire.worker import WorkerRegistration
from orchestratord.store.types import (
    Admitted,
    LogEntry,
    NewTask,
    PlacementSpec,
    QueuedTask,
    Refused,
    RequeueOutcome,
    RunningTask,
    TaskRecord,
    Usage,
    WorkerView,
)

RUNNING_FIELDS = (
    "task_id",
    "tenant",
    "model",
    "priority",
    "attempt",
    "worker_id",
    "worker_url",
    "instance_id",
    "owner",
    "seed",
    "claimed_at_ms",
    "created_at_ms",
    "deadline_at_ms",
    "on_disconnect",
    "tokens_logged",
    "correlation_id",
    "waiting_since_ms",
)
QUEUED_FIELDS = (
    "task_id",
    "model",
    "priority",
    "tenant",
    "weight",
    "sequence",
    "created_at_ms",
    "prompt_tokens_estimate",
    "max_tokens",
    "attempt",
    "tokens_logged",
    "digest",
    "dtype",
    "placement",
    "avoid_worker",
    "prefix_hashes",
    "deadline_at_ms",
    "waiting_since_ms",
    "session_id",
)
RECORD_FIELDS = (
    "task_id",
    "tenant",
    "model",
    "priority",
    "state",
    "seed",
    "max_tokens",
    "attempt",
    "failures",
    "worker_id",
    "created_at_ms",
    "started_at_ms",
    "finished_at_ms",
    "deadline_at_ms",
    "tokens_in",
    "tokens_logged",
    "cached_tokens",
    "end",
    "error",
    "metadata",
    "on_disconnect",
    "session_id",
    "callback_url",
    "placement",
    "sequence",
)
WORKER_FIELDS = (
    "worker_id",
    "instance_id",
    "url",
    "pool",
    "model",
    "model_digest",
    "dtype",
    "device",
    "determinism",
    "context_length",
    "slots_total",
    "kv_blocks_total",
    "kv_blocks_free",
    "tokens_per_second",
    "lease_expires_at_ms",
    "registered_at_ms",
    "version",
    "attention",
    "vram_total_bytes",
    "vram_used_bytes",
)

STATUSES: tuple[TaskStatus, ...] = ("queued", "running", "completed", "failed", "cancelled")

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode
_decode_end = msgspec.json.Decoder(EndEvent).decode
_decode_error = msgspec.json.Decoder(ErrorEvent).decode
_decode_placement = msgspec.json.Decoder(PlacementSpec).decode
_decode_metadata = msgspec.json.Decoder(dict[str, str]).decode
_decode_tokens = msgspec.json.Decoder(list[Any]).decode


def text(value: bytes) -> str:
    """A value that Redis holds as UTF-8."""
    return value.decode()


def status(state: str) -> TaskStatus:
    """What clients call a task's state: one that waits out a backoff is queued."""
    return "queued" if state == "retry" else msgspec.convert(state, TaskStatus)


def fields(names: Sequence[str], values: Iterable[bytes | None]) -> dict[str, str | None]:
    """The values that a script picked, by name; None where the hash lacks the field."""
    return {name: None if value is None else value.decode() for name, value in zip(names, values, strict=True)}


def _struct(kind: type[T], values: dict[str, Any]) -> T:
    return msgspec.convert(values, kind, strict=False)


def running_task(values: Sequence[bytes | None]) -> RunningTask:
    """From RUNNING_FIELDS."""
    return _struct(RunningTask, fields(RUNNING_FIELDS, values))


def running_tasks(rows: Iterable[Sequence[bytes | None]]) -> list[RunningTask]:
    """From rows of RUNNING_FIELDS, oldest claim first; a row without a task (deleted meanwhile) is left out."""
    tasks = [running_task(row) for row in rows if row[0] is not None]
    return sorted(tasks, key=lambda task: (task.claimed_at_ms, task.task_id))


def queued_task(values: Sequence[bytes | None], session_worker: bytes | None) -> QueuedTask:
    """From QUEUED_FIELDS and the worker on which the task's session is warm."""
    row: dict[str, Any] = fields(QUEUED_FIELDS, values)
    kept = int(row.pop("tokens_logged"))
    digest, dtype = row.pop("digest"), row.pop("dtype")
    row.pop("session_id")
    row["tokens_kept"] = kept
    row["required_digest"] = digest if kept else None
    row["required_dtype"] = dtype if kept else None
    row["placement"] = _decode_placement(row["placement"])
    row["avoid_worker"] = row["avoid_worker"] or None
    row["prefix_hashes"] = tuple((row["prefix_hashes"] or "").split())
    row["session_worker"] = None if session_worker is None else session_worker.decode()
    return _struct(QueuedTask, row)


def task_record(values: Sequence[bytes | None], position: int) -> TaskRecord:
    """From RECORD_FIELDS and the place in the queue (0: not waiting)."""
    row: dict[str, Any] = fields(RECORD_FIELDS, values)
    row.pop("sequence")
    row["status"] = status(row.pop("state"))
    row["usage"] = Usage(
        tokens_in=int(row.pop("tokens_in")),
        tokens_out=int(row.pop("tokens_logged")),
        cached_tokens=int(row.pop("cached_tokens")),
    )
    row["queue_position"] = position or None
    row["worker_id"] = row["worker_id"] or None
    row["end"] = None if row["end"] is None else _decode_end(row["end"])
    row["error"] = None if row["error"] is None else _decode_error(row["error"])
    row["metadata"] = _decode_metadata(row["metadata"])
    row["placement"] = _decode_placement(row["placement"])
    return _struct(TaskRecord, row)


def record_sequence(values: Sequence[bytes | None]) -> str:
    """Admission order of a task, from RECORD_FIELDS: the listing's cursor."""
    sequence = values[RECORD_FIELDS.index("sequence")]
    return "" if sequence is None else sequence.decode()


def worker_view(values: Sequence[Any]) -> WorkerView:
    """From WORKER_FIELDS and what the scripts add: slots used, state, drain deadline."""
    *stored, used, state, drain = values
    row: dict[str, Any] = fields(WORKER_FIELDS, stored)
    row["slots_used"] = used
    row["state"] = state.decode()
    row["drain_deadline_at_ms"] = None if drain is None else drain.decode()
    return _struct(WorkerView, row)


def worker_fields(registration: WorkerRegistration) -> list[str]:
    """Field, value pairs of the worker hash."""
    values: dict[str, str] = {name: str(value) for name, value in registration.model_dump(exclude={"features"}).items()}
    values["features"] = _encode(registration.features).decode()
    values["kv_blocks_free"] = str(registration.kv_blocks_total)
    values["tokens_per_second"] = "0"
    return [part for pair in values.items() for part in pair]


def lane(placement: PlacementSpec) -> str:
    """Names the set of workers that may take a task; empty for all.

    Tasks with different lanes wait in different queues, so that one that must wait for its worker is never in the way
    of another. A preference isn't a restriction, unless there is no falling back from it.
    """
    parts: list[str] = []
    if placement.mode == "pin":
        parts += [f"pool={placement.pin_pool}"] if placement.pin_pool is not None else []
        parts += [f"worker={placement.pin_worker}"] if placement.pin_worker is not None else []
    if placement.mode == "prefer" and not placement.allow_fallback:
        parts.append("only=" + "&".join(sorted(placement.prefer_pools)))
    if placement.avoid_pools:
        parts.append("avoid=" + "&".join(sorted(placement.avoid_pools)))
    return ",".join(parts)


def task_fields(task: NewTask) -> list[str]:
    """Field, value pairs of the task hash, without those that the scripts write. None is no field."""
    if any(" " in prefix or not prefix for prefix in task.prefix_hashes):
        raise ValueError("a prefix hash must be a non-empty string without spaces")
    pinned = task.placement if task.placement.mode == "pin" else PlacementSpec()
    values: dict[str, object] = {
        "task_id": task.task_id,
        "tenant": task.tenant,
        "weight": repr(task.weight),
        "model": task.model,
        "priority": task.priority,
        "seed": task.seed,
        "max_tokens": task.max_tokens,
        "prompt_tokens_estimate": task.prompt_tokens_estimate,
        "deadline_at_ms": task.deadline_at_ms,
        "session_id": task.session_id,
        "placement": _encode(task.placement).decode(),
        "lane": lane(task.placement),
        "pin_pool": pinned.pin_pool,
        "pin_worker": pinned.pin_worker,
        "on_disconnect": task.on_disconnect,
        "callback_url": task.callback_url,
        "metadata": _encode(task.metadata).decode(),
        "idempotency_key": task.idempotency_key,
        "body_hash": task.body_hash,
        "prefix_hashes": " ".join(task.prefix_hashes),
        "correlation_id": task.correlation_id,
        "attended_by": task.attended_by,
    }
    return [part for name, value in values.items() if value is not None for part in (name, str(value))]


def encode_tokens(tokens: Sequence[TokenEvent]) -> bytes:
    """One log entry's tokens, by column: `[first index, [id…], [text…], [logprob…]?, [[[id, text, logprob]…]…]?]`.

    Columns that are all None are left out from the right.
    """
    columns: list[Any] = [tokens[0].i, [token.id for token in tokens], [token.t for token in tokens]]
    if any(token.logprob is not None or token.top is not None for token in tokens):
        columns.append([token.logprob for token in tokens])
    if any(token.top is not None for token in tokens):
        columns.append(
            [None if token.top is None else [(top.id, top.t, top.logprob) for top in token.top] for token in tokens]
        )
    return _encode(columns)


def decode_tokens(data: bytes) -> tuple[TokenEvent, ...]:
    """What `encode_tokens` encoded."""
    first, ids, texts, *rest = _decode_tokens(data)
    if not rest:
        return tuple(
            TokenEvent(t=token_text, i=first + offset, id=token_id)
            for offset, (token_id, token_text) in enumerate(zip(ids, texts, strict=True))
        )
    logprobs: list[float | None] = rest[0]
    tops: list[Any] = rest[1] if len(rest) > 1 else [None] * len(ids)
    return tuple(
        TokenEvent(
            t=texts[offset],
            i=first + offset,
            id=ids[offset],
            logprob=None if logprobs[offset] is None else float(logprobs[offset] or 0.0),
            top=None
            if tops[offset] is None
            else tuple(TopLogprob(id=top[0], t=top[1], logprob=float(top[2])) for top in tops[offset]),
        )
        for offset in range(len(ids))
    )


def decode_token_ids(data: bytes) -> tuple[int, list[int]]:
    """First index and token ids of one log entry."""
    columns = _decode_tokens(data)
    return columns[0], columns[1]


def log_entry(position: bytes, values: dict[bytes, bytes]) -> LogEntry:
    """One entry of a log stream; its only field is named by its kind."""
    ((kind, data),) = values.items()
    if kind == b"tokens":
        return LogEntry(position=position.decode(), kind="tokens", tokens=decode_tokens(data))
    return _struct(LogEntry, {"position": position.decode(), "kind": kind.decode(), "data": data})


def check_position(position: str) -> None:
    """Raises ValueError for anything that isn't a position of a log or feed."""
    attempt, _ = position.partition("-")[::2]
    if len(attempt) > 19:
        raise ValueError(f"not a log position: {position[:64]!r}")
    parse_position(position)


def admitted(reply: Sequence[Any]) -> Admitted:
    """From admit.lua's `admitted` reply."""
    _, task_id, created, seed, created_at_ms, position, state, model = reply
    return Admitted(
        task_id=task_id.decode(),
        created=bool(created),
        seed=int(seed),
        created_at_ms=int(created_at_ms),
        queue_position=position,
        status=status(state.decode()),
        model=model.decode(),
    )


def refused(reply: Sequence[Any]) -> Refused:
    """From admit.lua's `refused` reply."""
    return _struct(Refused, {"reason": reply[1].decode(), "limit": reply[2]})


def requeue_outcome(state: bytes, failures: int) -> RequeueOutcome:
    """From requeue.lua's reply."""
    return _struct(RequeueOutcome, {"state": state.decode(), "failures": failures})
