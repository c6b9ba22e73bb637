"""Every invariant of the store, checked. Read `audit`, then `audit_from`.

Each check is one small script, so it judges one instant; what changes between two checks can't make a false finding.
Keys are found by SCAN, page by page: also those that no registry names, and however many there are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

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
    "attended",
    "unattended",
    "active",
    "workers",
    "workers-of",
    "worker-leases",
    "drains",
)
_SINGLE = ("log", "payload", "idem")
_KEYS_PER_PAGE = 1000
_TASKS_PER_CALL = 25
_COLLECTIONS_PER_CALL = 10
_SINGLES_PER_CALL = 200
_LOG_CHUNK = 512
_now = time.monotonic
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class AuditPlace:
    """How far a walk over the keys has come: SCAN's cursor, and collections begun, with the rank to go on at."""

    cursor: int = 0
    begun: tuple[tuple[str, int], ...] = ()

    def encode(self) -> bytes:
        """For `decode`, in a later run or in another process."""
        return msgspec.json.encode((self.cursor, self.begun))

    @staticmethod
    def decode(text: bytes) -> AuditPlace:
        """Raises msgspec.MsgspecError."""
        cursor, begun = msgspec.json.decode(text, type=tuple[int, tuple[tuple[str, int], ...]])
        return AuditPlace(cursor=cursor, begun=begun)


async def audit(connection: Connection, *, repair: bool, logs: bool = True) -> list[Finding]:
    """Findings of every kind. `logs` reads every log from its beginning too. With `repair` the scripts mend what they
    can, and the findings say so."""
    findings, _ = await audit_from(connection, AuditPlace(), repair=repair, logs=logs)
    return findings


async def audit_from(
    connection: Connection, place: AuditPlace, *, repair: bool, logs: bool, budget_s: float | None = None
) -> tuple[list[Finding], AuditPlace | None]:
    """Go on from a place until all keys were seen (then the second value is None) or the budget is spent.

    With a budget, which is for runs beside live traffic, it rests after each step for as long as the step took. A key
    that is there during the whole walk is met, however many runs that takes; one step is always done.
    """
    walk = _Walk(connection, repair=repair, logs=logs, deadline=None if budget_s is None else _now() + budget_s)
    following = await walk.go(place)
    return list(dict.fromkeys(walk.findings)), following  # SCAN may give a key twice


class _Walk:
    """One run over the keys, or over a part of them."""

    def __init__(self, connection: Connection, *, repair: bool, logs: bool, deadline: float | None) -> None:
        self.findings: list[Finding] = []
        self._connection = connection
        self._repair = int(repair)
        self._logs = logs
        self._deadline = deadline

    async def go(self, place: AuditPlace) -> AuditPlace | None:
        begun, cursor = dict(place.begun), place.cursor
        while True:
            while begun:
                begun = await self._step(self._members(begun))
                if begun and self._is_over():
                    return AuditPlace(cursor=cursor, begun=tuple(begun.items()))
            if cursor < 0:
                return None
            cursor, begun = await self._page(cursor)
            if self._is_over() and (begun or cursor >= 0):
                return AuditPlace(cursor=cursor, begun=tuple(begun.items()))

    async def _page(self, cursor: int) -> tuple[int, dict[str, int]]:
        """What one SCAN call names. The next cursor (-1 after the last) and the collections, which are still to do."""
        client = self._connection.client
        following, keys = await self._connection.call(
            lambda: client.scan(cursor=cursor, match=f"{TAG}:*", count=_KEYS_PER_PAGE)
        )
        names: dict[str, list[str]] = {}
        for name in dict.fromkeys(found.decode() for found in keys):
            kind, _ = split(name)
            if kind not in KINDS:
                detail = "no part of the store makes such keys"
                self.findings.append(Finding(invariant="unknown-key", key=name, detail=detail))
            names.setdefault(kind, []).append(name)
        task_ids = [split(name)[1][0] for name in names.get("task", [])]
        for chunk in _chunks(task_ids, _TASKS_PER_CALL):
            await self._step(self._check("audit_tasks", chunk))
        for kind in _SINGLE:
            singles = [(kind, name, "" if kind == "idem" else split(name)[1][0]) for name in names.get(kind, [])]
            for chunk in _chunks(singles, _SINGLES_PER_CALL):
                await self._step(self._check("audit_single", [part for one in chunk for part in one]))
        if self._logs:
            for task_id in task_ids:
                self.findings += await _check_log(self._connection, task_id)
        collections = [name for kind in _COLLECTIONS for name in names.get(kind, [])]
        return int(following) or -1, dict.fromkeys(collections, 0)

    async def _check(self, script: str, arguments: Iterable[str]) -> None:
        self.findings += _findings(await self._connection.run(script, self._repair, *arguments))

    async def _members(self, begun: Mapping[str, int]) -> dict[str, int]:
        """Look at a window of the first few collections; those that are left, with the rank to go on at."""
        names = list(begun)[:_COLLECTIONS_PER_CALL]
        arguments: list[str] = []
        for name in names:
            kind, parts = split(name)
            arguments += [kind, name, str(begun[name]), str(len(parts)), *parts]
        ranks, flat = await self._connection.run("audit_members", self._repair, *arguments)
        self.findings += _findings(flat)
        left = {name: rank for name, rank in zip(names, ranks, strict=True) if rank >= 0}
        return left | {name: rank for name, rank in begun.items() if name not in names}

    async def _step(self, work: Awaitable[T]) -> T:
        started = _now()
        result = await work
        if self._deadline is not None:
            await asyncio.sleep(_now() - started)
        return result

    def _is_over(self) -> bool:
        return self._deadline is not None and _now() >= self._deadline


def _findings(flat: list[Any]) -> list[Finding]:
    rows = [flat[start : start + 4] for start in range(0, len(flat), 4)]
    return [
        Finding(invariant=row[0].decode(), key=row[1].decode(), detail=row[2].decode(), repaired=bool(row[3]))
        for row in rows
    ]


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
            number != kept
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
