"""Where a reader stands in a task's log, and what is new to it. Pure. Read `Cursor.fresh` first.

A position is (attempt, n): its holder has n tokens and needs the one with index n next; the end's n is larger than any.
Log entries hold several tokens and may overlap (two owners of one attempt), and a failover may have undone some: so a
reader takes only positions beyond its own, and of tokens only the index that it needs next.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llorch_wire.errors import ApiError, ErrorCode
from llorch_wire.events import (
    TERMINAL_SEQUENCE,
    EndEvent,
    MigratedEvent,
    StartedEvent,
    TaskEvent,
    TokenEvent,
    decode_task_event,
    parse_position,
    token_position,
)
from orchestratord.store.types import LogEntry
from orchestratord.values import StreamItem

START = (0, 0)


@dataclass
class Cursor:
    """The last position taken, and the index of the next token where it is known."""

    position: tuple[int, int] = START
    next_index: int | None = None
    parted: bool = False
    """What comes next doesn't follow on what was taken: a failover has undone it. Nothing more is taken."""

    @property
    def text(self) -> str:
        """As `read_log` takes it."""
        return f"{self.position[0]}-{self.position[1]}"

    @property
    def finished(self) -> bool:
        """Whether the terminal event was taken."""
        return self.position[1] == TERMINAL_SEQUENCE

    def fresh(self, entries: Iterable[LogEntry]) -> list[StreamItem]:
        """What these entries hold beyond the cursor, which moves on."""
        items: list[StreamItem] = []
        for entry in entries:
            position = parse_position(entry.position)
            if entry.kind == "tokens":
                items += self.fresh_tokens(position[0], entry.tokens)
            elif position > self.position:
                event = decode_task_event(entry.kind, entry.data)
                if event is not None and self._takes(event, position):
                    items.append(StreamItem(event, entry.position))
            if self.parted:
                break
        return items

    def _takes(self, event: TaskEvent, position: tuple[int, int]) -> bool:
        """Pass an event that is no token. False when the reader shouldn't get it.

        A move that keeps fewer tokens than the reader has is kept from it: the tokens between will come again and be
        left out, and a reader that resumed from this move would get them. One that keeps more, or an end after more or
        fewer, can't be passed at all.
        """
        reached = _tokens_before(event)
        fits = self.next_index is None or reached is None or reached == self.next_index
        if not fits and (isinstance(event, EndEvent) or (reached or 0) > (self.next_index or 0)):
            self.parted = True
            return False
        self.position = position
        if self.next_index is None:
            self.next_index = _next_index_after(event)
            return True
        return not (isinstance(event, MigratedEvent) and event.tokens_kept < self.next_index)

    def fresh_tokens(self, attempt: int, tokens: Iterable[TokenEvent]) -> list[StreamItem]:
        """What is new of these tokens of one attempt."""
        items: list[StreamItem] = []
        for token in tokens:
            index = token.i
            if (attempt, index + 1) > self.position and (self.next_index is None or index == self.next_index):
                self.position = (attempt, index + 1)
                self.next_index = index + 1
                items.append(StreamItem(token, token_position(attempt, index)))
        return items

    def fresh_items(self, items: Iterable[StreamItem]) -> list[StreamItem]:
        """What is new of these items; those without a position pass only once something before them was new."""
        taken: list[StreamItem] = []
        for item in items:
            if item.position is None:
                if taken:
                    taken.append(item)
                continue
            position = parse_position(item.position)
            if isinstance(item.event, TokenEvent):
                taken += self.fresh_tokens(position[0], (item.event,))
            elif position > self.position and self._takes(item.event, position):
                taken.append(item)
            if self.parted:
                break
        return taken

    def can_take(self, attempt: int, first_index: int) -> bool:
        """Whether tokens of this attempt from `first_index` on leave no gap after what was taken."""
        return self.position[0] == attempt and self.next_index is not None and first_index <= self.next_index


def _tokens_before(event: TaskEvent) -> int | None:
    """How many tokens come before this event, where it says so."""
    match event:
        case MigratedEvent(tokens_kept=count) | EndEvent(tokens_out=count):
            return count
        case _:
            return None


def _next_index_after(event: TaskEvent) -> int | None:
    if isinstance(event, MigratedEvent):
        return event.tokens_kept
    return 0 if isinstance(event, StartedEvent) else None


def open_cursor(after: str | None, first: str, last: str, sealed: bool, tokens_logged: int, attempt_now: int) -> Cursor:
    """The cursor for `Last-Event-ID`, None: from the start. `first`, `last`: positions that the log holds now.

    Raises ApiError INVALID_PARAMS for what is no position, GONE when the log no longer reaches back to it, CONFLICT
    when it is ahead of a log that has ended, or of a live one by more than a failover may have undone: an end, or more
    than one attempt (`attempt_now`: the task's). One that is ahead by less waits for the log to come there again.
    """
    try:
        wanted = START if after is None else parse_position(after)
    except ValueError:
        raise ApiError(
            ErrorCode.INVALID_PARAMS,
            "Last-Event-ID (or `after`) must be an id that this task's stream gave, like `1-42`: send that, or leave "
            "it out to read from the start",
            param="Last-Event-ID",
        ) from None
    begins = parse_position(first)
    if begins != (0, 1) and wanted < begins:
        raise ApiError(
            ErrorCode.GONE,
            f"the log begins at {first} now: read on from there, or take the text from GET /v2/tasks/{{id}}",
            param="Last-Event-ID",
        )
    attempt, number = wanted
    tells_tokens = attempt > 0 and number < TERMINAL_SEQUENCE
    beyond = wanted > parse_position(last) or (tells_tokens and number > tokens_logged)
    if not sealed and wanted > START and (attempt > attempt_now + 1 or number == TERMINAL_SEQUENCE):
        raise ApiError(
            ErrorCode.CONFLICT,
            "this id is of an attempt or an end that this task doesn't have (a failover of Redis may have undone it): "
            "read again from the start",
            param="Last-Event-ID",
        )
    if sealed and beyond:
        raise ApiError(
            ErrorCode.CONFLICT,
            f"this id is ahead of the finished stream, which ends at {last}: read again from the start",
            param="Last-Event-ID",
        )
    return Cursor(wanted, number if tells_tokens else None)
