"""One model's queue and workers in simulated time, scheduled by the real planner and its real memory. Read `House.run`.

Nothing here depends on the machine: the same arrivals give the same waits. What it leaves out – Redis, sockets, other
processes – stands in it as two latencies.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from orchestratord.plan_history import PlanHistory
from orchestratord.planner import PlanPolicy, plan
from orchestratord.store.types import QueuedTask, RunningTask, Snapshot
from tests.unit.orchestratord.makers import queued, running, worker


@dataclass(frozen=True)
class Shape:
    """Of the house and its load. Times in ms."""

    workers: int = 2
    slots: int = 4
    token_ms: float = 20.0
    prefill_ms: float = 30.0
    dispatch_ms: float = 8.0
    """From an event to the claims that follow from it."""
    yield_ms: float = 25.0
    """From the order to yield to the free slot, besides the wait for the token's end."""
    interactive_tokens: int = 30
    batch_tokens: int = 120
    per_s: float = 10.0
    """Interactive arrivals (Poisson)."""
    batch_outstanding: int = 0
    seconds: float = 60.0
    seed: int = 1


@dataclass
class Job:
    """A task."""

    task_id: str
    sequence: int
    priority: str
    tokens: int
    arrived_ms: float
    waiting_since_ms: float
    done: int = 0
    attempt: int = 0


@dataclass
class Attempt:
    """A task in a slot."""

    job: Job
    worker_id: str
    claimed_ms: float
    begun_with: int
    live: bool = True


@dataclass
class Result:
    """What came of it."""

    waits_ms: list[float] = field(default_factory=list)
    """Of each interactive task, until its start."""
    batch_tokens: int = 0
    yields: int = 0
    batch_done: int = 0


class House:
    """A run."""

    def __init__(self, shape: Shape, policy: PlanPolicy) -> None:
        self._shape, self._policy = shape, policy
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count(1)
        self._now = 0.0
        self._waiting: dict[str, Job] = {}
        self._running: dict[str, Attempt] = {}
        self._history = PlanHistory()
        self._rng = random.Random(shape.seed)
        self._planned = False
        self.result = Result()

    def run(self) -> Result:
        """Arrivals for so many seconds, then until nothing interactive is left."""
        shape = self._shape
        for _ in range(shape.batch_outstanding):
            self._admit("batch", shape.batch_tokens)
        at = 1_000.0
        while (at := at + self._rng.expovariate(shape.per_s) * 1000) < 1_000 + shape.seconds * 1000:
            self._at(at, lambda: self._admit("interactive", shape.interactive_tokens))
        end = at
        while self._events and (self._now < end or self._is_interactive_left()):
            self._now, _, event = heapq.heappop(self._events)
            event()
        return self.result

    def _is_interactive_left(self) -> bool:
        return any(job.priority == "interactive" for job in self._waiting.values())

    def _at(self, when_ms: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_ms, next(self._ids), event))

    def _admit(self, priority: str, tokens: int) -> None:
        number = next(self._ids)
        job = Job(f"t{number}", number, priority, tokens, self._now, self._now)
        self._waiting[job.task_id] = job
        self._wake()

    def _wake(self) -> None:
        if not self._planned:
            self._planned = True
            self._at(self._now + self._shape.dispatch_ms, self._plan)

    def _plan(self) -> None:
        self._planned = False
        view = self._snapshot()
        decided = plan(view, self._policy, self._history.memory(view, self._now / 1000, None))
        for assignment in decided.assignments:
            self._start(self._waiting.pop(assignment.task_id), assignment.worker_id)
        if decided.assignments:
            self._wake()
        for task in decided.preemptions:
            self._history.asked(task, self._now / 1000)
            attempt = self._running[task.task_id]
            boundary = self._rng.uniform(0, self._shape.token_ms)
            self._at(self._now + self._shape.yield_ms + boundary, lambda attempt=attempt: self._yielded(attempt))

    def _start(self, job: Job, worker_id: str) -> None:
        if job.attempt == 0 and job.priority == "interactive":
            self.result.waits_ms.append(self._now - job.arrived_ms)
        job.attempt += 1
        attempt = Attempt(job, worker_id, self._now, job.done)
        self._running[job.task_id] = attempt
        left = job.tokens - job.done
        self._at(self._now + self._shape.prefill_ms + left * self._shape.token_ms, lambda: self._ended(attempt))

    def _progress(self, attempt: Attempt) -> int:
        generated = int((self._now - attempt.claimed_ms - self._shape.prefill_ms) / self._shape.token_ms)
        return min(attempt.job.tokens, attempt.begun_with + max(0, generated))

    def _leave(self, attempt: Attempt) -> None:
        attempt.live = False
        del self._running[attempt.job.task_id]
        if attempt.job.priority == "batch":
            self.result.batch_tokens += self._progress(attempt) - attempt.begun_with
        attempt.job.done = self._progress(attempt)
        self._wake()

    def _ended(self, attempt: Attempt) -> None:
        if not attempt.live:
            return
        self._leave(attempt)
        if attempt.job.priority == "batch":
            self.result.batch_done += 1
            self._admit("batch", self._shape.batch_tokens)

    def _yielded(self, attempt: Attempt) -> None:
        if attempt.live:
            self._leave(attempt)
            attempt.job.waiting_since_ms = self._now
            self._waiting[attempt.job.task_id] = attempt.job
            self.result.yields += 1

    def _snapshot(self) -> Snapshot:
        used = {f"w{n}": 0 for n in range(self._shape.workers)}
        for attempt in self._running.values():
            used[attempt.worker_id] += 1
        return Snapshot(
            model="m",
            version=1,
            now_ms=int(self._now),
            waiting=tuple(self._queued(job) for job in self._heads()),
            running=tuple(self._in_flight(attempt) for attempt in self._running.values()),
            workers=tuple(
                worker(name, slots_total=self._shape.slots, slots_used=count) for name, count in used.items()
            ),
            virtual_times={},
            prefix_workers={},
        )

    def _heads(self) -> list[Job]:
        """The first 16 of each class, as the store gives them."""
        jobs = sorted(self._waiting.values(), key=lambda job: job.sequence)
        return [job for name in ("interactive", "batch") for job in [j for j in jobs if j.priority == name][:16]]

    def _queued(self, job: Job) -> QueuedTask:
        return queued(
            job.task_id, job.sequence, priority=job.priority, tenant=job.priority, created_at_ms=int(job.arrived_ms),
            waiting_since_ms=int(job.waiting_since_ms), attempt=job.attempt, tokens_kept=job.done,
        )  # fmt: skip

    def _in_flight(self, attempt: Attempt) -> RunningTask:
        return running(
            attempt.job.task_id, attempt.worker_id, priority=attempt.job.priority, tenant=attempt.job.priority,
            attempt=attempt.job.attempt, claimed_at_ms=int(attempt.claimed_ms), tokens_logged=self._progress(attempt),
            created_at_ms=int(attempt.job.arrived_ms),
        )  # fmt: skip
