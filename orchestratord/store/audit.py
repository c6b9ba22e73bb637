"""Every invariant of the store, checked. Read `audit`.

Each check is one small script, so it judges one instant; what changes between two checks can't make a false finding.
Keys are found by SCAN: also those that no registry names.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import islice
from typing import Any

import msgspec
from redis import exceptions

from llorch_wire.events import MigratedEvent, StartedEvent, decode_task_event, parse_position, terminal_position
from orchestratord.store import codec
from orchestratord.store.connection import Connection
from orchestratord.store.keys import KINDS, TAG, key, split
from orchestratord.store.types import Finding, LogEntry

_COLLECTIONS = (
    "queue",
    "waiting-in",
    "queues",
    "waiting",
    "retry",
    "deadlines",
    "done",
    "tasks-by",
    "running",
    "stopping",
    "owned",
    "orphans",
    "active",
    "workers",
    "workers-of",
    "worker-leases",
    "drains",
)
_SINGLE = ("log", "payload", "idem")
_TASKS_PER_CALL = 50
_COLLECTIONS_PER_CALL = 10
_SINGLES_PER_CALL = 200
_LOG_CHUNK = 512


async def audit(connection: Connection, *, repair: bool, logs: bool = True) -> list[Finding]:
    """Findings of every kind. `logs` reads every log from its beginning too. With `repair` the scripts mend what they
    can, and the findings say so."""
    names: dict[str, list[str]] = {}
    findings: list[Finding] = []
    async for name in _scan(connection):
        kind, _ = split(name)
        if kind not in KINDS:
            findings.append(Finding(invariant="unknown-key", key=name, detail="no part of the store makes such keys"))
        names.setdefault(kind, []).append(name)
    task_ids = [split(name)[1][0] for name in names.get("task", [])]
    for chunk in _chunks(task_ids, _TASKS_PER_CALL):
        findings += await _check(connection, "audit_tasks", repair, chunk)
    collections = [name for kind in _COLLECTIONS for name in names.get(kind, [])]
    for chunk in _chunks(collections, _COLLECTIONS_PER_CALL):
        findings += await _check_members(connection, repair, chunk)
    for kind in _SINGLE:
        singles = [(kind, name, "" if kind == "idem" else split(name)[1][0]) for name in names.get(kind, [])]
        for chunk in _chunks(singles, _SINGLES_PER_CALL):
            findings += await _check(connection, "audit_single", repair, [part for one in chunk for part in one])
    if logs:
        for task_id in task_ids:
            findings += await _check_log(connection, task_id)
    return findings


async def _check(connection: Connection, script: str, repair: bool, arguments: Iterable[str]) -> list[Finding]:
    return _findings(await connection.run(script, int(repair), *arguments))


def _findings(flat: list[Any]) -> list[Finding]:
    rows = [flat[start : start + 4] for start in range(0, len(flat), 4)]
    return [
        Finding(invariant=row[0].decode(), key=row[1].decode(), detail=row[2].decode(), repaired=bool(row[3]))
        for row in rows
    ]


async def _check_members(connection: Connection, repair: bool, names: Sequence[str]) -> list[Finding]:
    findings: list[Finding] = []
    starts = dict.fromkeys(names, 0)
    while starts:
        arguments: list[str] = []
        for name, start in starts.items():
            kind, parts = split(name)
            arguments += [kind, name, str(start), str(len(parts)), *parts]
        following, flat = await connection.run("audit_members", int(repair), *arguments)
        findings += _findings(flat)
        starts = {name: start for name, start in zip(starts, following, strict=True) if start >= 0}
    return findings


async def _scan(connection: Connection) -> AsyncIterator[str]:
    names = connection.client.scan_iter(match=f"{TAG}:*", count=1000)
    seen: set[bytes] = set()  # SCAN may give a key twice
    while True:
        name: bytes | None = await connection.call(lambda: anext(names, None))
        if name is None:
            return
        if name not in seen:
            seen.add(name)
            yield name.decode()


async def _check_log(connection: Connection, task_id: str) -> list[Finding]:
    """A log is read piece by piece while it grows at its end; what is checked here holds for every prefix of it."""
    reader = _LogCheck(task_id)
    after = "0-0"
    client = connection.client
    while True:
        start = f"({after}"
        try:
            entries = await connection.call(
                lambda start=start: client.xrange(key("log", task_id), min=start, count=_LOG_CHUNK)
            )
            for position, values in entries:
                reader.take(codec.log_entry(position, values))
        except (exceptions.ResponseError, msgspec.MsgspecError, ValueError) as error:
            reader.found(f"can't be read: {type(error).__name__}")
            return reader.findings
        if len(entries) < _LOG_CHUNK:
            return reader.findings
        after = entries[-1][0].decode()


class _LogCheck:
    """The rules of one log: queued first, attempts that grow, contiguous tokens, nothing after the terminal event."""

    def __init__(self, task_id: str) -> None:
        self.findings: list[Finding] = []
        self._key = key("log", task_id)
        self._entries = 0
        self._attempt = 0
        self._tokens = 0
        self._sealed = False

    def found(self, detail: str) -> None:
        self.findings.append(Finding(invariant="log", key=self._key, detail=detail))

    def take(self, entry: LogEntry) -> None:
        """The next entry."""
        attempt, number = parse_position(entry.position)
        if (self._entries == 0) != (entry.kind == "queued"):
            self.found(f"{entry.kind} at {entry.position} where queued must be first and only first")
        if self._sealed:
            self.found(f"{entry.kind} at {entry.position} after the terminal event")
        if entry.kind in ("started", "migrated"):
            self._take_start(entry, attempt, number)
        elif entry.kind == "tokens":
            self._take_tokens(entry, attempt, number)
        elif entry.kind in ("end", "error"):
            self._sealed = True
            if entry.position != terminal_position(self._attempt):
                self.found(f"the terminal event is at {entry.position}, in attempt {self._attempt}")
        self._entries += 1

    def _take_start(self, entry: LogEntry, attempt: int, number: int) -> None:
        event = decode_task_event(entry.kind, entry.data)
        kept = event.tokens_kept if isinstance(event, MigratedEvent) else 0
        named = event.attempt if isinstance(event, StartedEvent | MigratedEvent) else 0
        if (
            number != 0
            or attempt != self._attempt + 1
            or named != attempt
            or (entry.kind == "started") != (attempt == 1)
        ):
            self.found(f"{entry.kind} at {entry.position} names attempt {named} after attempt {self._attempt}")
        if kept != self._tokens:
            self.found(f"{entry.kind} at {entry.position} keeps {kept} tokens of {self._tokens}")
        self._attempt = attempt

    def _take_tokens(self, entry: LogEntry, attempt: int, number: int) -> None:
        first, last = entry.tokens[0].i, entry.tokens[-1].i
        if first > self._tokens or last < self._tokens:
            self.found(f"tokens {first} to {last} at {entry.position} where {self._tokens} is next")
        if attempt != self._attempt or number != last + 1:
            self.found(f"tokens {first} to {last} stand at {entry.position} in attempt {self._attempt}")
        self._tokens = max(self._tokens, last + 1)


def _chunks(items: Sequence[Any], size: int) -> Iterable[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
