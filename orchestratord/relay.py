"""One attempt's way from its worker into the log and on to its readers. Read `Relay.run` first.

    connect → read → decode → commit (group) → feed readers → … → outcome → settle

Persist before forward: readers get a token only after `Committer.append` returned. While a commit is in flight the
relay doesn't read, so everything that comes meanwhile is one batch, and a Redis that is away holds the worker back.

| race | who wins |
|---|---|
| cancel, deadline or a newer attempt against this relay's tokens | the log: append answers `stale`, the relay stops |
| two owners of one attempt (this process was paused) | both read the same generation; the log takes what is new |
| worker's `end` against a cancel | whichever store script runs first; the other changes nothing |
| connection lost against the worker's end | the worker keeps its end until acknowledged; re-attaching reads it |
| preempt order against the end | the worker sends one of the two |
| stop of this replica against anything | the relay ends between two awaits; the log says where the next begins |
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from llorch_wire.events import (
    EndEvent,
    ErrorEvent,
    MetricsEvent,
    PreemptedEvent,
    TokenEvent,
    WorkerStartedEvent,
    decode_worker_event,
)
from llorch_wire.sse import SseFrame, SseOverflowError, SseParser
from orchestratord.outcomes import (
    Broken,
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
from orchestratord.patience import until_stored
from orchestratord.refusals import ended_by_refusal, is_worth_a_retry, turned_away
from orchestratord.store.errors import LogGapError
from orchestratord.store.types import RunningTask, TokenBatch
from orchestratord.worker_client import StreamLostError, WorkerStalledError, WorkerStream, WorkerUnreachableError

if TYPE_CHECKING:
    from orchestratord.house import House

MAX_IDLE_CONNECTIONS = 2
"""Connections in a row to a healthy worker that bring no token, before the attempt counts as failed."""


@dataclass(frozen=True)
class Start:
    """What a newly claimed attempt begins with. An adopted one has none: it attaches."""

    payload: bytes = field(repr=False)
    resume_token_ids: tuple[int, ...] = field(repr=False)


class Relay:
    """Reads one attempt until it is over. `run` returns how it ended; `orchestratord.settle` draws the consequences."""

    def __init__(self, house: House, task: RunningTask, start: Start | None) -> None:
        self.task = task
        self.adopted = start is None
        self.next_index = task.tokens_logged if start is None else len(start.resume_token_ids)
        self.first_index = self.next_index
        self.delivered = False
        """A worker answered 200 to this relay: the attempt really ran."""
        self.drained = False
        """This replica asked the attempt to yield because its worker drains."""
        self.stopped = False
        """Told to end. A cancellation alone may get lost (see `patience.end_tasks`)."""
        self.settling = False
        """Its outcome is known and being written down."""
        self._house = house
        self._start = start
        self._prompt_tokens = 0
        self._metrics: MetricsEvent | None = None

    @property
    def progressed(self) -> bool:
        """Whether this relay brought a token into the log."""
        return self.next_index > self.first_index

    async def run(self) -> Outcome:
        """Connect, relay, and on a broken connection ask the worker and connect again, until there is an outcome."""
        idle = 0
        while True:
            before = self.next_index
            outcome = await self._connection()
            if self.stopped or not isinstance(outcome, Broken):
                return Disowned() if isinstance(outcome, Broken) else outcome
            idle = 0 if self.next_index > before else idle + 1
            verdict = await self._ask(outcome)
            if verdict is not None:
                return verdict
            if idle >= MAX_IDLE_CONNECTIONS:
                return Faulted(f"{idle} connections in a row brought nothing; the last: {outcome.why}")
            await asyncio.sleep(idle * random.uniform(0.1, 0.2))

    def rewind(self, index: int) -> None:
        """The log's tail was rolled back by a failover: read the generation again from there."""
        self.next_index = index
        self.first_index = min(self.first_index, index)

    async def _ask(self, broken: Broken) -> Outcome | None:
        """After a broken connection: None when the generation may still be there and is still this replica's."""
        verdict = await self._house.watch.verdict(self.task, broken.why)
        if verdict == "restarted":
            return Lost(broken.why, "engine_restart")
        if verdict == "lost":
            if self.delivered or broken.sent:
                return Lost(broken.why, "worker_lost")
            return TurnedAway(broken.why, unreachable=True)
        return None if await self._house.replicas.owns(self.task.task_id) else Disowned()

    async def _connection(self) -> Outcome | Broken:
        try:
            async with self._house.client.execute(
                self.task.worker_url,
                self._body(),
                after=self.next_index - 1,
                correlation_id=self.task.correlation_id,
            ) as stream:
                if stream.status != 200:
                    return await self._refused(stream)
                self.delivered = True
                self._start = None  # the prompt may be megabytes, and is needed no more
                return await self._read(stream)
        except WorkerUnreachableError as error:
            return Broken(str(error), sent=error.sent)
        except (StreamLostError, WorkerStalledError) as error:
            return Broken(str(error))
        except LogGapError as gap:
            self.rewind(gap.expected_index)
            return Broken("the log is behind")
        except (msgspec.DecodeError, SseOverflowError):
            return Faulted("the worker sent something that is no event of this protocol")

    async def _read(self, stream: WorkerStream) -> Outcome | Broken:
        """The hot path: everything that one network read brought is one batch."""
        house, task = self._house, self.task
        parser = SseParser()
        while chunk := await stream.read():
            tokens, last = self._decode(parser.feed(chunk))
            if tokens:
                batch = TokenBatch(task_id=task.task_id, attempt=task.attempt, tokens=tuple(tokens))
                if await house.committer.append(batch) == "stale":
                    return Fenced()
                if self.stopped:
                    return Disowned()
                self._committed(tokens)
            if last is not None:
                return last
            if self._prompt_tokens and tokens:  # not before the first of them: they come first
                await self._count_prompt()
        return Broken("the worker closed the stream")

    def _decode(self, frames: list[SseFrame]) -> tuple[list[TokenEvent], Outcome | Broken | None]:
        """New tokens, and what ends this connection. A token that the log has already is dropped."""
        tokens: list[TokenEvent] = []
        index = self.next_index
        for frame in frames:
            event = decode_worker_event(frame.event, frame.data)
            match event:
                case TokenEvent(i=i):
                    if i == index:
                        tokens.append(event)
                        index += 1
                    elif i > index:
                        return tokens, Broken(f"token {index} is missing")
                    else:
                        self._house.observations.count("tokens_recomputed", self.task.model)
                case EndEvent() | ErrorEvent() | PreemptedEvent():
                    return tokens, self._ending(event)
                case WorkerStartedEvent():
                    if event.instance_id != self.task.instance_id:
                        # It restarted between claim and delivery. Adopters would look for the claimed instance.
                        return tokens, Lost("another engine instance answered", "engine_restart", blameless=True)
                    self._prompt_tokens = event.tokens_in
                case MetricsEvent():
                    self._metrics = event
                case None:
                    continue
        return tokens, None

    def _committed(self, tokens: list[TokenEvent]) -> None:
        house, task = self._house, self.task
        if self.next_index == 0:
            house.first_token(task)
        self.next_index = tokens[-1].i + 1
        house.observations.count("tokens_relayed", task.model, len(tokens))
        house.followers.feed(task.task_id, task.attempt, tokens, self._metrics)
        self._metrics = None

    async def _count_prompt(self) -> None:
        tokens_in, self._prompt_tokens = self._prompt_tokens, 0
        await until_stored(
            lambda: self._house.store.record_prompt_tokens(self.task.task_id, self.task.attempt, tokens_in),
            self._house.observations,
            "record_prompt_tokens",
        )

    def _ending(self, event: EndEvent | ErrorEvent | PreemptedEvent) -> Outcome:
        if isinstance(event, PreemptedEvent):
            return Yielded()
        if isinstance(event, ErrorEvent):
            if is_worth_a_retry(event):
                return Faulted(f"{event.code} at the worker", crash=event.code == "INTERNAL")
            return Ended(event)
        if event.stop_reason == "CANCELLED":
            # Who cancelled has sealed the log before. Where nobody did, the task must go on elsewhere: after a failover
            # the worker may have been told to stop what Redis no longer knew of, so it is nobody's failure.
            return Yielded(unasked=True)
        return Ended(event)

    def _body(self) -> bytes:
        """JSON of the ExecuteRequest: the whole one until a worker has answered, an attaching one from then on."""
        task = self.task
        head = {"task_id": task.task_id, "attempt": task.attempt, "seed": task.seed}
        if self._start is None:
            return msgspec.json.encode(head | {"attach_instance_id": task.instance_id})
        rest = msgspec.json.encode(head | {"resume_token_ids": self._start.resume_token_ids})
        return rest[:-1] + b"," + self._start.payload[1:]  # both are JSON objects, neither is empty

    async def _refused(self, stream: WorkerStream) -> Outcome:
        status, refusal = stream.status, await stream.refusal()
        if status == 404:
            return Vanished() if self._start is None else Faulted("it has no /execute")
        if status in (400, 413, 422):
            payload = await until_stored(
                lambda: self._house.store.payload(self.task.task_id), self._house.observations, "payload"
            )
            return Ended(ended_by_refusal(refusal, payload or b""))
        return turned_away(status, refusal)
