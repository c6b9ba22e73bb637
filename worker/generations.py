"""All generations of this worker: who runs, who reads, who was cancelled, who ended and isn't acknowledged yet.

Read `start`, `step` and `tick` first. One thread, no awaits, no I/O but the two calls into the engine link; time comes
in through the clock.

    who wins?
    cancel before its execute     the cancel is remembered, the execute gets 409
    same attempt twice            one generation, two readers
    same number, other history    the newcomer: a failover has undone what the number stood for (`is_history_of`)
    higher attempt                the lower one yields (`preempted`), its slot is the newcomer's
    lower attempt                 409
    end and cancel                whichever came first; there is one terminal event
    stop string and next tokens   the stop; tokens the engine made beyond it are dropped
    engine death and end          an answer whose last token came has ended properly; everything else is `error`
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Literal, Protocol

import structlog

from llorch_wire.errors import RETRIABLE, ErrorCode
from llorch_wire.events import ErrorEvent, PreemptedEvent, StopReason, WorkerStartedEvent
from llorch_wire.worker import CancelReply, RunningAttempt
from worker.engine.protocol import AddSequence, SequenceEnd, StepOutput, TokenOut
from worker.generation import Generation, Job, Reader, Terminal
from worker.refusals import OVERLOADED, refused, unavailable

RETENTION_S = 600.0
MAX_RETAINED = 4096
MAX_RETAINED_BYTES = 256 * 2**20
MAX_OVER = 8192
MAX_READERS = 16
LATE_END_S = 1.0
KEEP_ALIVE_S = 0.5
METRICS_S = 1.0
RETRY_LATER = "retry after retry_after_ms, or start this worker with more --slots"
CancelReason = Literal["cancel", "preempt", "fenced", "deadline"]

_STOP_REASONS: dict[str, StopReason] = {"EOS": "EOS", "STOP_TOKEN": "STOP_SEQUENCE", "MAX_TOKENS": "MAX_TOKENS"}


class EngineLink(Protocol):
    """What generations need of an engine. Both calls return at once; after its death they do nothing."""

    def add(self, sequence: AddSequence) -> None:
        """Start a sequence."""
        ...

    def cancel(self, sequence_id: str) -> None:
        """Stop a sequence; it is answered by its SequenceEnd."""
        ...


class Watcher(Protocol):
    """Hears what happens, for metrics."""

    def generation_started(self, generation: Generation) -> None:
        """A new attempt was accepted."""
        ...

    def tokens_made(self, tokens: list[TokenOut], generations: list[Generation]) -> None:
        """One step's tokens were delivered to these generations."""
        ...

    def generation_ended(self, generation: Generation, outcome: str) -> None:
        """A terminal event was appended."""
        ...


class Generations:
    """Registry of every attempt that this worker knows."""

    def __init__(
        self,
        engine: EngineLink,
        watcher: Watcher,
        clock: Callable[[], float],
        token_text: Callable[[int], str],
        *,
        orphan_grace_s: float,
    ) -> None:
        self._engine = engine
        self._watcher = watcher
        self._clock = clock
        self._token_text = token_text
        self._orphan_grace_s = orphan_grace_s
        self._log = structlog.get_logger("worker.generations")
        self.slots_total = 0
        self._reserved = 0
        self._known: dict[tuple[str, int], Generation] = {}
        self._current: dict[str, Generation] = {}  # highest attempt of each known task
        self._by_sequence: dict[str, Generation] = {}  # until their SequenceEnd
        self._active: set[Generation] = set()  # those that hold a slot
        self._done: OrderedDict[tuple[str, int], float] = OrderedDict()  # when they ended, oldest first
        self._done_bytes = 0
        # Highest attempt of a task that mustn't start any more: cancelled before it came, or acknowledged.
        self._over: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self.busy_at = clock()
        """When this worker last had work."""

    # -- asked by the server ------------------------------------------------------------------------------------

    def find(self, task_id: str, attempt: int) -> Generation | None:
        """The generation of this attempt, running or ended and not yet forgotten."""
        return self._known.get((task_id, attempt))

    def check_startable(self, task_id: str, attempt: int) -> None:
        """Raises Refused (409) for an attempt that is over, whether it came or not, or that a higher one has fenced."""
        over = self._over.get(task_id)
        if over is not None and attempt <= over[0]:
            raise refused(
                ErrorCode.CONFLICT, "this attempt was cancelled, or ended and was acknowledged", field="attempt"
            )
        current = self._current.get(task_id)
        if current is not None and current.job.attempt > attempt:
            message = f"attempt {current.job.attempt} of this task is known here; a lower one doesn't run any more"
            raise refused(ErrorCode.CONFLICT, message, field="attempt")

    @contextmanager
    def reserve_slot(self, task_id: str) -> Generator[None]:
        """Hold a slot while a request is being prepared. Raises Refused (503) at once when there is none.

        An attempt that fences a running one takes over its slot.
        """
        fences = task_id in self._current and self._current[task_id] in self._active
        if self.slots_free <= 0 and not fences:
            raise unavailable(OVERLOADED, f"all {self.slots_total} slots are taken; {RETRY_LATER}")
        self._reserved += 1
        try:
            yield
        finally:
            self._reserved -= 1

    def start(self, job: Job, started: WorkerStartedEvent, correlation_id: str = "") -> Generation:
        """Accept a job; the caller holds a reserved slot. One that is complete already ends without any computing.

        An attempt that is here already stays as it is. Raises Refused (409) as `check_startable` does.
        """
        if (existing := self.find(job.task_id, job.attempt)) is not None:
            if existing.is_history_of(job.sequence.sampling.seed, job.text.num_tokens):
                return existing
            self._log.warning("an undone attempt gives way", began_at=existing.first_index, **_named(existing))
            self._stop(existing, PreemptedEvent(tokens_out=existing.next_index))
            self._forget(existing)
        self.check_startable(job.task_id, job.attempt)
        lower = self._current.get(job.task_id)
        if lower is not None:
            self._stop(lower, PreemptedEvent(tokens_out=lower.next_index))
        now = self._clock()
        generation = Generation(job, started, self._token_text, now, correlation_id=correlation_id)
        self._known[generation.key] = self._current[job.task_id] = generation
        self._watcher.generation_started(generation)
        self._log.info("started", resumed=generation.first_index, **_named(generation))
        if job.text.finished is not None:
            self._finish(generation, generation.end_event(job.text.finished, None))
            return generation
        self._by_sequence[job.sequence.sequence_id] = generation
        self._active.add(generation)
        self._engine.add(job.sequence)
        return generation

    def read(self, generation: Generation, after: int) -> Reader:
        """A reader from the token after index `after`; it counts as present once it is iterated."""
        if len(generation.readers) >= MAX_READERS:
            next(iter(generation.readers)).close()
        return Reader(generation, after, self._clock)

    def cancel(self, task_id: str, attempt: int, reason: CancelReason) -> CancelReply:
        """Stop an attempt at the token boundary it stands at. An unknown one is remembered, should it still come."""
        generation = self.find(task_id, attempt)
        if generation is None:
            self._remember_over(task_id, attempt)
            return CancelReply(found=False)
        yields = reason in ("preempt", "fenced")
        self._stop(
            generation,
            PreemptedEvent(tokens_out=generation.next_index) if yields else generation.end_event("CANCELLED", None),
        )
        return CancelReply(found=True, tokens_out=generation.next_index)

    def acknowledge(self, task_id: str, attempt: int) -> bool:
        """Forget an ended attempt: its terminal event is safe elsewhere."""
        generation = self.find(task_id, attempt)
        if generation is None or generation.terminal is None:
            return False
        self._forget(generation)
        self._remember_over(task_id, attempt)
        return True

    def preempt_all(self) -> int:
        """Let everything that runs yield at its token boundary; returns how many did."""
        running = [generation for generation in self._known.values() if generation.terminal is None]
        for generation in running:
            self._stop(generation, PreemptedEvent(tokens_out=generation.next_index))
        return len(running)

    # -- state ----------------------------------------------------------------------------------------------------

    @property
    def slots_used(self) -> int:
        """Slots held by running generations and by requests in preparation."""
        return len(self._active) + self._reserved

    @property
    def slots_free(self) -> int:
        """Slots that a new request could get now."""
        return max(0, self.slots_total - self.slots_used)

    @property
    def num_running(self) -> int:
        """Generations without a terminal event."""
        return len(self._known) - len(self._done)

    @property
    def num_retained(self) -> int:
        """Ended attempts that aren't acknowledged yet."""
        return len(self._done)

    @property
    def num_readers(self) -> int:
        """Open streams."""
        return sum(len(generation.readers) for generation in self._known.values())

    def running(self) -> list[RunningAttempt]:
        """Every attempt without a terminal event, for heartbeats."""
        return [
            RunningAttempt(task_id=g.job.task_id, attempt=g.job.attempt, index=g.next_index)
            for g in self._known.values()
            if g.terminal is None
        ]

    def check_integrity(self) -> None:
        """Raises AssertionError where the books don't agree; for tests."""
        assert self._reserved >= 0
        assert self._active <= set(self._by_sequence.values())
        assert all(g.terminal is None for g in self._active)
        assert set(self._done) == {g.key for g in self._known.values() if g.terminal is not None}
        assert self._done_bytes == sum(self._known[key].size_bytes for key in self._done)
        assert {g.job.task_id for g in self._known.values()} >= set(self._current)

    # -- told by the engine ---------------------------------------------------------------------------------------

    def step(self, output: StepOutput) -> None:
        """Deliver one step's tokens and ends."""
        now = self._clock()
        touched: list[Generation] = []
        for token in output.tokens:
            generation = self._by_sequence.get(token.sequence_id)
            if generation is not None and generation.running:
                self._take(generation, token, now)
                touched.append(generation)
        self._watcher.tokens_made(output.tokens, touched)
        for end in output.ended:
            self._engine_ended(end)
        for generation in touched:
            generation.wake()
        if touched:
            self.busy_at = now

    def engine_down(self, message: str) -> None:
        """The engine process is gone: everything that wasn't complete ends with a retriable error."""
        for generation in list(self._by_sequence.values()):
            finished = generation.job.text.finished
            if finished is not None:
                self._finish(generation, generation.end_event(finished, None))
            else:
                self._finish(generation, ErrorEvent(code=ErrorCode.INTERNAL, message=message, retriable=True))
        self._by_sequence.clear()
        self._active.clear()

    # -- told by the clock ----------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Keep-alives, metrics, orphans, late ends, retention. Called a few times a second."""
        now = self._clock()
        for generation in list(self._known.values()):
            for reader in generation.readers:
                reader.tick(now, keep_alive_s=KEEP_ALIVE_S, metrics_s=METRICS_S)
            if generation.terminal is not None:
                continue
            self.busy_at = now
            if generation.finished_at is not None and now - generation.finished_at >= LATE_END_S:
                self._stop(generation, None)
            elif not generation.readers and now - generation.unread_since >= self._orphan_grace_s:
                self._log.info("nobody reads, stopped", **_named(generation))
                self._stop(generation, PreemptedEvent(tokens_out=generation.next_index))
        while self._over and now - next(iter(self._over.values()))[1] > RETENTION_S:
            self._over.popitem(last=False)
        self._evict(now)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _take(self, generation: Generation, token: TokenOut, now: float) -> None:
        try:
            generation.take(token, now)
        except Exception as error:
            self._log.error("a token can't be delivered", **_named(generation), exc_info=error)
            message = "this worker couldn't turn the model's output into text"
            self._stop(generation, ErrorEvent(code=ErrorCode.INTERNAL, message=message, retriable=True))
            return
        if generation.job.text.stop_matched is not None:
            # The engine knows no stop strings. Its SequenceEnd still brings the cached tokens and times.
            self._release_slot(generation)

    def _engine_ended(self, end: SequenceEnd) -> None:
        generation = self._by_sequence.pop(end.sequence_id, None)
        if generation is None:
            return
        self._active.discard(generation)
        finished = generation.job.text.finished or _STOP_REASONS.get(end.reason)
        if generation.terminal is None and finished is not None:
            self._finish(generation, generation.end_event(finished, end))
        elif generation.terminal is None:
            code = end.error_code or ErrorCode.INTERNAL
            message = end.error or "the engine stopped this generation without being asked to"
            self._finish(generation, ErrorEvent(code=code, message=message, retriable=code in RETRIABLE))

    def _stop(self, generation: Generation, terminal: Terminal | None) -> None:
        """End a generation now. One whose last token has come ends as it would have anyway."""
        if generation.terminal is not None:
            return
        finished = generation.job.text.finished
        if finished is not None:
            terminal = generation.end_event(finished, None)
        assert terminal is not None
        self._release_slot(generation)
        self._by_sequence.pop(generation.job.sequence.sequence_id, None)
        self._finish(generation, terminal)

    def _release_slot(self, generation: Generation) -> None:
        """The pipe keeps its order: a sequence added after this cancel meets a free slot."""
        if generation in self._active:
            self._active.discard(generation)
            self._engine.cancel(generation.job.sequence.sequence_id)

    def _finish(self, generation: Generation, terminal: Terminal) -> None:
        generation.end(terminal)
        self._active.discard(generation)
        self._done[generation.key] = self._clock()
        self._done_bytes += generation.size_bytes
        outcome = getattr(terminal, "stop_reason", None) or getattr(terminal, "code", None) or terminal.EVENT
        self._watcher.generation_ended(generation, str(outcome))
        self._log.info("ended", outcome=str(outcome), tokens=generation.next_index, **_named(generation))

    def _remember_over(self, task_id: str, attempt: int) -> None:
        known = self._over.pop(task_id, (0, 0.0))[0]
        self._over[task_id] = (max(attempt, known), self._clock())
        if len(self._over) > MAX_OVER:
            self._over.popitem(last=False)

    def _evict(self, now: float) -> None:
        while self._done:
            key, ended_at = next(iter(self._done.items()))
            over = len(self._done) > MAX_RETAINED or self._done_bytes > MAX_RETAINED_BYTES
            if not over and now - ended_at < RETENTION_S:
                return
            self._forget(self._known[key])

    def _forget(self, generation: Generation) -> None:
        del self._known[generation.key]
        if self._done.pop(generation.key, None) is not None:
            self._done_bytes -= generation.size_bytes
        if self._current.get(generation.job.task_id) is generation:
            del self._current[generation.job.task_id]


def _named(generation: Generation) -> dict[str, object]:
    named: dict[str, object] = {"task_id": generation.job.task_id, "attempt": generation.job.attempt}
    return named | {"correlation_id": generation.correlation_id} if generation.correlation_id else named
