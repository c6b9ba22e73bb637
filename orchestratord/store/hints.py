"""Wake-ups over Redis pub/sub. Hints only, never truth: one that is lost costs latency, not data.

Read `HintReader._listen`: it reconnects by itself, and after each reconnection gives every name once, because hints may
have passed unheard.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

from redis import exceptions

from orchestratord.store.keys import hint_channel, hint_name

CONFIRM_S = 1.0
IDLE_S = 5.0
BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)
BROKEN = (
    exceptions.RedisError,
    OSError,
    TimeoutError,
    AttributeError,  # redis-py, where another task has just dropped the connection under a command
    RuntimeError,  # uvloop, for a write to a transport that has just been closed
)


class HintReader:
    """Names that were hinted at since they were last given. Coalesces: at most one of each, so it is bounded by the
    number of subscriptions. One consumer iterates; any task may subscribe and unsubscribe."""

    def __init__(self, client: Any) -> None:
        """`client` is redis-py's; every subscription is made over one connection of its pool."""
        self._client = client
        self._names: dict[str, int] = {}
        self._pending: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._confirmed: dict[str, asyncio.Event] = {}
        self._pubsub: Any = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> HintReader:
        self._task = asyncio.create_task(self._listen(), name="store hints")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        self._wake.set()
        while task is not None and not task.done():
            task.cancel()  # a client may swallow one cancellation, where it ends its own timeout with another
            await asyncio.wait({task}, timeout=0.2)

    async def subscribe(self, name: str) -> None:
        """Returns when Redis has confirmed, so that what is published from now on is heard; after a second without an
        answer it returns too, and the subscription is made as soon as Redis is back. Subscriptions are counted."""
        self._names[name] = self._names.get(name, 0) + 1
        confirmed = self._confirmed.setdefault(name, asyncio.Event())
        if self._names[name] == 1:
            await self._send("subscribe", name)
        try:
            async with asyncio.timeout(CONFIRM_S):
                await confirmed.wait()
        except TimeoutError:
            return

    async def unsubscribe(self, name: str) -> None:
        """Undoes one `subscribe`; hints of the name that are still pending are dropped with the last one."""
        count = self._names.get(name, 0) - 1
        if count > 0:
            self._names[name] = count
            return
        if self._names.pop(name, None) is None:
            return
        self._pending.pop(name, None)
        self._confirmed.pop(name, None)
        await self._send("unsubscribe", name)

    async def __aiter__(self) -> AsyncIterator[str]:
        while True:
            while self._pending:
                name = next(iter(self._pending))
                del self._pending[name]
                yield name
            if self._task is None or self._task.done():
                return
            self._wake.clear()
            await self._wake.wait()

    async def _send(self, command: str, name: str) -> None:
        pubsub = self._pubsub
        if pubsub is None or pubsub.connection is None or not pubsub.connection.is_connected:
            return  # the next connection subscribes to every name
        try:
            async with asyncio.timeout(CONFIRM_S):
                await getattr(pubsub, command)(hint_channel(name))
        except BROKEN:
            return  # the listener meets the same failure and reconnects

    def _give(self, name: str) -> None:
        if name in self._names:
            self._pending[name] = None
            self._wake.set()

    async def _listen(self) -> None:
        failures = 0
        while self._task is not None:
            try:
                async for _ in self._messages():
                    failures = 0
            except BROKEN:
                for confirmed in self._confirmed.values():
                    confirmed.clear()
            await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
            failures += 1

    async def _messages(self) -> AsyncIterator[None]:
        pubsub = self._client.pubsub()
        try:
            await pubsub.subscribe(hint_channel("any"), *(hint_channel(name) for name in self._names))
            self._pubsub = pubsub
            # Names that were added while the line above waited.
            await pubsub.subscribe(*(hint_channel(name) for name in [*self._names, "any"]))
            for name in self._names:
                self._give(name)
            silent_s = 0.0
            while self._task is not None:
                message = await pubsub.get_message(timeout=1.0)
                silent_s = 0.0 if message is not None else silent_s + 1.0
                if silent_s > 2 * IDLE_S:
                    raise exceptions.ConnectionError("no answer to a ping")
                if silent_s > IDLE_S:
                    await pubsub.ping()
                if message is not None:
                    self._take(message)
                yield
        finally:
            self._pubsub = None
            await pubsub.aclose()

    def _take(self, message: dict[str, Any]) -> None:
        channel = message["channel"]
        name = hint_name(channel.decode()) if channel is not None else ""
        if message["type"] == "message":
            self._give(name)
        elif message["type"] == "subscribe" and name in self._confirmed:
            self._confirmed[name].set()
