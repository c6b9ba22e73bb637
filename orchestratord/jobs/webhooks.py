"""Telling a task's `callback_url` that it ended: at least once, signed, with the same delivery id every time.

    {o}:webhooks ──due──▶ arq job webhook:<task>:<tries> ──POST──▶ receiver
         ▲                                │ 2xx, 410 or given up: out of the outbox
         └────────── due later ───────────┘ anything else: backoff

The outbox entry is written together with the task's end, so no crash can come between them. arq lets one replica run a
job; when that one is killed, another runs it again after job_timeout + 10 s, which is why the timeout is short.

    X-Llorch-Delivery    the same for every try of one task's webhook: a receiver that has seen it may ignore it
    X-Llorch-Timestamp   seconds since the epoch, of this try
    X-Llorch-Signature   v1=<hex HMAC-SHA256 of "<timestamp>.<delivery>.<body>" under LLORCH_WEBHOOK_SECRET>
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import aiohttp
import orjson
import structlog

from llorch_wire.errors import ApiError
from orchestratord.api.tasks import task_json
from orchestratord.jobs.addresses import BlockedAddressError, PinnedResolver, check_url, resolve
from orchestratord.observations import Observations
from orchestratord.runtime import Orchestrator, TaskView
from orchestratord.store.store import Store

POST_S = 10.0
FIRST_DELAY_MS = 2_000
LONGEST_DELAY_MS = 3_600_000
_DELIVERIES = uuid.UUID("0b1f3d1e-6c7a-4b6e-8b43-9d7a5c1f2e60")

Outcome: TypeAlias = Literal["delivered", "refused", "failed", "blocked", "given_up", "gone"]


@dataclass(frozen=True, slots=True)
class WebhookPolicy:
    """How webhooks are signed and how long they are tried."""

    secret: str | None
    attempts: int
    allow_private: bool


def delivery_id(task_id: str) -> str:
    """Id of a task's one delivery."""
    return str(uuid.uuid5(_DELIVERIES, task_id))


def sign(secret: str, timestamp: int, delivery: str, body: bytes) -> str:
    """Value of `X-Llorch-Signature`."""
    signed = f"{timestamp}.{delivery}.".encode() + body
    return "v1=" + hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()


def delay_ms(tries: int, jitter: float) -> int:
    """Pause after the `tries`-th failure: doubling from 2 s to an hour; `jitter` in 0..1 spreads it by a quarter."""
    return round(min(LONGEST_DELAY_MS, FIRST_DELAY_MS * 2 ** (tries - 1)) * (1 + jitter / 4))


def body_of(view: TaskView) -> bytes:
    """What the receiver gets: the kind of end and the task as `GET /v2/tasks/{id}` shows it."""
    record = view.record
    return orjson.dumps(
        {"type": f"task.{record.status}", "delivery_id": delivery_id(record.task_id), "task": task_json(view)}
    )


class Webhooks:
    """Delivers due webhooks."""

    def __init__(
        self,
        store: Store,
        orchestrator: Orchestrator,
        observations: Observations,
        policy: WebhookPolicy,
        *,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._orchestrator = orchestrator
        self._observations = observations
        self._policy = policy
        self._jitter = jitter
        self._log = structlog.get_logger("orchestratord.webhooks")

    async def deliver(self, task_id: str, tries: int) -> None:
        """The try after `tries` earlier ones; nothing when that one isn't the one that is due. Raises LlorchError when
        Redis is away: the webhook stays due."""
        if await self._store.webhook_tries(task_id) != tries:
            return
        try:
            view = await self._orchestrator.task(task_id, None)
        except ApiError as error:
            if error.retriable:
                raise
            await self._settle(task_id, "gone")
            return
        outcome, status = await self._post(view)
        if outcome == "failed":
            if tries + 1 < self._policy.attempts:
                pause = delay_ms(tries + 1, self._jitter())
                await self._store.defer_webhook(task_id, tries + 1, pause)
                self._observations.count("webhooks", outcome)
                self._log.warning("webhook failed", task_id=task_id, tries=tries + 1, status=status, again_in_ms=pause)
                return
            outcome = "given_up"
        await self._settle(task_id, outcome, status)

    async def _settle(self, task_id: str, outcome: Outcome, status: int | None = None) -> None:
        await self._store.finish_webhook(task_id)
        self._observations.count("webhooks", outcome)
        write = self._log.info if outcome == "delivered" else self._log.warning
        write("webhook settled", task_id=task_id, outcome=outcome, status=status)

    async def _post(self, view: TaskView) -> tuple[Outcome, int | None]:
        """One try, within its deadline. Nothing of the receiver's answer is read but its status."""
        if self._policy.secret is None:
            return "failed", None  # it was taken away since the task was admitted; it may come back
        url = view.record.callback_url or ""
        body, delivery, timestamp = body_of(view), delivery_id(view.record.task_id), int(time.time())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "llorch-webhook/1",
            "X-Llorch-Delivery": delivery,
            "X-Llorch-Timestamp": str(timestamp),
            "X-Llorch-Signature": sign(self._policy.secret, timestamp, delivery, body),
        }
        try:
            async with asyncio.timeout(POST_S):
                parts = check_url(url, allow_private=self._policy.allow_private)
                port = parts.port or (443 if parts.scheme == "https" else 80)
                address = await resolve(parts.hostname or "", port, allow_private=self._policy.allow_private)
                connector = aiohttp.TCPConnector(resolver=PinnedResolver(address), use_dns_cache=False, limit=1)
                async with (
                    aiohttp.ClientSession(connector=connector, trust_env=False) as session,
                    session.post(url, data=body, headers=headers, allow_redirects=False) as reply,
                ):
                    return _judge(reply.status), reply.status
        except (BlockedAddressError, ValueError):
            return "blocked", None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return "failed", None


def _judge(status: int) -> Outcome:
    if 200 <= status < 300:
        return "delivered"
    return "refused" if status == 410 else "failed"
