"""Streaming clients of a chaos run: each does what a careful client does and writes down all it gets.
Read `Clients._one`.

POST with an id of its own until it is acknowledged; follow at a random replica; on any break follow on elsewhere from
the last id; now and then drop the connection on purpose, cancel, or walk away.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from llorch_wire.sse import SseOverflowError, SseParser
from tests.chaos.support.ledger import Ledger
from tests.chaos.support.redis_sets import Held
from tests.chaos.support.town import CLIENT_KEY, DEMO, SCRIPTED

SILENCE_S = 3.5
"""Replicas comment at least once a second: a stream that is silent for longer is given up, and followed elsewhere."""
TERMINAL = ("end", "error")
REFUSALS = ("NOT_FOUND", "CONFLICT", "GONE")
TROUBLE = (aiohttp.ClientError, OSError, TimeoutError, SseOverflowError)


@dataclass
class Task:
    """One task in a client's hands."""

    task_id: str
    body: dict[str, Any]
    acked: bool = False
    cursor: str | None = None
    tokens: int = 0
    terminal: str | None = None
    connections: int = 0
    cancel_at: int | None = None
    drop_at: set[int] = field(default_factory=set)
    walk_away_at: int | None = None
    last_news_at: float = 0.0

    @property
    def streaming(self) -> bool:
        """Tokens are coming: what a fault can break."""
        return self.acked and self.tokens > 0 and self.terminal is None


@dataclass(frozen=True)
class Load:
    """What clients ask for."""

    min_tokens: int = 60
    max_tokens: int = 180
    cancels: float = 0.06
    drops: float = 0.15
    leaves: float = 0.03
    batch: float = 0.15
    sessions: float = 0.2


class Clients:
    """All clients of a run and what they share."""

    def __init__(
        self, urls: list[str], ledger: Ledger, seed: int, load: Load, *, prompts: list[dict[str, Any]] | None = None
    ) -> None:
        self.urls, self.ledger, self.seed, self.load = urls, ledger, seed, load
        self.demo_bodies = prompts or []
        """Requests to the real worker whose undisturbed answers are known."""
        self.current: dict[int, Task] = {}
        self.done: list[Task] = []
        self.pauses: list[float] = []
        """The longest silence of each finished interactive stream at the scripted workers, in seconds."""
        self.posts_refused = 0
        self.reconnections = 0
        self.unexpected: list[str] = []
        self.stopping = asyncio.Event()
        self._session: aiohttp.ClientSession | None = None

    def streams_in_flight(self) -> int:
        """Streams that have tokens and no end yet."""
        return sum(task.streaming for task in self.current.values())

    def held(self) -> list[Held]:
        """What clients hold right now."""
        tasks = [*self.done, *self.current.values()]
        return [Held(task.task_id, task.cursor) for task in tasks if task.acked]

    async def run(self, count: int, demo: int = 0) -> None:
        """`count` clients, the last `demo` of them at the real worker; each ends after `stopping` with its task."""
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=5),
                headers={"Authorization": f"Bearer {CLIENT_KEY}"},
                read_bufsize=2**16,
            ) as self._session,
            asyncio.TaskGroup() as group,
        ):
            for number in range(count):
                group.create_task(self._client(number, number >= count - demo))

    async def _client(self, number: int, demo: bool) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        await asyncio.sleep(rng.uniform(0, 2.0))  # not all in one moment
        while not self.stopping.is_set():
            task = self._draw(rng, demo)
            self.current[number] = task
            await self._one(task, rng, number)
            self.done.append(task)
            del self.current[number]

    def _draw(self, rng: random.Random, demo: bool) -> Task:
        task_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        load = self.load
        if demo:
            return Task(task_id, {**rng.choice(self.demo_bodies), "model": DEMO, "task_id": task_id})
        tokens = rng.randint(load.min_tokens, load.max_tokens)
        body: dict[str, Any] = {
            "task_id": task_id, "model": SCRIPTED, "prompt": f"chaos {rng.randint(0, 9)}", "max_tokens": tokens,
            "seed": rng.getrandbits(62), "ignore_eos": rng.random() < 0.8,
        }  # fmt: skip
        if rng.random() < load.batch:
            body["priority"] = "batch"
        if rng.random() < load.sessions:
            body["session_id"] = f"s{rng.randint(0, 20)}"
        task = Task(task_id, body)
        fate = rng.random()
        if fate < load.cancels:
            task.cancel_at = rng.randint(0, tokens)
        elif fate < load.cancels + load.leaves:
            body["on_disconnect"] = "cancel"
            task.walk_away_at = rng.randint(1, tokens)
        if rng.random() < load.drops:
            task.drop_at = {rng.randint(1, tokens) for _ in range(2)}
        return task

    # ---- one task

    async def _one(self, task: Task, rng: random.Random, number: int) -> None:
        await self.ledger.write({"k": "intent", "c": number, "task": task.task_id, "body": task.body})
        await self._post(task, rng)
        quietest = 0.0
        task.last_news_at = time.monotonic()
        while task.terminal is None:
            quietest = max(quietest, await self._follow(task, rng))
            if task.walk_away_at is not None and task.tokens >= task.walk_away_at and task.terminal is None:
                await self.ledger.write({"k": "left", "task": task.task_id})
                task.walk_away_at = None
                await self._until_over(task, rng)
                break
            if task.terminal is None:
                self.reconnections += 1
                await asyncio.sleep(rng.uniform(0.05, 0.25))
        if not demo_or_batch(task):
            self.pauses.append(quietest)
        await self.ledger.write({"k": "over", "task": task.task_id})

    async def _post(self, task: Task, rng: random.Random) -> None:
        """Until it is acknowledged; the same id makes every repetition the same task."""
        assert self._session is not None
        while True:
            replica = rng.randrange(len(self.urls))
            try:
                async with self._session.post(
                    f"{self.urls[replica]}/v2/tasks", data=orjson.dumps(task.body),
                    headers={"Content-Type": "application/json"}, timeout=_timeout(8.0),
                ) as reply:  # fmt: skip
                    answer = await reply.read()
                    if reply.status == 202:
                        await self.ledger.write({"k": "ack", "task": task.task_id, "at": time.time()})
                        task.acked = True
                        return
                    if reply.status not in (429, 503):
                        self._wonder(f"POST {task.task_id}: {reply.status} {answer[:300]!r}")
                    if reply.status == 503 and "Retry-After" not in reply.headers:
                        self._wonder(f"POST {task.task_id}: 503 without Retry-After {answer[:300]!r}")
            except TROUBLE:
                pass
            self.posts_refused += 1
            await asyncio.sleep(rng.uniform(0.1, 0.4))

    async def _follow(self, task: Task, rng: random.Random) -> float:
        """One connection, to its end. Returns the longest silence before news, in seconds."""
        assert self._session is not None
        replica = rng.randrange(len(self.urls))
        headers = {} if task.cursor is None else {"Last-Event-ID": task.cursor}
        url = f"{self.urls[replica]}/v2/tasks/{task.task_id}/events"
        quietest = 0.0
        try:
            async with self._session.get(url, headers=headers, timeout=_timeout(None)) as reply:
                if reply.status != 200:
                    await self._refused(task, reply)
                    return 0.0
                task.connections += 1
                entry = {"k": "conn", "task": task.task_id, "n": task.connections, "replica": replica}
                await self.ledger.write({**entry, "after": task.cursor})
                parser = SseParser()
                async for chunk in reply.content.iter_any():
                    frames = parser.feed(chunk)
                    if frames:
                        now = time.monotonic()
                        quietest, task.last_news_at = max(quietest, now - task.last_news_at), now
                        if await self._take(task, frames, rng):
                            return quietest
        except TROUBLE:
            pass
        return quietest

    async def _take(self, task: Task, frames: list[Any], rng: random.Random) -> bool:
        """Write events down, then count them as held. True when this client wants to let go of the connection."""
        previous, events = task.cursor, []
        for frame in frames:
            # The parser repeats the last id for events that have none.
            own_id = frame.id if frame.id is not None and frame.id != previous else None
            previous = own_id or previous
            events.append([frame.event, own_id, frame.data.decode()])
        await self.ledger.write({"k": "ev", "task": task.task_id, "n": task.connections, "e": events})
        task.cursor = previous
        for name, position, data in events:
            task.tokens += name == "token"
            if name in TERMINAL:
                if position is None and orjson.loads(data)["code"] in REFUSALS:
                    # Redis was slow, so that the refusal came in the open stream instead of as a status.
                    await self._gone(task, orjson.loads(data)["code"])
                    return True
                task.terminal = name
        if task.cancel_at is not None and task.tokens >= task.cancel_at and task.terminal is None:
            task.cancel_at = None
            await self._cancel(task, rng)
        if any(task.tokens >= at for at in task.drop_at):
            task.drop_at = {at for at in task.drop_at if task.tokens < at}
            return True
        return task.walk_away_at is not None and task.tokens >= task.walk_away_at

    async def _refused(self, task: Task, reply: aiohttp.ClientResponse) -> None:
        body = await reply.read()
        if reply.status in (404, 409, 410):
            await self._gone(task, str(reply.status))
        elif reply.status != 503:
            self._wonder(f"events of {task.task_id}: {reply.status} {body[:300]!r}")

    async def _gone(self, task: Task, why: str) -> None:
        """An acknowledged task, or what this client has of it, is unknown: only a failover may lead here. Once more."""
        await self.ledger.write({"k": "gone", "task": task.task_id, "why": why})
        task.cursor, task.tokens, task.acked, task.terminal = None, 0, False, None
        task.connections += 1
        await self._post(task, random.Random(task.task_id))

    async def _cancel(self, task: Task, rng: random.Random) -> None:
        """Cancel in mid-stream, until a replica says that it did. One that was asked may have done it and been cut off,
        and a failover may have undone the task when the next one is asked."""
        assert self._session is not None
        await self.ledger.write({"k": "cancel", "task": task.task_id, "status": "asked"})
        while True:
            replica = rng.randrange(len(self.urls))
            url = f"{self.urls[replica]}/v2/tasks/{task.task_id}/cancel"
            try:
                async with self._session.post(url, timeout=_timeout(8.0)) as reply:
                    body = await reply.read()
                    if reply.status == 200:
                        status = orjson.loads(body)["status"]
                        await self.ledger.write({"k": "cancel", "task": task.task_id, "status": status})
                        return
                    if reply.status == 404:
                        return  # `_follow` finds it out and writes it down
                    if reply.status != 503:
                        self._wonder(f"cancel of {task.task_id}: {reply.status} {body[:300]!r}")
            except TROUBLE:
                pass
            await asyncio.sleep(rng.uniform(0.1, 0.3))

    async def _until_over(self, task: Task, rng: random.Random) -> None:
        """A client that has walked away looks, without streaming, until the task is over."""
        assert self._session is not None
        while True:
            url = f"{self.urls[rng.randrange(len(self.urls))]}/v2/tasks/{task.task_id}"
            try:
                async with self._session.get(url, timeout=_timeout(8.0)) as reply:
                    answer = orjson.loads(await reply.read())
                    if reply.status == 200 and answer["status"] in ("completed", "cancelled", "failed"):
                        task.terminal = answer["status"]
                        return
                    if reply.status == 404:
                        await self._gone(task, "404")
            except (*TROUBLE, ValueError):
                pass
            await asyncio.sleep(rng.uniform(0.2, 0.5))

    def _wonder(self, what: str) -> None:
        if len(self.unexpected) < 50:
            self.unexpected.append(what)


def demo_or_batch(task: Task) -> bool:
    """Its stream may be silent for long without a fault: batch yields, and there is only one real worker."""
    return task.body["model"] == DEMO or task.body.get("priority") == "batch"


def _timeout(total: float | None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=total, sock_connect=1.5, sock_read=SILENCE_S)
