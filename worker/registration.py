"""Tells the orchestrator that this worker is here: register once per engine instance, then a heartbeat a second.

Read `Registration.run` first. Any replica will do: answers list all of them, and one that doesn't answer is left for
the next. Nothing here can stop the worker from serving.

    unregistered ──register 200──▶ registered ──heartbeat 404, or a new engine instance──▶ unregistered
         ▲  next replica after a failure, pause ≤ 1 s      │ heartbeat at once when the state changes
         └─────────────────────────────────────────────────┘
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Protocol, TypeVar

import aiohttp
import structlog
from pydantic import ValidationError

from llorch_wire.worker import Heartbeat, HeartbeatReply, Orders, RegisterReply, WorkerRegistration

REQUEST_TIMEOUT_S = 1.5
MAX_PAUSE_S = 1.0
FIRST_PAUSE_S = 0.05
GOODBYE_TIMEOUT_S = 1.0
MAX_REPLICAS = 64
MAX_REPLY_BYTES = 2**20
ReplyModel = TypeVar("ReplyModel", RegisterReply, HeartbeatReply)


class Subject(Protocol):
    """The worker that registers."""

    worker_id: str

    def registration(self) -> WorkerRegistration | None:
        """What to register with; None while there is nothing to offer."""
        ...

    def heartbeat(self) -> Heartbeat:
        """What runs now."""
        ...

    def obey(self, orders: Orders) -> None:
        """Do what the orchestrator wants."""
        ...


class _NoAnswerError(Exception):
    """The replica didn't answer, or not with what was asked for; `str` says how, without any secret."""


class Registration:
    """Keeps one worker known to the orchestrator."""

    def __init__(self, urls: Iterable[str], subject: Subject, *, key: str | None) -> None:
        self._configured = list(dict.fromkeys(urls))
        self._urls = list(self._configured)
        self._subject = subject
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._log = structlog.get_logger("worker.registration")
        self._wake = asyncio.Event()
        self._registered: str | None = None  # instance id
        self._interval_s = 1.0
        self._complained: str | None = None
        self.leave_at_end = False
        """Whether `say_goodbye` also takes the worker off the orchestrator's list."""

    def wake(self) -> None:
        """Something changed: send it now."""
        self._wake.set()

    async def run(self) -> None:
        """Register and heartbeat until cancelled."""
        failures = 0
        async with self._session() as session:
            while True:
                self._wake.clear()
                try:
                    await self._once(session)
                    failures = 0
                    pause_s = self._interval_s
                except _NoAnswerError as error:
                    failures += 1
                    self._complain(str(error))
                    self._rotate()
                    # One quick try at each other replica before any pause.
                    pause_s = 0.0 if failures < len(self._urls) else min(MAX_PAUSE_S, FIRST_PAUSE_S * 2**failures)
                await self._pause(pause_s, wakeable=failures == 0)

    async def say_goodbye(self) -> None:
        """One last heartbeat (draining, nothing runs); with `leave_at_end` the worker is taken off the list too."""
        if self._registered is None:
            return
        with suppress(_NoAnswerError):
            async with asyncio.timeout(GOODBYE_TIMEOUT_S), self._session() as session:
                await self._heartbeat(session)
                if self.leave_at_end:
                    await self._call(session, "DELETE", f"/v2/workers/{self._subject.worker_id}", None)

    async def _once(self, session: aiohttp.ClientSession) -> None:
        offer = self._subject.registration()
        if offer is not None and offer.instance_id != self._registered:
            await self._register(session, offer)
        elif self._registered is not None and not await self._heartbeat(session):
            self._registered = None
            if offer is not None:
                await self._register(session, offer)

    async def _register(self, session: aiohttp.ClientSession, offer: WorkerRegistration) -> None:
        status, body = await self._call(session, "POST", "/v2/workers/register", offer.model_dump_json())
        if status != 200:
            raise _NoAnswerError(_words(status, "the registration"))
        reply = _parse(RegisterReply, body)
        self._registered = offer.instance_id
        self._complained = None
        self._learn(reply.replicas, reply.heartbeat_ms)
        self._log.info("registered", orchestrator=self._urls[0], instance_id=offer.instance_id)
        await self._heartbeat(session)

    async def _heartbeat(self, session: aiohttp.ClientSession) -> bool:
        """False: the orchestrator doesn't know this worker (any more)."""
        beat = self._subject.heartbeat()
        assert self._registered is not None
        if beat.status != "ready":
            # A dead engine's successor has a new id before it is registered; its predecessor's lease is what counts.
            beat = beat.model_copy(update={"instance_id": self._registered})
        path = f"/v2/workers/{self._subject.worker_id}/heartbeat"
        status, body = await self._call(session, "POST", path, beat.model_dump_json())
        if status in (404, 409):
            return False
        if status != 200:
            raise _NoAnswerError(_words(status, "a heartbeat"))
        reply = _parse(HeartbeatReply, body)
        self._complained = None
        self._learn(reply.replicas, reply.heartbeat_ms)
        self._subject.obey(reply.orders)
        return True

    async def _call(
        self, session: aiohttp.ClientSession, method: str, path: str, body: str | None
    ) -> tuple[int, bytes]:
        try:
            async with session.request(method, self._urls[0] + path, data=body, allow_redirects=False) as reply:
                return reply.status, await reply.content.read(MAX_REPLY_BYTES)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _NoAnswerError(f"{self._urls[0]} doesn't answer ({type(error).__name__})") from None

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
            headers={"Content-Type": "application/json", **self._headers},
        )

    def _learn(self, replicas: list[str], heartbeat_ms: int) -> None:
        """The one that just answered first, then the other living replicas, then what was configured."""
        known = [url.rstrip("/") for url in replicas[:MAX_REPLICAS] if url.startswith(("http://", "https://"))]
        self._urls = list(dict.fromkeys([self._urls[0], *known, *self._configured]))
        self._interval_s = min(10.0, max(0.05, heartbeat_ms / 1000))

    def _rotate(self) -> None:
        self._urls = [*self._urls[1:], self._urls[0]]

    def _complain(self, reason: str) -> None:
        if reason != self._complained:  # the same trouble is worth one line
            self._complained = reason
            self._log.warning("orchestrator not reached, trying on", reason=reason)

    async def _pause(self, seconds: float, *, wakeable: bool) -> None:
        if not wakeable:
            await asyncio.sleep(seconds)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()


def _parse(model: type[ReplyModel], body: bytes) -> ReplyModel:
    try:
        return model.model_validate_json(body)
    except ValidationError:
        raise _NoAnswerError("the orchestrator's answer isn't understood; are the versions far apart?") from None


def _words(status: int, what: str) -> str:
    if status in (401, 403):
        return f"the orchestrator refused {what} ({status}); set LLORCH_WORKER_KEY as it is set there"
    return f"the orchestrator answered {what} with {status}"
