"""Tasks, workers and short ways through the store, for tests. Times are injected: `T` is the beginning."""

from __future__ import annotations

from typing import Any

from llorch_wire.events import EndEvent, ErrorEvent, TokenEvent
from llorch_wire.worker import Heartbeat, RunningAttempt, WorkerRegistration
from orchestratord.store.store import Store
from orchestratord.store.types import (
    Admitted,
    Assignment,
    Claimed,
    NewTask,
    QueueLimits,
    RunningTask,
    TokenBatch,
)

T = 1_800_000_000_000
LEASE_MS = 4000
LIMITS = QueueLimits()
MODEL = "demo/tiny model"
LONG_MS = 3_600_000
"""As `healthy_ms`: Redis has been reachable for long enough to judge any lease."""


def new_task(name: str, **changes: Any) -> NewTask:
    values: dict[str, Any] = {
        "task_id": name,
        "tenant": "acme",
        "model": MODEL,
        "priority": "interactive",
        "payload": b'{"prompt":"once"}',
        "seed": -(2**63) + 1,
        "max_tokens": 64,
        "prompt_tokens_estimate": 10,
        "body_hash": f"hash of {name}",
    }
    return NewTask(**(values | changes))


def registration(worker_id: str = "w1", instance_id: str = "i1", **changes: Any) -> WorkerRegistration:
    values: dict[str, Any] = {
        "worker_id": worker_id,
        "instance_id": instance_id,
        "model": MODEL,
        "model_digest": "digest-a",
        "dtype": "float32",
        "device": "cpu",
        "context_length": 2048,
        "slots_total": 2,
    }
    return WorkerRegistration(**({"url": "http://127.0.0.1:9001"} | values | changes))


def heartbeat(instance_id: str = "i1", running: tuple[tuple[str, int], ...] = (), **changes: Any) -> Heartbeat:
    attempts = [RunningAttempt(task_id=task_id, attempt=attempt, index=0) for task_id, attempt in running]
    return Heartbeat(instance_id=instance_id, running=attempts, **changes)


async def worker(store: Store, worker_id: str = "w1", *, now_ms: int = T, **changes: Any) -> None:
    await store.register_worker(registration(worker_id, **changes), LEASE_MS, now_ms=now_ms)


async def admit(store: Store, name: str, *, now_ms: int = T, **changes: Any) -> Admitted:
    outcome = await store.admit(new_task(name, **changes), LIMITS, now_ms=now_ms)
    assert isinstance(outcome, Admitted), outcome
    return outcome


async def try_claim(
    store: Store, name: str, worker_id: str = "w1", *, replica: str = "r1", charge: float = 10, now_ms: int = T
) -> list[Claimed]:
    snapshot = await store.snapshot(MODEL, now_ms=now_ms)
    pair = Assignment(task_id=name, worker_id=worker_id, charge=charge)
    return await store.claim(replica, MODEL, snapshot.version, [pair], now_ms=now_ms)


async def claim(store: Store, name: str, worker_id: str = "w1", **options: Any) -> RunningTask:
    (claimed,) = await try_claim(store, name, worker_id, **options)
    return claimed.task


async def running(store: Store, name: str, worker_id: str = "w1", **changes: Any) -> RunningTask:
    """A task admitted and claimed."""
    await admit(store, name, **changes)
    return await claim(store, name, worker_id)


def tokens(first: int, count: int) -> tuple[TokenEvent, ...]:
    """What any honest worker generates at these indices."""
    return tuple(TokenEvent(t=f"t{index} ", i=index, id=1000 + index) for index in range(first, first + count))


def batch(name: str, attempt: int, first: int, count: int) -> TokenBatch:
    return TokenBatch(task_id=name, attempt=attempt, tokens=tokens(first, count))


def end(tokens_out: int = 0, **changes: Any) -> EndEvent:
    return EndEvent(**({"stop_reason": "EOS", "tokens_in": 12, "tokens_out": tokens_out} | changes))


def error(code: str = "INTERNAL", message: str = "broken") -> ErrorEvent:
    return ErrorEvent(code=code, message=message)


async def positions(store: Store, name: str) -> list[tuple[str, str]]:
    return [(entry.position, entry.kind) for entry in await store.read_log(name)]
