"""The scheduling decision: one model's queue and workers in, assignments and preemptions out. Pure; read `plan`.

`store.claim` carries the assignments out, and only if nothing has changed since the snapshot.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from llorch_wire.tasks import Priority
from orchestratord.fairness import ServiceOrder, charge, promoted
from orchestratord.routing import Fleet, RoutingPolicy, place, suitable
from orchestratord.store.types import Assignment, QueuedTask, RunningTask, Snapshot


@dataclass(frozen=True)
class PlanPolicy:
    """Knobs of a plan."""

    routing: RoutingPolicy = field(default_factory=RoutingPolicy)
    age_limit_ms: int = 30_000
    slots_per_aged: int = 8
    default_tokens_out: float = 256.0
    preempt: bool = True
    min_run_ms: int = 100
    """Before that a batch attempt isn't asked to yield: mostly it would have generated nothing. Not longer, because
    interactive work that meets young attempts only waits for them to grow up."""
    min_aged_run_ms: int = 2_000
    """The same for one that had to wait for `age_limit_ms`: ageing must bring it on."""
    band: int = 1
    """By how much fewer slots than batch leaves free may be free before batch yields without anything waiting: in
    between, it neither starts nor yields."""
    max_preemptions_per_plan: int = 8
    max_idle_preemptions: int = 3
    """How often in a row a task may be preempted without having generated a token in between."""


@dataclass(frozen=True)
class PlanMemory:
    """What the caller remembers from earlier plans."""

    mean_tokens_out: float | None = None
    pending: Collection[tuple[str, int]] = ()
    """(task_id, attempt) asked to yield, whose slots are about to be free."""
    idle_preemptions: Mapping[str, int] = field(default_factory=dict[str, int])
    interactive_lately: float = 0.0
    """About how many interactive attempts ran side by side in the last seconds."""


@dataclass(frozen=True)
class Plan:
    """What to do now."""

    assignments: tuple[Assignment, ...] = ()
    preemptions: tuple[RunningTask, ...] = ()


def plan(snapshot: Snapshot, policy: PlanPolicy, memory: PlanMemory | None = None) -> Plan:
    """Serve the waiting in their order while slots last; where interactive work stays waiting, let batch yield."""
    memory = memory or PlanMemory()
    fleet = Fleet(snapshot.workers)
    aged = promoted(snapshot, age_limit_ms=policy.age_limit_ms, slots_per_aged=policy.slots_per_aged)
    order = ServiceOrder(snapshot, aged)
    tokens_out = memory.mean_tokens_out or policy.default_tokens_out
    assignments: list[Assignment] = []
    unplaced: list[QueuedTask] = []
    spare = _headroom(snapshot, fleet, memory.interactive_lately)
    for task in order:
        if fleet.slots_free <= spare and task.priority == "batch" and task.task_id not in aged:
            break  # only batch comes after this, and it never makes others yield
        worker_id = None
        if fleet.slots_free:
            worker_id = place(task, fleet, snapshot.prefix_workers, policy.routing, snapshot.now_ms)
        if worker_id is not None:
            tokens = charge(task, tokens_out)
            fleet.take(worker_id)
            order.serve(task, tokens)
            assignments.append(Assignment(task_id=task.task_id, worker_id=worker_id, charge=tokens))
        elif task.priority == "interactive":
            unplaced.append(task)
    if not policy.preempt:
        return Plan(tuple(assignments))
    preemptions = _preemptions(unplaced, snapshot, fleet, policy, memory)
    if not preemptions and not unplaced:
        preemptions = _make_room(spare - policy.band - fleet.slots_free, snapshot, fleet, policy, memory)
    return Plan(tuple(assignments), preemptions)


def _make_room(
    wanted: int, snapshot: Snapshot, fleet: Fleet, policy: PlanPolicy, memory: PlanMemory
) -> tuple[RunningTask, ...]:
    """Batch attempts that yield before anything waits, so that the next interactive task needn't wait for one to."""
    pending = set(memory.pending)
    wanted -= sum((task.task_id, task.attempt) in pending for task in snapshot.running)
    if wanted <= 0:
        return ()
    victims = [
        task
        for task in snapshot.running
        if task.worker_id in fleet.ready and _may_yield(task, snapshot.now_ms, pending, policy, memory)
    ]
    victims.sort(key=_cheapest)
    return tuple(victims[: min(wanted, policy.max_preemptions_per_plan)])


def _cheapest(task: RunningTask) -> tuple[int, int, str]:
    """The least advanced first."""
    return task.tokens_logged, -task.claimed_at_ms, task.task_id


def free_for(priority: Priority, snapshot: Snapshot, *, preempt: bool = True) -> int:
    """Slots that tasks of a class can have at once or nearly so: interactive ones also those where batch will yield,
    batch only those beyond what it leaves free."""
    fleet = Fleet(snapshot.workers)
    if priority == "batch":
        return max(0, fleet.slots_free - _headroom(snapshot, fleet, 0.0))
    held = sum(1 for task in snapshot.running if task.priority == "batch" and task.worker_id in fleet.ready)
    return fleet.slots_free + (held if preempt else 0)


def interactive_running(snapshot: Snapshot) -> int:
    """Interactive attempts in flight."""
    return sum(1 for task in snapshot.running if task.priority == "interactive")


def _headroom(snapshot: Snapshot, fleet: Fleet, lately: float) -> int:
    """Slots that batch leaves free while interactive work comes and goes, so that it needn't wait for one to yield.

    About what its number varies by (square-root staffing: Halfin and Whitt, Operations Research 1981), and never more
    than a quarter of the slots.
    """
    busy = max(lately, interactive_running(snapshot))
    slots = sum(worker.slots_total for worker in fleet.ready.values())
    return min(math.ceil(math.sqrt(busy) - 0.5), slots // 4)


def _preemptions(
    unplaced: list[QueuedTask], snapshot: Snapshot, fleet: Fleet, policy: PlanPolicy, memory: PlanMemory
) -> tuple[RunningTask, ...]:
    """Batch attempts that should yield, one for each waiting task, the least advanced first."""
    if not unplaced:
        return ()
    pending = set(memory.pending)
    soon_free = Counter(task.worker_id for task in snapshot.running if (task.task_id, task.attempt) in pending)
    victims = [task for task in snapshot.running if _may_yield(task, snapshot.now_ms, pending, policy, memory)]
    victims.sort(key=_cheapest)
    chosen: list[RunningTask] = []
    for task in unplaced[: 8 * policy.max_preemptions_per_plan]:
        if len(chosen) >= policy.max_preemptions_per_plan:
            break
        workers = {worker_id for worker_id, worker in fleet.ready.items() if suitable(task, worker)}
        coming = next((worker_id for worker_id in sorted(workers) if soon_free[worker_id] > 0), None)
        if coming is not None:
            soon_free[coming] -= 1
            continue
        if any(fleet.has_free_slot(worker_id) for worker_id in workers):
            continue  # it waits by choice (the worker that failed it), not for a slot
        victim = next((running for running in victims if running.worker_id in workers), None)
        if victim is not None:
            victims.remove(victim)
            chosen.append(victim)
    return tuple(chosen)


def _may_yield(
    task: RunningTask, now_ms: int, pending: set[tuple[str, int]], policy: PlanPolicy, memory: PlanMemory
) -> bool:
    waited_ms = task.claimed_at_ms - (task.waiting_since_ms or task.claimed_at_ms)
    least_ms = policy.min_run_ms if waited_ms <= policy.age_limit_ms else policy.min_aged_run_ms
    return (
        task.priority == "batch"
        and (task.task_id, task.attempt) not in pending
        and now_ms - task.claimed_at_ms >= least_ms
        and memory.idle_preemptions.get(task.task_id, 0) < policy.max_idle_preemptions
    )
