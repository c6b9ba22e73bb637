"""Values for the pure parts' tests, with plausible defaults."""

from __future__ import annotations

from typing import Any

from orchestratord.store.types import PlacementSpec, QueuedTask, RunningTask, Snapshot, WorkerView

NOW = 1_000_000


def queued(task_id: str, sequence: int = 1, **changes: Any) -> QueuedTask:
    """A waiting interactive task, just admitted."""
    fields: dict[str, Any] = {
        "task_id": task_id, "model": "m", "priority": "interactive", "tenant": "a", "weight": 1.0,
        "sequence": sequence, "created_at_ms": NOW, "prompt_tokens_estimate": 10, "max_tokens": 100, "attempt": 0,
        "tokens_kept": 0, "required_digest": None, "required_dtype": None, "session_worker": None,
        "placement": PlacementSpec(), "avoid_worker": None, "prefix_hashes": (), "deadline_at_ms": None,
    }  # fmt: skip
    return QueuedTask(**(fields | changes))


def worker(worker_id: str, **changes: Any) -> WorkerView:
    """A ready worker with four free slots."""
    fields: dict[str, Any] = {
        "worker_id": worker_id, "instance_id": "i", "url": "http://w", "pool": "local", "model": "m",
        "model_digest": "d", "dtype": "float32", "device": "cpu", "determinism": "exact", "context_length": 2048,
        "slots_total": 4, "slots_used": 0, "kv_blocks_total": 0, "kv_blocks_free": 0, "tokens_per_second": 0.0,
        "state": "ready", "drain_deadline_at_ms": None, "lease_expires_at_ms": NOW + 4000, "registered_at_ms": 0,
        "version": "", "attention": "", "vram_total_bytes": 0, "vram_used_bytes": 0,
    }  # fmt: skip
    return WorkerView(**(fields | changes))


def running(task_id: str, worker_id: str = "w1", **changes: Any) -> RunningTask:
    """A batch attempt that has run for ten seconds."""
    fields: dict[str, Any] = {
        "task_id": task_id, "tenant": "a", "model": "m", "priority": "batch", "attempt": 1, "worker_id": worker_id,
        "worker_url": "http://w", "instance_id": "i", "owner": "r", "seed": 1, "claimed_at_ms": NOW - 10_000,
        "created_at_ms": NOW - 20_000, "deadline_at_ms": None, "on_disconnect": "continue", "tokens_logged": 5,
        "correlation_id": "",
    }  # fmt: skip
    return RunningTask(**(fields | changes))


def snapshot(
    waiting: list[QueuedTask] | None = None,
    workers: list[WorkerView] | None = None,
    busy: list[RunningTask] | None = None,
    **changes: Any,
) -> Snapshot:
    """One model at the instant NOW."""
    fields: dict[str, Any] = {
        "model": "m", "version": 1, "now_ms": NOW, "waiting": tuple(waiting or ()), "running": tuple(busy or ()),
        "workers": tuple([worker("w1")] if workers is None else workers), "virtual_times": {}, "prefix_workers": {},
    }  # fmt: skip
    return Snapshot(**(fields | changes))
