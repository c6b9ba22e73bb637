"""Which worker takes a task. Pure. Read `place` first.

Order of wishes: hard constraints (pin, weights, dtype) → pools preferred, neutral, avoided → the session's worker →
the longest cached prefix → the least loaded, ties broken by a hash of (task, worker).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestratord.fairness import waiting_since_ms
from orchestratord.store.types import PlacementSpec, QueuedTask, WorkerView

KV_STEPS = 8
"""Heartbeats report KV blocks a moment late: eighths are as fine as that figure is worth."""


@dataclass(frozen=True)
class RoutingPolicy:
    """Knobs of placement."""

    prefix_margin: float = 0.25
    """A worker with the prefix cached wins while its load exceeds the least one by no more than this."""
    avoid_grace_ms: int = 2_000
    """How long a task waits for another worker than the one where it failed last, while there is one."""


class Fleet:
    """Workers of one model with the slots that a plan has already given away."""

    def __init__(self, workers: Iterable[WorkerView]) -> None:
        self.ready = {worker.worker_id: worker for worker in workers if worker.state == "ready"}
        self._used = {worker_id: worker.slots_used for worker_id, worker in self.ready.items()}
        self.slots_free = sum(max(0, w.slots_total - w.slots_used) for w in self.ready.values())

    def has_free_slot(self, worker_id: str) -> bool:
        """Whether `take` is allowed."""
        worker = self.ready.get(worker_id)
        return worker is not None and self._used[worker_id] < worker.slots_total

    def take(self, worker_id: str) -> None:
        """Give one slot away."""
        self._used[worker_id] += 1
        self.slots_free -= 1

    def load(self, worker_id: str) -> float:
        """Share of the scarcer of slots and KV blocks in use, 0 to 1."""
        worker = self.ready[worker_id]
        slots = self._used[worker_id] / worker.slots_total
        if not worker.kv_blocks_total:
            return slots
        kv_used = 1 - worker.kv_blocks_free / worker.kv_blocks_total
        return max(slots, int(kv_used * KV_STEPS) / KV_STEPS)


def suitable(task: QueuedTask, worker: WorkerView) -> bool:
    """Whether the worker may ever run the task: hard constraints only, whatever runs there now."""
    if worker.state != "ready" or worker.model != task.model:
        return False
    if task.required_digest is not None and task.required_digest != worker.model_digest:
        return False
    if task.required_dtype is not None and task.required_dtype != worker.dtype:
        return False
    return may_take(task.placement, worker)


def is_bound(placement: PlacementSpec) -> bool:
    """Whether there may be workers that a task so placed never runs on."""
    return placement.mode == "pin" or not placement.allow_fallback


def may_take(placement: PlacementSpec, worker: WorkerView) -> bool:
    """Whether a placement lets the task run on the worker, ever."""
    if placement.mode == "pin":
        return placement.pin_worker in (None, worker.worker_id) and placement.pin_pool in (None, worker.pool)
    if placement.allow_fallback:
        return True
    if placement.mode == "prefer" and worker.pool not in placement.prefer_pools:
        return False
    return worker.pool not in placement.avoid_pools


def place(
    task: QueuedTask,
    fleet: Fleet,
    prefix_workers: Mapping[str, Sequence[str]],
    policy: RoutingPolicy,
    now_ms: int,
) -> str | None:
    """The worker that should take the task now, None when it must wait."""
    allowed = [worker for worker in fleet.ready.values() if suitable(task, worker)]
    allowed = _without_avoided(task, allowed, policy, now_ms)
    open_now = [worker for worker in allowed if fleet.has_free_slot(worker.worker_id)]
    if not open_now:
        return None
    candidates = {worker.worker_id: fleet.load(worker.worker_id) for worker in _best_pools(task, open_now)}
    if task.session_worker in candidates and candidates[task.session_worker] < 1.0:
        return task.session_worker
    return _with_prefix(task, candidates, prefix_workers, policy) or min(
        candidates, key=lambda worker_id: (candidates[worker_id], _tie_break(task.task_id, worker_id))
    )


def _without_avoided(
    task: QueuedTask, allowed: list[WorkerView], policy: RoutingPolicy, now_ms: int
) -> list[WorkerView]:
    """Leave out the worker where the last attempt failed, unless it is the only one, new since, or waited out."""
    since = waiting_since_ms(task)
    others = [worker for worker in allowed if worker.worker_id != task.avoid_worker or worker.registered_at_ms > since]
    return others if others and now_ms - since < policy.avoid_grace_ms else allowed


def _best_pools(task: QueuedTask, workers: list[WorkerView]) -> list[WorkerView]:
    placement = task.placement
    if placement.mode == "pin":
        return workers
    tiers: tuple[list[WorkerView], ...] = ([], [], [])
    for worker in workers:
        if worker.pool in placement.avoid_pools:
            tiers[2].append(worker)
        elif placement.mode == "prefer" and worker.pool not in placement.prefer_pools:
            tiers[1].append(worker)
        else:
            tiers[0].append(worker)
    return next(tier for tier in tiers if tier)


def _with_prefix(
    task: QueuedTask,
    candidates: Mapping[str, float],
    prefix_workers: Mapping[str, Sequence[str]],
    policy: RoutingPolicy,
) -> str | None:
    limit = min(candidates.values()) + policy.prefix_margin
    for prefix in reversed(task.prefix_hashes):  # the longest first
        for worker_id in prefix_workers.get(prefix, ()):
            if candidates.get(worker_id, 2.0) <= limit:
                return worker_id
    return None


def _tie_break(task_id: str, worker_id: str) -> bytes:
    return hashlib.blake2b(f"{task_id}\0{worker_id}".encode(), digest_size=8).digest()
