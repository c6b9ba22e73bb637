"""Wake-ups from Redis: subscribes to what this process needs now and passes each hint on. Read `Listening.run`.

A hint says only "look": losing every one of them would cost a second here and there, never an event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestratord.store.errors import StoreUnavailableError

if TYPE_CHECKING:
    from orchestratord.house import House
    from orchestratord.store.hints import HintReader

RETRY_S = 0.3
AT_ONCE = 64
SETTLE_S = 0.02
"""Most tasks are claimed here within this time and then need no subscription."""


class Listening:
    """The one subscriber of this process."""

    def __init__(self, house: House, *, on_queue: Callable[[], None], on_fleet: Callable[[], None]) -> None:
        self._house = house
        self._on_queue = on_queue
        self._on_fleet = on_fleet

    async def run(self) -> None:
        """Listen for ever; when Redis goes away, start over with every subscription."""
        while True:
            try:
                async with self._house.store.hints() as hints, asyncio.TaskGroup() as group:
                    await hints.subscribe("queue")
                    await hints.subscribe("fleet")
                    group.create_task(self._subscribe(hints), name="hint subscriptions")
                    group.create_task(self._listen(hints), name="hints")
            except* StoreUnavailableError:
                self._house.observations.count("store_errors", "hints")
            await asyncio.sleep(RETRY_S)

    async def _subscribe(self, hints: HintReader) -> None:
        followers = self._house.followers
        subscribed: set[str] = set()
        while True:
            wanted = followers.wanted_hints()
            for name in subscribed - wanted:
                await hints.unsubscribe(name)
            added = sorted(wanted - subscribed)
            for start in range(0, len(added), AT_ONCE):
                names = added[start : start + AT_ONCE]
                await asyncio.gather(*(hints.subscribe(name) for name in names))
                for name in names:
                    followers.kick(name.removeprefix("log:"))  # what came before the subscription
            subscribed = wanted
            await followers.hints_changed()
            await asyncio.sleep(SETTLE_S)

    async def _listen(self, hints: HintReader) -> None:
        async for name in hints:
            if name.startswith("log:"):
                self._house.followers.kick(name[4:])
            elif name == "queue":
                self._on_queue()
            elif name == "fleet":
                self._on_fleet()
        raise StoreUnavailableError("the subscription ended")
