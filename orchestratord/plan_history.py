"""What a dispatcher remembers between its plans. Pure: times are given, in seconds of any steady clock. Bounded.

Read `PlanHistory.memory`; `orchestratord.planner` says what each part of it is for.
"""

from __future__ import annotations

import math

from orchestratord.planner import PlanMemory, interactive_running
from orchestratord.store.types import RunningTask, Snapshot

PENDING_S = 2.0
"""How long an attempt that was asked to yield counts as about to: then the asking may have got lost."""
FORGET_S = 10.0
MAX_REMEMBERED = 10_000


class PlanHistory:
    """Who was asked to yield, how often in vain, and how much interactive work there was lately."""

    def __init__(self) -> None:
        self._pending: dict[tuple[str, int], float] = {}
        self._idle_preemptions: dict[str, tuple[int, int]] = {}
        """task → (preemptions in a row without a token between them, tokens then)"""
        self._interactive: dict[str, tuple[float, float]] = {}
        """model → (level, when)"""

    def memory(self, snapshot: Snapshot, now_s: float, mean_tokens_out: float | None) -> PlanMemory:
        """For the plan of this snapshot."""
        self._pending = {key: until for key, until in self._pending.items() if until > now_s}
        return PlanMemory(
            mean_tokens_out=mean_tokens_out,
            pending=self._pending.keys(),
            idle_preemptions=self._idle_of(snapshot),
            interactive_lately=self._lately(snapshot, now_s),
        )

    def asked(self, task: RunningTask, now_s: float) -> None:
        """An attempt is asked to yield."""
        self._pending[task.task_id, task.attempt] = now_s + PENDING_S
        times, tokens_then = self._idle_preemptions.pop(task.task_id, (0, -1))
        times = times + 1 if task.tokens_logged == tokens_then else 1
        self._idle_preemptions[task.task_id] = (times, task.tokens_logged)
        while len(self._idle_preemptions) > MAX_REMEMBERED:
            del self._idle_preemptions[next(iter(self._idle_preemptions))]

    def _lately(self, snapshot: Snapshot, now_s: float) -> float:
        """The number of interactive attempts, falling off over seconds from its latest peak."""
        level, then = self._interactive.get(snapshot.model, (0.0, now_s))
        level = max(float(interactive_running(snapshot)), level * math.exp((then - now_s) / FORGET_S))
        if len(self._interactive) >= MAX_REMEMBERED:
            self._interactive.clear()
        self._interactive[snapshot.model] = (level, now_s)
        return level

    def _idle_of(self, snapshot: Snapshot) -> dict[str, int]:
        """Preemptions in a row of running tasks that have generated nothing since."""
        idle: dict[str, int] = {}
        for task in snapshot.running:
            times, tokens_then = self._idle_preemptions.get(task.task_id, (0, -1))
            if tokens_then == task.tokens_logged:
                idle[task.task_id] = times
        return idle
