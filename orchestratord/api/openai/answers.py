"""One `/v1` answer: its tasks from submission to the last event, streamed or whole. Read `Answer.open` first.

who goes first                         what happens to the tasks
every task ends                        nothing: they are done
one task fails                         the answer fails with its error; the others are cancelled
the client leaves                      cancelled down to the engine step, unless somebody else follows them
this replica stops                     cancelled: a `/v1` client has no way to come back to its stream
a call joins, by its key, a task that  it begins anew, under the same key
is cancelled as the call before leaves
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from llorch_wire.errors import ApiError, ErrorCode, LlorchError
from llorch_wire.events import EndEvent, ErrorEvent, StartedEvent, TokenEvent
from orchestratord.api.errors import from_event
from orchestratord.api.openai.logprobs import Alignment, Shown
from orchestratord.api.openai.requests import Translated
from orchestratord.api.openai.shapes import (
    DONE,
    ChoiceSoFar,
    Head,
    Json,
    Part,
    Shape,
    data_frame,
    error_frame,
    finish_reason,
    usage_of,
)
from orchestratord.patience import end_tasks
from orchestratord.runtime import Orchestrator, StreamItem, Submitted, Tenant

QUEUE_BOUND = 64
"""Batches of one stream that wait to be merged; a slow reader then holds the followers back, which have their bound."""

Batch = list[StreamItem]


class Submission:
    """How the tasks of one call are handed in, and handed in again."""

    def __init__(
        self,
        orchestrator: Orchestrator,
        tenant: Tenant,
        translated: Translated,
        idempotency_key: str | None,
        correlation_id: str,
    ) -> None:
        self._orchestrator = orchestrator
        self._tenant = tenant
        self._translated = translated
        self._correlation_id = correlation_id
        self.idempotency_key = idempotency_key

    async def submit(self, index: int) -> Submitted:
        """The task of one choice. Its key is the call's and its index, apart by a space: no client's key has one."""
        key = self.idempotency_key
        return await self._orchestrator.submit(
            self._translated.tasks[index],
            tenant=self._tenant,
            idempotency_key=key if key is None or index == 0 else f"{key} {index}",
            correlation_id=self._correlation_id,
            fingerprint=self._translated.fingerprint,
            attended=True,
        )


class Answer:
    """The tasks behind one `/v1` call. `close` it, whatever happened."""

    def __init__(
        self,
        orchestrator: Orchestrator,
        tenant: Tenant,
        translated: Translated,
        shape: Shape,
        submitted: list[Submitted],
        submission: Submission,
    ) -> None:
        self._orchestrator = orchestrator
        self._tenant = tenant
        self._translated = translated
        self._shape = shape
        self._submission = submission
        self._task_ids = [one.task_id for one in submitted]
        self._alignments = [Alignment() for _ in submitted]
        self._ends: dict[int, EndEvent] = {}
        self._failed: set[int] = set()
        self.head = Head("", submitted[0].created_at_ms // 1000, submitted[0].model)

    @property
    def task_ids(self) -> list[str]:
        """The tasks, by the index of their choice."""
        return self._task_ids

    @classmethod
    async def open(
        cls,
        orchestrator: Orchestrator,
        tenant: Tenant,
        translated: Translated,
        shape: Shape,
        *,
        id_prefix: str,
        idempotency_key: str | None,
        correlation_id: str,
    ) -> Answer:
        """Submit every task. Raises the first refusal; tasks that this call created before it are cancelled."""
        submission = Submission(orchestrator, tenant, translated, idempotency_key, correlation_id)
        submitted: list[Submitted] = []
        try:
            for index in range(len(translated.tasks)):
                submitted.append(await submission.submit(index))
        except (ApiError, asyncio.CancelledError):
            for one in submitted:
                if one.created:
                    with contextlib.suppress(LlorchError):
                        await orchestrator.cancel(one.task_id, tenant, abandoned=True)
            raise
        answer = cls(orchestrator, tenant, translated, shape, submitted, submission)
        answer.head.id = id_prefix + submitted[0].task_id
        orchestrator.serve(answer.task_ids)
        return answer

    async def close(self) -> None:
        """Cancel what hasn't ended; nobody waits for it any more."""
        self._orchestrator.served(self._task_ids)
        for index, task_id in enumerate(self._task_ids):
            if index not in self._ends and index not in self._failed:
                with contextlib.suppress(LlorchError):
                    await self._orchestrator.disconnected(task_id, self._tenant, resumable=False)

    async def whole(self) -> Json:
        """The unstreamed answer. Raises ApiError when a task fails."""
        choices = [ChoiceSoFar(index) for index in range(len(self._task_ids))]
        failures: list[ApiError] = []

        async def collect(choice: ChoiceSoFar) -> None:
            try:
                async with contextlib.aclosing(self._events(choice.index)) as events:
                    async for batch in events:
                        self._collect(choice, batch)
            except ApiError as error:
                failures.append(error)

        async with asyncio.TaskGroup() as group:
            collecting = [group.create_task(collect(choice)) for choice in choices]
            left = set(collecting)
            try:
                while left and not failures:
                    _, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await end_tasks(collecting)  # a group cancels once, which may get lost
        if failures:
            raise failures[0]
        return self._shape.whole(self.head, choices, self._usage())

    async def stream(self, group: asyncio.TaskGroup) -> AsyncGenerator[bytes, None]:
        """Frames of the streamed answer. Raises ApiError only before its first frame; later it is a frame."""
        begun = False
        opened: set[int] = set()
        try:
            async with contextlib.aclosing(self._merged(group)) as merged:
                async for index, batch in merged:
                    frames = self._frames(index, batch, opened)
                    if frames:
                        begun = True
                        yield frames
        except ApiError as error:
            if not begun:
                raise
            yield error_frame(error)
            return
        if self._translated.include_usage:
            yield data_frame({**self._shape.empty(self.head), "usage": self._usage()})
        yield DONE

    def _usage(self) -> Json:
        ends = [self._ends[index] for index in range(len(self._task_ids))]
        return usage_of(ends, self._translated.choices_per_prompt)

    def _collect(self, choice: ChoiceSoFar, batch: Batch) -> None:
        for event, _ in batch:
            if isinstance(event, TokenEvent):
                choice.text.append(event.t)
                if self._translated.logprobs:
                    choice.shown += self._alignments[choice.index].push(event)
            elif isinstance(event, StartedEvent):
                self._started(event)
            elif isinstance(event, EndEvent):
                choice.end = event
                choice.shown += self._alignments[choice.index].finish(event)

    def _frames(self, index: int, batch: Batch, opened: set[int]) -> bytes:
        """One chunk for everything that is ready, and the last one apart: its `finish_reason` comes after the text."""
        text = ""
        shown: list[Shown] = []
        end: EndEvent | None = None
        began = False
        for event, _ in batch:
            if isinstance(event, TokenEvent):
                began = True
                text += event.t
                if self._translated.logprobs:
                    shown += self._alignments[index].push(event)
            elif isinstance(event, StartedEvent):
                self._started(event)
            elif isinstance(event, EndEvent):
                end = event
                shown += self._alignments[index].finish(event)
        frames: list[bytes] = []
        if self._shape.opens and (began or end is not None) and index not in opened:
            opened.add(index)
            frames.append(self._chunk(index, Part(opening=True)))
        if text or shown:
            frames.append(self._chunk(index, Part(text, shown)))
        if end is not None:
            frames.append(self._chunk(index, Part(finish=finish_reason(end))))
        return b"".join(frames)

    def _chunk(self, index: int, part: Part) -> bytes:
        chunk = self._shape.chunk(self.head, index, part)
        if self._translated.include_usage:
            chunk["usage"] = None
        return data_frame(chunk)

    def _started(self, event: StartedEvent) -> None:
        if self.head.system_fingerprint is None:
            self.head.system_fingerprint = "fp_" + event.model_digest.removeprefix("sha256:")[:16]

    async def _events(self, index: int) -> AsyncGenerator[Batch, None]:
        """A task's events up to its end. A follower that was cut off goes on where it was.

        Raises ApiError when the task failed or was cancelled, or when this replica stops.
        """
        after: str | None = None
        begun = cancelled = False
        while True:
            follower = self._orchestrator.follow(self._task_ids[index], self._tenant, after)
            async with contextlib.aclosing(follower):
                async for batch in follower:
                    for event, position in batch:
                        after = position or after
                        if isinstance(event, ErrorEvent):
                            self._failed.add(index)
                            raise from_event(event)
                        if isinstance(event, EndEvent):
                            self._ends[index] = event
                    if cancelled := index in self._ends and self._ends[index].stop_reason == "CANCELLED":
                        break
                    if batch:
                        begun = begun or any(isinstance(event, TokenEvent) for event, _ in batch)
                        yield batch
                    if index in self._ends:
                        return
            if self._orchestrator.state == "draining":
                raise ApiError(ErrorCode.DRAINING, "this orchestrator is stopping; send the request again")
            if cancelled:
                if begun or not await self._begin_anew(index):
                    raise ApiError(ErrorCode.CONFLICT, "the task was cancelled by another call")
                after = None

    async def _begin_anew(self, index: int) -> bool:
        """A task that this call only joined may have been cancelled because the call before it left: hand it in again.

        False when it is the same one, which somebody cancelled on purpose, that comes back. Raises ApiError.
        """
        if self._submission.idempotency_key is None:
            return False
        before, again = self._task_ids[index], await self._submission.submit(index)
        if again.task_id == before:
            return False
        self._orchestrator.serve([again.task_id])
        self._orchestrator.served([before])
        self._task_ids[index] = again.task_id
        del self._ends[index]
        if index == 0:
            self.head.id = self.head.id.replace(before, again.task_id)
        return True

    async def _merged(self, group: asyncio.TaskGroup) -> AsyncGenerator[tuple[int, Batch], None]:
        """Every task's batches as they come, with the index of their choice."""
        if len(self._task_ids) == 1:
            async with contextlib.aclosing(self._events(0)) as only:
                async for batch in only:
                    yield 0, batch
            return
        ready: asyncio.Queue[tuple[int, Batch | ApiError | None]] = asyncio.Queue(QUEUE_BOUND)

        async def pump(index: int) -> None:
            try:
                async with contextlib.aclosing(self._events(index)) as events:
                    async for batch in events:
                        await ready.put((index, batch))
            except ApiError as error:
                await ready.put((index, error))
            else:
                await ready.put((index, None))

        pumps = [group.create_task(pump(index)) for index in range(len(self._task_ids))]
        try:
            open_pumps = len(pumps)
            while open_pumps:
                index, batch = await ready.get()
                if isinstance(batch, ApiError):
                    raise batch
                if batch is None:
                    open_pumps -= 1
                else:
                    yield index, batch
        finally:
            await end_tasks(pumps)
