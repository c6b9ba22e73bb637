"""Follow one task's events to its end, across every restart and cut on the way. Read `Follower.events` first.

The log position of the last event is the cursor; after a drop the stream is opened again with it as `Last-Event-ID`,
and orchestratord sends exactly the rest. Token indices are checked all the same: a repeat is dropped and a gap is an
error, so that text on the terminal is the text of the log or nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import msgspec

from llorch.errors import ApiFailure, CliError, TimedOut, Unreachable
from llorch.http import Api, segment
from llorch_wire.events import EndEvent, ErrorEvent, TaskEvent, TokenEvent, decode_task_event
from llorch_wire.sse import SseFrame

T = TypeVar("T")

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 2.0
SILENCE_S = 30.0
"""orchestratord sends a comment at least every 10 s; three missed ones mean that nobody is there."""


class Received(NamedTuple):
    """One event: as it came, and as what it is (None: an event that this version doesn't know).

    `has_id`: the event itself carried an id; a frame's `id` is the last one seen on the stream.
    """

    frame: SseFrame
    event: TaskEvent | None
    has_id: bool


class Retry:
    """How long to wait before the next try, and when to give up: after `patience_s` without any progress.

    `note` is told when trouble starts and when it is over. Where nobody was ever reached there is nothing to wait for.
    """

    def __init__(
        self,
        patience_s: float,
        note: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._patience_s = patience_s
        self._note = note
        self._clock = clock
        self._sleep = sleep
        self._since: float | None = None
        self._delay_s = BACKOFF_FIRST_S
        self._contacted = False

    def call(self, action: Callable[[], T]) -> T:
        """The result of `action`, tried again while that is worth it."""
        while True:
            try:
                result = action()
            except CliError as error:
                self.wait(error, next_step="llorch status")
            else:
                self.worked()
                return result

    def worked(self) -> None:
        """Something came: the trouble, if there was one, is over."""
        if self._since is not None:
            self._note(f"connected again after {self._clock() - self._since:.1f} s")
        self._since = None
        self._delay_s = BACKOFF_FIRST_S
        self._contacted = True

    def wait(self, error: CliError, *, next_step: str) -> None:
        """Wait before the next try. Raises TimedOut when patience is over, `error` where trying again is no use."""
        self._contacted = self._contacted or not isinstance(error, Unreachable) or error.connected
        if not (self._contacted and worth_retrying(error)):
            raise error
        retry_after_ms = error.retry_after_ms if isinstance(error, ApiFailure) else None
        now = self._clock()
        if self._since is None:
            self._since = now
            self._note(f"{error.message}; trying again for up to {self._patience_s:g} s")
        left_s = self._since + self._patience_s - now
        if left_s <= 0:
            raise TimedOut(
                f"gave up after {self._patience_s:g} s; the last failure: {error.message}", next_step=next_step
            ) from error
        # Jitter, so that many clients of a restarted daemon don't come back in one wave.
        delay_s = self._delay_s * random.uniform(0.5, 1.0)
        self._delay_s = min(self._delay_s * 2, BACKOFF_MAX_S)
        self._sleep(min(max(delay_s, (retry_after_ms or 0) / 1000), left_s))


def worth_retrying(error: CliError) -> bool:
    """Whether the same request may work soon: nobody there, silence, or a daemon that says it isn't ready."""
    if isinstance(error, ApiFailure):
        return error.retriable and error.code != "NO_WORKERS"
    return isinstance(error, Unreachable | TimedOut)


class Follower:
    """One task's stream. `cursor` and `next_index` say how far it was read; next_index None takes any first index."""

    def __init__(self, api: Api, task_id: str, retry: Retry, *, silence_s: float = SILENCE_S) -> None:
        self._api = api
        self.task_id = task_id
        self._retry = retry
        self._silence_s = silence_s
        self.cursor: str | None = None
        self.next_index: int | None = 0
        self.ended = False

    def events(self) -> Iterator[list[Received]]:
        """Every event from the cursor on, one list per network read; returns after `end` or `error`.

        Raises TimedOut when patience is over, ApiFailure when orchestratord refuses (an unknown task, a trimmed log).
        """
        while not self.ended:
            try:
                yield from self.once()
                if self.ended:
                    return
                raise Unreachable("the stream was closed before its end", next_step="llorch status", connected=True)
            except CliError as error:
                self._retry.wait(error, next_step=f"llorch task watch {self.task_id}")

    def once(self, silence_s: float | None = None) -> Iterator[list[Received]]:
        """As `events`, over one connection: what breaks it is raised."""
        path = f"/v2/tasks/{segment(self.task_id)}/events"
        with self._api.stream(path, after=self.cursor, silence_s=silence_s or self._silence_s) as stream:
            for frames in stream:
                self._retry.worked()
                if batch := [received for frame in frames if (received := self._take(frame))]:
                    yield batch
                if self.ended:
                    return

    def _take(self, frame: SseFrame) -> Received | None:
        if self.ended:
            return None
        try:
            event = decode_task_event(frame.event, frame.data)
        except msgspec.MsgspecError as error:
            raise CliError(
                f"a `{frame.event}` event can't be read: {error}", next_step="llorch status    (compares versions)"
            ) from None
        if isinstance(event, TokenEvent) and not self._due(event.i):
            return None
        has_id = frame.id is not None and frame.id != self.cursor
        if frame.id is not None:
            self.cursor = frame.id
        self.ended = isinstance(event, EndEvent | ErrorEvent)
        return Received(frame, event, has_id)

    def _due(self, index: int) -> bool:
        """Whether this is the next token; False for a repeat. Raises CliError for a gap."""
        expected = index if self.next_index is None else self.next_index
        if index > expected:
            raise CliError(
                f"the stream left out tokens {expected} to {index - 1}", next_step=f"llorch task watch {self.task_id}"
            )
        self.next_index = max(expected, index + 1)
        return index == expected
