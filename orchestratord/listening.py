"""Wake-ups from Redis: subscribes to what this process needs now and passes each hint on. Read `Listening.run`.

A hint says only "look": losing every one of them would cost a second here and there, never an event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestratord.house import House
    from orchestratord.store.hints import HintReader

AT_ONCE = 64
SETTLE_S = 0.02
"""Most tasks are claimed here within this time and then need no subscription."""


class Listening:
    """The one subscriber of this process. The reader of hints reconnects by itself."""

    def __init__(self, house: House, *, on_queue: Callable[[], None], on_fleet: Callable[[], None]) -> None:
        self._house = house
        self._on_queue = on_queue
        self._on_fleet = on_fleet
        self._hints: asyncio.Future[HintReader] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Listen for ever. Beside it runs `run_subscribing`."""
        async with self._house.store.hints() as hints:
            self._hints.set_result(hints)
            await hints.subscribe("queue")
            await hints.subscribe("fleet")
            async for name in hints:
                if name.startswith("log:"):
                    self._house.followers.kick(name[4:])
                elif name == "queue":
                    self._on_queue()
                elif name == "fleet":
                    self._on_fleet()

    async def run_subscribing(self) -> None:
        """Keep the subscriptions as the followers need them, for ever."""
        hints, followers = await self._hints, self._house.followers
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
