"""Who is served next. Pure. Read `ServiceOrder` first.

Classes: interactive before batch; a few batch tasks that waited too long count as interactive (ageing). Between tenants
of a class the one with the least virtual time goes first (weighted tokens served: the Virtual Token Counter of
"Fairness in Serving Large Language Models", OSDI 2024); within a tenant the order of admission holds.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable

from orchestratord.store.types import QueuedTask, RunningTask, Snapshot


def charge(task: QueuedTask, mean_tokens_out: float) -> float:
    """Tokens that serving this task is expected to cost its tenant. What it has already generated was charged then."""
    remaining = max(1.0, min(float(task.max_tokens), max(mean_tokens_out, 1.0)) - task.tokens_kept)
    prompt = task.prompt_tokens_estimate if task.attempt == 0 else 0
    return prompt + remaining


def waiting_since_ms(task: QueuedTask) -> int:
    """When this wait began."""
    return task.waiting_since_ms or task.created_at_ms


def promoted(snapshot: Snapshot, *, age_limit_ms: int, slots_per_aged: int) -> frozenset[str]:
    """Batch tasks that count as interactive now, by id.

    Ageing keeps batch from starving without giving the house away: it applies only while fewer batch tasks than
    1/`slots_per_aged` of the slots (at least one) run or ran within the age limit. So a preempted batch task doesn't
    take back at once the slot that it yielded, and a long batch backlog doesn't become an interactive one.
    """
    now = snapshot.now_ms
    slots = sum(worker.slots_total for worker in snapshot.workers if worker.state == "ready")
    quota = max(1, slots // slots_per_aged) - _lately_served(snapshot.running, snapshot.waiting, now - age_limit_ms)
    if quota <= 0:
        return frozenset()
    aged = [t for t in snapshot.waiting if t.priority == "batch" and now - waiting_since_ms(t) > age_limit_ms]
    return frozenset(task.task_id for task in sorted(aged, key=lambda task: task.sequence)[:quota])


def _lately_served(running: Iterable[RunningTask], waiting: Iterable[QueuedTask], since_ms: int) -> int:
    served = sum(1 for task in running if task.priority == "batch")
    return served + sum(
        1 for task in waiting if task.priority == "batch" and task.attempt > 0 and waiting_since_ms(task) >= since_ms
    )


class ServiceOrder:
    """Iterates over waiting tasks in the order in which they should be served, given what was served meanwhile.

    After each task call `serve(task, tokens)` if it got a slot: its tenant's virtual time moves on at once, so that one
    plan over many slots is as fair as many plans over one. A task that got none is simply passed over.
    """

    def __init__(self, snapshot: Snapshot, aged: frozenset[str]) -> None:
        known = snapshot.virtual_times
        floor = min((known[t.tenant] for t in snapshot.waiting if t.tenant in known), default=0.0)
        self._virtual_times = {t.tenant: known.get(t.tenant, floor) for t in snapshot.waiting}
        classes: tuple[dict[str, deque[QueuedTask]], ...] = (defaultdict(deque), defaultdict(deque))
        for task in sorted(snapshot.waiting, key=lambda task: task.sequence):
            first = task.priority == "interactive" or task.task_id in aged
            classes[0 if first else 1][task.tenant].append(task)
        self._classes = classes

    def __iter__(self) -> OrderIterator:
        return OrderIterator(self._classes, self._virtual_times)

    def serve(self, task: QueuedTask, tokens: float) -> None:
        """The task got a slot for an expected `tokens`."""
        self._virtual_times[task.tenant] += tokens / max(task.weight, 1e-9)


class OrderIterator:
    """One pass over a ServiceOrder. Heap entries are (virtual time, sequence of the head, tenant)."""

    def __init__(self, classes: tuple[dict[str, deque[QueuedTask]], ...], virtual_times: dict[str, float]) -> None:
        self._classes = [{tenant: deque(tasks) for tenant, tasks in queues.items()} for queues in classes]
        self._virtual_times = virtual_times
        self._heap: list[tuple[float, int, str]] = []
        self._current: dict[str, deque[QueuedTask]] = {}
        self._last: str | None = None

    def __iter__(self) -> OrderIterator:
        return self

    def __next__(self) -> QueuedTask:
        self._push(self._last)
        while not self._heap:
            if not self._classes:
                raise StopIteration
            self._current = self._classes.pop(0)
            for tenant in self._current:
                self._push(tenant)
        self._last = heapq.heappop(self._heap)[2]
        return self._current[self._last].popleft()

    def _push(self, tenant: str | None) -> None:
        """Back into the heap with the tenant's virtual time as it is now; one entry a tenant, so none is stale."""
        if tenant is not None and self._current.get(tenant):
            entry = (self._virtual_times[tenant], self._current[tenant][0].sequence, tenant)
            heapq.heappush(self._heap, entry)
