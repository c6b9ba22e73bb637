"""What follows from an attempt's end: one store transition, then whatever is owed to the worker. Read `settle` first.

Every transition is fenced by the attempt number, so that whoever comes second changes nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import msgspec
import structlog

from llorch_wire.errors import ErrorCode
from llorch_wire.events import EndEvent, ErrorEvent
from orchestratord.outcomes import (
    Disowned,
    Ended,
    Faulted,
    Fenced,
    Lost,
    Outcome,
    TurnedAway,
    Vanished,
    Yielded,
)
from orchestratord.patience import backoff_ms, until_stored
from orchestratord.refusals import without_quotes
from orchestratord.stopping import stop_attempt
from orchestratord.store.types import RequeueReason, RunningTask

if TYPE_CHECKING:
    from orchestratord.house import House
    from orchestratord.relay import Relay

MAX_CRASHES = 4
"""Workers that a task may take down in a row, without a token in between, before it is called poison."""
MAX_IDLE_YIELDS = 16
"""Attempts in a row that yield without a token, before that counts as the worker's failure. Preemption alone can't
reach it: the pauses between them grow to ten seconds."""
ACK_TRIES = 3


class Recent:
    """How often lately, by task: bounded, forgets the longest unseen first. Only ever used for pauses."""

    def __init__(self, bound: int = 10_000) -> None:
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._bound = bound

    def get(self, task_id: str) -> int:
        """0 for a task never seen or forgotten."""
        return self._counts.get(task_id, 0)

    def put(self, task_id: str, count: int) -> None:
        """0 forgets the task."""
        self._counts.pop(task_id, None)
        if count:
            self._counts[task_id] = count
            while len(self._counts) > self._bound:
                self._counts.popitem(last=False)


class Settlement:
    """Carries out the ends of attempts."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._failures = Recent()
        self._refusals = Recent()
        self._idle_yields = Recent()
        self._log = structlog.get_logger("orchestratord.settle")

    async def settle(self, relay: Relay, outcome: Outcome) -> None:
        """The store first, then the worker. Waits for Redis as long as it takes. Raises LogGapError, and nothing has
        changed, when the attempt has ended and the log's tail is gone (a failover undid it): relay it again."""
        task = relay.task
        match outcome:
            case Ended(event):
                await self._complete(relay, event)
            case Faulted(why, crash):
                await self._house.client.cancel(task.worker_url, task.task_id, task.attempt, "fenced")
                await self._fail(relay, "worker_error", why, crash=crash)
            case Lost(why, reason, blameless):
                await self._lose(relay, why, reason, blameless=blameless or not relay.delivered)
            case Vanished():
                if relay.delivered:
                    await self._fail(relay, "worker_error", "the worker forgot the generation", crash=False)
                else:
                    await self._requeue(relay, "handover" if relay.adopted else "worker_error", "it was not there")
            case Yielded(unasked):
                await self._yielded(relay, unasked=unasked)
            case TurnedAway(why, retry_after_ms, unreachable):
                await self._turned_away(relay, why, retry_after_ms, unreachable=unreachable)
            case Fenced():
                self._house.observations.count("attempts_ended", "stopped")
                await stop_attempt(self._house, task, "fenced")
            case Disowned():
                self._house.observations.count("attempts_ended", "handed_over")
        self._house.followers.kick(task.task_id)
        self._house.wake_dispatcher(task.model)  # a slot is free, or this task waits

    async def _complete(self, relay: Relay, event: EndEvent | ErrorEvent) -> None:
        house, task = self._house, relay.task
        needed = 0
        if isinstance(event, EndEvent):
            needed = relay.next_index
            queued_ms = event.queue_time_ms + await self._waited_ms(task)
            event = msgspec.structs.replace(event, tokens_out=needed, queue_time_ms=queued_ms)
        else:
            payload = await until_stored(lambda: house.store.payload(task.task_id), house.observations, "payload")
            event = without_quotes(event, payload or b"")
        ended = await until_stored(
            lambda: house.store.complete(task.task_id, task.attempt, event, tokens=needed),
            house.observations,
            "complete",
        )
        if ended:
            house.followers.feed_end(task.task_id, task.attempt, event, relay.next_index)
        house.wake_dispatcher(task.model)
        how = "stopped" if not ended else "completed" if isinstance(event, EndEvent) else "failed"
        house.observations.count("attempts_ended", how)
        self._forget(task.task_id)
        if not relay.delivered:
            return  # it never accepted the attempt: nothing to forget there
        for _ in range(ACK_TRIES):
            if await house.client.acknowledge(task.worker_url, task.task_id, task.attempt, task.correlation_id):
                return

    async def _waited_ms(self, task: RunningTask) -> int:
        """From admission to the first start. The worker knows only of its own queue."""
        started_at_ms: int | None = task.claimed_at_ms
        if task.attempt > 1:
            record = await until_stored(
                lambda: self._house.store.task(task.task_id, None), self._house.observations, "task"
            )
            started_at_ms = None if record is None else record.started_at_ms
        return 0 if started_at_ms is None else max(0, started_at_ms - task.created_at_ms)

    async def _lose(self, relay: Relay, why: str, reason: RequeueReason, *, blameless: bool) -> None:
        task = relay.task
        if reason == "engine_restart":  # its HTTP side lives and may hold, or be starting, this attempt
            await self._house.client.cancel(task.worker_url, task.task_id, task.attempt, "fenced")
        if blameless:
            await self._requeue(relay, reason, why)
        else:
            await self._fail(relay, reason, why, crash=True)

    async def _fail(self, relay: Relay, reason: RequeueReason, why: str, *, crash: bool) -> None:
        task_id = relay.task.task_id
        earlier = 0 if relay.progressed else self._failures.get(task_id)
        limit = min(MAX_CRASHES, self._house.settings.max_failures) if crash else self._house.settings.max_failures
        await self._requeue(
            relay,
            reason,
            why,
            failure=True,
            limit=limit,
            pause_ms=0 if relay.progressed else backoff_ms(earlier),
        )

    async def _yielded(self, relay: Relay, *, unasked: bool) -> None:
        """No failure, and at once back in the queue; unless attempts yield again and again without a token.

        `unasked`: the worker stopped the attempt by itself; the task goes elsewhere, after a pause.
        """
        task_id = relay.task.task_id
        times = 0 if relay.progressed else self._idle_yields.get(task_id) + 1
        self._idle_yields.put(task_id, times)
        if times > MAX_IDLE_YIELDS:
            await self._fail(relay, "worker_error", f"it yielded {times} times without a token", crash=False)
            return
        pause_ms = backoff_ms(times - 2, first_ms=100) if times > 1 else 0
        if unasked:
            pause_ms = max(pause_ms, backoff_ms(0, first_ms=100))
            await self._requeue(relay, "worker_error", "it stopped the attempt unasked", pause_ms=pause_ms)
            return
        reason: RequeueReason = "drained" if relay.drained else "preempted"
        await self._requeue(relay, reason, "it yielded", avoid=False, pause_ms=pause_ms)

    async def _turned_away(self, relay: Relay, why: str, retry_after_ms: int | None, *, unreachable: bool) -> None:
        """Not the task's fault, so never counted against it; the pauses grow, so that it doesn't spin."""
        times = self._refusals.get(relay.task.task_id)
        self._refusals.put(relay.task.task_id, times + 1)
        pause_ms = max(backoff_ms(times, first_ms=100), min(retry_after_ms or 0, 10_000))
        await self._requeue(relay, "worker_lost" if unreachable else "worker_error", why, pause_ms=pause_ms)

    async def _requeue(
        self,
        relay: Relay,
        reason: RequeueReason,
        why: str,
        *,
        failure: bool = False,
        avoid: bool = True,
        limit: int = 5,
        pause_ms: int = 0,
    ) -> None:
        house, task = self._house, relay.task
        outcome = await until_stored(
            lambda: house.store.requeue(
                task.task_id,
                task.attempt,
                reason,
                failure=failure,
                progressed=relay.progressed,
                avoid_worker=task.worker_id if avoid else None,
                backoff_ms=pause_ms,
                max_failures=limit,
                error=_last_failure(task, reason, why) if failure else None,
            ),
            house.observations,
            "requeue",
        )
        if failure:
            self._failures.put(task.task_id, outcome.failures)
        if outcome.state == "stale":
            house.observations.count("attempts_ended", "stopped")
            return
        words = {"task_id": task.task_id, "attempt": task.attempt, "worker_id": task.worker_id, "reason": reason}
        self._log.info("attempt over", **words, why=why, next=outcome.state, correlation_id=task.correlation_id or None)
        if outcome.state == "failed":
            self._forget(task.task_id)
            house.observations.count("attempts_ended", "failed")
            return
        house.observations.count("attempts_ended", "requeued")
        house.observations.count("migrations", reason)
        house.migrations[task.worker_id, reason] += 1

    def _forget(self, task_id: str) -> None:
        self._failures.put(task_id, 0)
        self._refusals.put(task_id, 0)
        self._idle_yields.put(task_id, 0)


def _last_failure(task: RunningTask, reason: RequeueReason, why: str) -> ErrorEvent:
    code = ErrorCode.INTERNAL if reason == "worker_error" else ErrorCode.WORKER_LOST
    return ErrorEvent(code=code, message=f"at worker `{task.worker_id}`: {why}. See that worker's log")
