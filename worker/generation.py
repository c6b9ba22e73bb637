"""One attempt of a task in this worker: its rendered output, its readers, and how it ends.

Read `Generation.take` (a token came) and `Reader.chunks` (what a connection gets) first. All output is kept until the
orchestrator has acknowledged the end, so any number of readers can come, go and come back. No sockets here; time comes
in as values.

    engine ── take(token) ──▶ frames: [token 5][token 6]…[terminal]     each reader has its own position
                                        ▲            ▲
                                    reader A      reader B
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llorch_wire.events import (
    EndEvent,
    ErrorEvent,
    MetricsEvent,
    PreemptedEvent,
    StopReason,
    TokenEvent,
    TopLogprob,
    WorkerStartedEvent,
    encode_data,
)
from llorch_wire.sse import KEEP_ALIVE, frame
from worker.answer_text import AnswerText
from worker.engine.protocol import AddSequence, SequenceEnd, TokenOut

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_CHUNK_BYTES = 256 * 1024
Terminal = EndEvent | ErrorEvent | PreemptedEvent


@dataclass(frozen=True, slots=True)
class Job:
    """A validated request, ready for the engine. Resumed tokens stand in `sequence.output_token_ids`."""

    task_id: str
    attempt: int
    sequence: AddSequence
    text: AnswerText
    """Already holds the resumed tokens."""


@dataclass(eq=False)
class Generation:
    """State of one attempt. Made by `Generations`, which owns all of them."""

    job: Job
    started: WorkerStartedEvent
    token_text: Callable[[int], str]
    now: float
    """When it was accepted, seconds on the loop's clock."""

    correlation_id: str = ""
    """Of the request that started it, for log lines."""
    frames: list[bytes] = field(default_factory=list)
    """Rendered token events from index `first_index` on; the terminal event last."""
    terminal: Terminal | None = None
    readers: dict[Reader, None] = field(default_factory=dict)
    """Oldest first."""

    def __post_init__(self) -> None:
        self.first_index = self.job.text.num_tokens
        self.size_bytes = 0
        self.first_token_at: float | None = None
        self.last_token_at = self.now
        self.unread_since = self.now
        """When the last reader left, while there is none."""
        self.finished_at: float | None = None
        """When the last token came, where the end itself hasn't yet."""

    @property
    def key(self) -> tuple[str, int]:
        """(task_id, attempt)."""
        return self.job.task_id, self.job.attempt

    def is_history_of(self, seed: int, wanted: int) -> bool:
        """Whether this attempt, drawn from that seed, has or will have the token at index `wanted`.

        After a failover that lost writes an orchestrator may hand out an attempt number a second time. What runs here
        under that number then began further on than what it asks for, or was drawn from another seed.
        """
        return self.seed == seed and self.first_index <= wanted

    @property
    def seed(self) -> int:
        """What its tokens are drawn from."""
        return self.job.sequence.sampling.seed

    @property
    def next_index(self) -> int:
        """Index of the next token, which is also how many the answer has so far."""
        return self.job.text.num_tokens

    @property
    def running(self) -> bool:
        """Whether more tokens are expected."""
        return self.terminal is None and self.job.text.finished is None

    def take(self, token: TokenOut, now: float) -> None:
        """Append one token. The caller wakes the readers once a step. Tokens after the last one are dropped."""
        if not self.running:
            return
        if token.index != self.next_index:
            raise ValueError(f"token {token.index} came where {self.next_index} was due")
        text, finished = self.job.text.push(token.token_id)
        event = TokenEvent(
            t=text, i=token.index, id=token.token_id, logprob=token.logprob, top=self._alternatives(token)
        )
        self._append(frame(TokenEvent.EVENT, encode_data(event)))
        if self.first_token_at is None:
            self.first_token_at = now
        self.last_token_at = now
        if finished is not None:
            self.finished_at = now

    def end(self, terminal: Terminal) -> None:
        """Append the one terminal event and wake the readers. Later calls change nothing."""
        if self.terminal is not None:
            return
        self.terminal = terminal
        self._append(frame(terminal.EVENT, encode_data(terminal)))
        self.wake()

    def end_event(self, reason: StopReason, engine_end: SequenceEnd | None) -> EndEvent:
        """The `end` of this generation; times are the engine's, or this process' own where it gave none."""
        first = self.first_token_at
        if engine_end is not None:
            cached, prefill, decode = engine_end.cached_tokens, engine_end.prefill_time_ms, engine_end.decode_time_ms
        else:
            cached, prefill, decode = 0, 0, 0
        if not prefill and first is not None:
            prefill = round((first - self.now) * 1000)
        if not decode and first is not None:
            decode = round((self.last_token_at - first) * 1000)
        return EndEvent(
            stop_reason=reason,
            tokens_in=self.started.tokens_in,
            tokens_out=self.next_index,
            cached_tokens=cached,
            prefill_time_ms=prefill,
            decode_time_ms=decode,
            stop_sequence_matched=self.job.text.stop_matched if reason == "STOP_SEQUENCE" else None,
            determinism=self.started.determinism,
        )

    def tokens_per_second(self) -> float:
        """Decode rate of this attempt so far."""
        first = self.first_token_at
        made = self.next_index - self.first_index
        if first is None or made < 2 or self.last_token_at <= first:
            return 0.0
        return round((made - 1) / (self.last_token_at - first), 2)

    def wake(self) -> None:
        """Let every reader look again."""
        for reader in self.readers:
            reader.wake()

    def _append(self, rendered: bytes) -> None:
        self.frames.append(rendered)
        self.size_bytes += len(rendered)

    def _alternatives(self, token: TokenOut) -> tuple[TopLogprob, ...] | None:
        if not token.top:
            return None
        return tuple(TopLogprob(id=i, t=self.token_text(i), logprob=logprob) for i, logprob in token.top)


class Reader:
    """One connection that follows a generation from the token after index `after`."""

    def __init__(self, generation: Generation, after: int, clock: Callable[[], float]) -> None:
        self.generation = generation
        self._position = max(0, after + 1 - generation.first_index)
        self._clock = clock
        self._event = asyncio.Event()
        self._note: bytes | None = None
        self._sent_at = clock()
        self._metrics_at = self._sent_at
        self._metrics_index = generation.next_index
        self.closed = False

    async def chunks(self) -> AsyncIterator[bytes]:
        """Rendered bytes: `started`, what there is, then what comes, until the terminal event or `close`.

        The reader counts as present from the first chunk until the iterator is closed.
        """
        generation = self.generation
        generation.readers[self] = None
        try:
            yield frame(WorkerStartedEvent.EVENT, encode_data(generation.started))
            while not self.closed:
                self._event.clear()
                chunk, self._note = self._note or b"", None
                chunk += self._take_frames()
                if chunk:
                    self._sent_at = self._clock()
                    yield chunk
                elif generation.terminal is not None:
                    return
                else:
                    await self._event.wait()
        finally:
            generation.readers.pop(self, None)
            if not generation.readers:
                generation.unread_since = self._clock()

    def wake(self) -> None:
        """There is something to look at."""
        self._event.set()

    def close(self) -> None:
        """End the stream without a terminal event."""
        self.closed = True
        self._event.set()

    def tick(self, now: float, *, keep_alive_s: float, metrics_s: float) -> None:
        """Called every fraction of a second: metrics at most once every `metrics_s`, else a comment on a silent stream.

        Nothing piles up: there is room for one such note, and a connection that can't keep up gets fewer of them.
        """
        generation = self.generation
        if generation.terminal is not None or self._note is not None:
            return
        if now - self._metrics_at >= metrics_s and generation.next_index > self._metrics_index:
            self._metrics_at, self._metrics_index = now, generation.next_index
            event = MetricsEvent(tokens_per_second=generation.tokens_per_second())
            self._note = frame(MetricsEvent.EVENT, encode_data(event))
        elif now - self._sent_at >= keep_alive_s:
            self._note = KEEP_ALIVE
        else:
            return
        self.wake()

    def _take_frames(self) -> bytes:
        frames = self.generation.frames
        end, size = self._position, 0
        while end < len(frames) and size < MAX_CHUNK_BYTES:
            size += len(frames[end])
            end += 1
        taken = frames[self._position : end]
        self._position = end
        return b"".join(taken)
