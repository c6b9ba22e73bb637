"""Do pools, orchestratord and the processes tell the same story? Pure: values in, discrepancies out.

on the pool          at orchestratord      finding
process, entry       unknown               it does not register           -> look at its log, stop it
process, entry       another URL, digest   two workers under one name     -> stop one
dead entry           ready, draining       it will notice by itself       -> forget it now, clean up
nothing              anything              left over                      -> forget it
process, no entry    -                     stray                          -> clean up

A worker that a `llorch up` runs may be another orchestratord's, and is started again when it dies: being unknown or
dead is no finding then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llorch_wire.pool import PoolStatus, WorkerInfo

RUNNING = frozenset({"ready", "draining", "starting", "stopping", "unresponsive", "failed"})
SETTLING_MS = 15_000
"""A worker that young may not have registered yet."""


@dataclass(frozen=True)
class Repair:
    """What `--fix` would do: clean up a pool, restore its workers, or have orchestratord forget a worker."""

    action: Literal["cleanup", "restore", "forget"]
    target: str


@dataclass(frozen=True)
class Discrepancy:
    """One disagreement. `repair` is None where a person has to decide; `command` is what to type."""

    level: Literal["warning", "error"]
    pool: str
    subject: str
    text: str
    command: str
    repair: Repair | None = None


def compare(
    statuses: Mapping[str, PoolStatus], known: Sequence[Mapping[str, Any]] | None, now_ms: int
) -> list[Discrepancy]:
    """Every disagreement. `statuses`: the pools that answered; `known`: orchestratord's workers, None if it is away."""
    found: list[Discrepancy] = []
    by_id = {str(row.get("worker_id")): row for row in known or []}
    seen: dict[str, str] = {}
    for name, status in statuses.items():
        found += _local(name, status)
        for worker in status.workers:
            if worker.worker_id in seen and worker.state in RUNNING:
                found.append(_twice(name, seen[worker.worker_id], worker))
            if worker.state in RUNNING:
                seen[worker.worker_id] = name
            if known is not None:
                found += _against(name, worker, by_id.get(worker.worker_id), now_ms)
    here = {worker.worker_id for status in statuses.values() for worker in status.workers}
    for worker_id, row in by_id.items():
        if worker_id not in here:
            found += _left_over(worker_id, row, statuses)
    return found


def _local(name: str, status: PoolStatus) -> list[Discrepancy]:
    """What a pool's registry and its processes disagree about."""
    found: list[Discrepancy] = []
    clean = f"llorch worker cleanup -p {name}"
    for worker in status.workers:
        if worker.supervisor_pid and worker.state not in RUNNING:
            continue
        if worker.state in ("exited", "pid-reused") or (worker.state == "rebooted" and not worker.on_boot):
            text = f"on record, but it does not run: {worker.detail}"
            found.append(Discrepancy("warning", name, worker.worker_id, text, clean, Repair("cleanup", name)))
        elif worker.state == "rebooted":
            text = "did not come back after the reboot"
            command = f"llorch worker restore -p {name}"
            found.append(Discrepancy("error", name, worker.worker_id, text, command, Repair("restore", name)))
        elif worker.state in ("unresponsive", "failed"):
            command = f"llorch worker logs -p {name} {worker.worker_id}"
            found.append(Discrepancy("error", name, worker.worker_id, f"{worker.state}: {worker.detail}", command))
    for stray in status.strays:
        text = f"process {stray.pid} runs, but its worker is not on record: {stray.command}"
        found.append(Discrepancy("error", name, stray.worker_id, text, clean, Repair("cleanup", name)))
    return found


def _twice(name: str, other: str, worker: WorkerInfo) -> Discrepancy:
    text = f"runs on {other} and on {name} under one name: orchestratord sees only one of them"
    return Discrepancy("error", name, worker.worker_id, text, _stop(name, worker))


def _stop(name: str, worker: WorkerInfo) -> str:
    if worker.supervisor_pid:
        return f"on {name}, stop `{worker.supervisor}`: kill {worker.supervisor_pid}"
    return f"llorch worker stop -p {name} {worker.worker_id}"


def _against(name: str, worker: WorkerInfo, row: Mapping[str, Any] | None, now_ms: int) -> list[Discrepancy]:
    """One worker of a pool against what orchestratord has under its name."""
    if worker.state not in RUNNING:
        if row is not None and row.get("state") in ("ready", "draining") and not worker.supervisor_pid:
            text = f"orchestratord has it as {row.get('state')}, but its process is gone"
            command = f"llorch doctor --fix    (forgets {worker.worker_id})"
            return [Discrepancy("error", name, worker.worker_id, text, command, Repair("forget", worker.worker_id))]
        return []
    if not worker.orchestrator or worker.state not in ("ready", "draining"):
        return []
    logs = f"llorch worker logs -p {name} {worker.worker_id}"
    if row is None:
        if worker.supervisor_pid or now_ms - worker.started_at_ms < SETTLING_MS:
            return []
        text = f"it runs, but this orchestratord does not know it (it registers at {worker.orchestrator})"
        return [Discrepancy("error", name, worker.worker_id, text, logs)]
    found: list[Discrepancy] = []
    if row.get("state") == "lost":
        text = f"it runs, but orchestratord has lost it: can it reach {worker.url}?"
        found.append(Discrepancy("error", name, worker.worker_id, text, logs))
    for key, mine in (("url", worker.url), ("model_digest", worker.model_digest)):
        if mine and row.get(key) and row[key] != mine:
            text = f"its {key} is {mine} here and {row[key]} at orchestratord: two workers under one name"
            found.append(Discrepancy("error", name, worker.worker_id, text, _stop(name, worker)))
    return found


def _left_over(worker_id: str, row: Mapping[str, Any], statuses: Mapping[str, PoolStatus]) -> list[Discrepancy]:
    """A worker that orchestratord knows and no pool that was asked has."""
    pool = str(row.get("pool", ""))
    if pool not in statuses:
        # A pool that can't be asked now, or isn't known here (`llorch up`, another operator): nothing can be said.
        return []
    state = row.get("state")
    text = f"orchestratord has it as {state}, but pool {pool} has no such worker"
    command = f"llorch doctor --fix    (forgets {worker_id})"
    level = "warning" if state == "lost" else "error"
    return [Discrepancy(level, pool, worker_id, text, command, Repair("forget", worker_id))]
