"""Readers of streams: one follower per task and process, whatever the number of its readers. Read `Followers.follow`.

    local relay ── feed, after the commit ──▶ ring of the latest items ──▶ readers, each with its own place
    other replica's relay ── hint ──▶ catch-up from the log ──▶ ┘

Hints are hints: a follower that has heard nothing for a second looks into the log. A reader starts in the log, at its
cursor, and joins the ring where the two meet; one that then falls behind the ring is ended and can resume.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING

from llorch_wire.errors import ApiError, ErrorCode
from llorch_wire.events import (
    TERMINAL_SEQUENCE,
    EndEvent,
    ErrorEvent,
    MetricsEvent,
    QueuedEvent,
    TokenEvent,
    parse_position,
    terminal_position,
)
from orchestratord.cursor import Cursor, open_cursor
from orchestratord.follower import Follower
from orchestratord.patience import both
from orchestratord.store.errors import StoreUnavailableError
from orchestratord.values import StreamItem

if TYPE_CHECKING:
    from orchestratord.house import House

PAGE = 512
CATCHERS = 4
TICK_S = 1.0
RETRY_S = 0.2
DOUBT_S = 5.0
"""Silence after which a follower asks whether the log still leads on from where it is."""
MAX_QUEUE_LOOKS = 200
"""Waiting streams whose queue position is looked up in one second; with more, each is refreshed less often."""


class Followers:
    """All followers of this process, and the loops that feed them."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._followers: dict[str, Follower] = {}
        self._kicked: dict[str, None] = {}
        self._kick = asyncio.Event()
        self._subscriptions_changed = asyncio.Event()
        self._looked_from = 0
        self._closing = False

    # ---- what others tell

    def feed(
        self, task_id: str, attempt: int, tokens: Sequence[TokenEvent], metrics: MetricsEvent | None = None
    ) -> None:
        """Tokens that are in the log now, from the relay of this process. Cheap where nobody reads."""
        follower = self._followers.get(task_id)
        if follower is None:
            return
        cursor = follower.cursor
        if not cursor.can_take(attempt, tokens[0].i):
            self.kick(task_id)  # it hasn't seen `started` yet, or something in between
            return
        items = cursor.fresh_tokens(attempt, tokens)
        if metrics is not None:
            items.append(StreamItem(metrics, None))
        if items:
            follower.push_tokens(items, self._now())

    def feed_end(self, task_id: str, attempt: int, event: EndEvent | ErrorEvent, tokens: int) -> None:
        """The terminal event as it stands in the log now, after `tokens` tokens in all."""
        follower = self._followers.get(task_id)
        if follower is None:
            return
        cursor = follower.cursor
        if cursor.position[0] != attempt or cursor.next_index != tokens or cursor.finished:
            self.kick(task_id)
            return
        cursor.position = (attempt, TERMINAL_SEQUENCE)
        follower.push([StreamItem(event, terminal_position(attempt))], self._now())

    def kick(self, task_id: str) -> None:
        """The task's log has something new: look."""
        if task_id in self._followers:
            self._kicked[task_id] = None
            self._kick.set()

    def relayed_here(self, task_id: str, here: bool) -> None:
        """This process has begun, or ceased, to relay the task: its hints are not needed, or are again."""
        follower = self._followers.get(task_id)
        if follower is not None:
            follower.relayed_here = here
            self._subscriptions_changed.set()
            self.kick(task_id)

    def is_followed(self, task_id: str) -> bool:
        """Whether anybody reads the task here."""
        return task_id in self._followers

    def close(self) -> None:
        """End every reader; they resume at another replica."""
        self._closing = True
        for follower in self._followers.values():
            follower.wake(self._now())

    # ---- readers

    async def follow(self, task_id: str, tenant: str | None, after: str | None) -> AsyncGenerator[list[StreamItem]]:
        """See Orchestrator.follow."""
        cursor, last, sealed, waits = await self._open(task_id, tenant, after)
        if sealed:
            end = parse_position(last)
            async for items in self._history(task_id, cursor, lambda: end):
                yield items
            return
        follower = self._join(task_id, last, waits)
        try:
            async for items in self._history(task_id, cursor, lambda: follower.floor):
                yield items
            if cursor.parted or (cursor.position < follower.floor and not self._closing):
                # A failover has undone what the ring goes on from. Joining it would leave a hole; resuming doesn't.
                self._house.observations.count("readers_cut_off", "undone")
                return
            async for items in self._live(follower, cursor):
                yield items
        finally:
            self._leave(follower)

    async def _open(self, task_id: str, tenant: str | None, after: str | None) -> tuple[Cursor, str, bool, bool]:
        """The reader's cursor, the log's present last position, whether it is sealed, and whether the task has not
        started yet."""
        store = self._house.store
        record, bounds = await both(store.task(task_id, tenant), store.log_bounds(task_id))
        if record is None:
            raise ApiError(
                ErrorCode.NOT_FOUND, "there is no such task: check its id, or it was retired", param="task_id"
            )
        if bounds is None:
            raise ApiError(ErrorCode.GONE, "this task's events are kept no longer", param="task_id")
        first, last, sealed = bounds
        if sealed and record.finished_at_ms is None:  # it ended between the two reads
            record = await store.task(task_id, tenant) or record
        waits = record.status == "queued" and parse_position(last)[0] == 0
        return open_cursor(after, first, last, sealed, record.usage.tokens_out, record.attempt), last, sealed, waits

    def _join(self, task_id: str, last: str, waits: bool) -> Follower:
        """The task's follower with this reader counted; a new one begins at the log's present end."""
        follower = self._followers.get(task_id)
        if follower is None or follower.undone:
            attempt, number = parse_position(last)
            follower = Follower(task_id, Cursor((attempt, number), number if attempt else None), self._now())
            follower.relayed_here = self._house.relays.has(task_id)
            follower.queue_position = 0 if waits else None  # the first tick tells where, and when it will start
            self._followers[task_id] = follower
            self._subscriptions_changed.set()
            self.kick(task_id)
        follower.readers += 1
        self._house.observations.readers_active += 1
        return follower

    def _leave(self, follower: Follower) -> None:
        follower.readers -= 1
        self._house.observations.readers_active -= 1
        if follower.readers == 0 and self._followers.get(follower.task_id) is follower:
            del self._followers[follower.task_id]
            self._subscriptions_changed.set()

    async def _history(
        self, task_id: str, cursor: Cursor, until: Callable[[], tuple[int, int]]
    ) -> AsyncGenerator[list[StreamItem]]:
        """Pages of the log up to a position (that may move on meanwhile), at the reader's own pace."""
        resumed_at = cursor.position
        while cursor.position < until() and not self._closing:
            entries = await self._house.store.read_log(task_id, after=cursor.text, limit=PAGE)
            if not entries:
                return
            before = cursor.position
            items = cursor.fresh(entries)
            if cursor.parted and not items and before == resumed_at:
                raise ApiError(
                    ErrorCode.CONFLICT,
                    "what this id followed was undone by a failover of Redis: read again from the start",
                    param="Last-Event-ID",
                )
            if items:
                yield items
            if cursor.parted:
                return
            # Entries that hold nothing new (a rolled-back log) must not be read for ever.
            cursor.position = max(cursor.position, before, parse_position(entries[-1].position))

    async def _live(self, follower: Follower, cursor: Cursor) -> AsyncGenerator[list[StreamItem]]:
        """Everything from the ring on, each item once; [] after `keep_alive_s` of silence."""
        at, aligned, yielded_at = follower.base, False, self._now()
        while not cursor.finished:
            undone = follower.undone or cursor.parted
            if self._closing or undone or at < follower.base:
                why = "stopping" if self._closing else "undone" if undone else "behind"
                self._house.observations.count("readers_cut_off", why)
                return
            items = follower.items[at - follower.base :]
            at = follower.end
            if items and not aligned:
                items = cursor.fresh_items(items)
            aligned = aligned or cursor == follower.cursor  # in the next token too: a failover may part them
            if items or self._now() - yielded_at >= self._house.settings.keep_alive_s:
                yield items
                yielded_at = self._now()
            elif follower.cursor.finished:
                return
            elif not cursor.parted:
                await follower.changed()
            if aligned and at == follower.end and follower.cursor.finished:
                return

    # ---- loops

    async def run_catching(self) -> None:
        """Read what the kicked tasks' logs have new. Several of these run side by side, for ever."""
        while True:
            await self._kick.wait()
            if not self._kicked:
                self._kick.clear()
                continue
            task_id = next(iter(self._kicked))
            del self._kicked[task_id]
            try:
                await self._catch_up(task_id)
            except StoreUnavailableError:  # the stream pauses; `run_ticking` comes back to it
                self._house.observations.count("store_errors", "read_log")
                await asyncio.sleep(RETRY_S)

    async def run_ticking(self) -> None:
        """Once a second: look after quiet followers, tell queue positions, keep connections alive; for ever."""
        while True:
            await asyncio.sleep(TICK_S)
            now = self._now()
            for follower in self._followers.values():
                if now - follower.looked_at >= TICK_S and not follower.cursor.finished:
                    self.kick(follower.task_id)
                if now - follower.woken_at >= self._house.settings.keep_alive_s:
                    follower.wake(now)
            try:
                await self._tell_positions()
            except StoreUnavailableError:
                self._house.observations.count("store_errors", "task")

    def wanted_hints(self) -> set[str]:
        """Names of the hints that the followers need now."""
        return {f"log:{task_id}" for task_id, follower in self._followers.items() if not follower.relayed_here}

    async def hints_changed(self) -> None:
        """Wait until `wanted_hints` may have changed."""
        await self._subscriptions_changed.wait()
        self._subscriptions_changed.clear()

    async def _catch_up(self, task_id: str) -> None:
        while (follower := self._followers.get(task_id)) is not None:
            entries = await self._house.store.read_log(task_id, after=follower.cursor.text, limit=PAGE)
            follower.looked_at = self._now()
            follower.push(follower.cursor.fresh(entries), follower.looked_at)
            if follower.cursor.parted:
                follower.undone = True
                follower.wake(follower.looked_at)
                return
            if len(entries) < PAGE:
                await self._doubt(follower)
                return

    async def _doubt(self, follower: Follower) -> None:
        """End the readers of a task that a failover has taken back to before what they have, and that ended there, or
        is unknown: nothing will ever come after their place. They learn it when they resume."""
        now = self._now()
        if now - follower.doubted_at < DOUBT_S or follower.cursor.finished:
            return
        follower.doubted_at = now
        bounds = await self._house.store.log_bounds(follower.task_id)
        if bounds is None or (bounds[2] and parse_position(bounds[1]) < follower.cursor.position):
            follower.undone = True
            follower.wake(now)

    async def _tell_positions(self) -> None:
        """`queued` again, without an id, where a waiting task's position has changed."""
        waiting = [follower for follower in self._followers.values() if follower.queue_position is not None]
        first, self._looked_from = self._looked_from, self._looked_from + MAX_QUEUE_LOOKS
        if self._looked_from >= len(waiting):
            self._looked_from = 0
        for follower in waiting[first : first + MAX_QUEUE_LOOKS]:
            record = await self._house.store.task(follower.task_id, None)
            position = record.queue_position if record is not None else None
            if record is None or not position or position == follower.queue_position:
                continue
            forecast = await self._house.fleet.forecast(record.model, position, record.priority, record.placement)
            if follower.queue_position is None:
                continue  # it has started meanwhile
            event = QueuedEvent(
                task_id=follower.task_id,
                queue_position=position,
                predicted_start_ms=None if forecast is None else round(forecast.p50_ms),
                predicted_start_p90_ms=None if forecast is None else round(forecast.p90_ms),
            )
            follower.push([StreamItem(event, None)], self._now())

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
