"""Finished tasks by the thousand, through the store's own transitions. Read `seed_finished`."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Sequence

from llorch_wire.events import EndEvent, TokenEvent
from llorch_wire.worker import WorkerRegistration
from orchestratord.store.store import Store
from orchestratord.store.types import Admitted, Assignment, NewTask, QueueLimits, TokenBatch

MODEL = "seeded"
WORKER = "seeder"
ROUND = 256
TOKENS = 20
NO_LIMITS = QueueLimits(per_model=10**9, per_tenant=10**9, total=10**9)


async def seed_finished(store: Store, count: int, *, tenants: Sequence[str] = ("default", "other")) -> list[str]:
    """So many tasks that were admitted, claimed, served with TOKENS tokens each, and completed. Their ids, in order."""
    await store.register_worker(_registration(), 3_600_000)
    task_ids: list[str] = []
    numbers = iter(range(count))
    while names := [(str(uuid.uuid4()), number) for number in itertools.islice(numbers, ROUND)]:
        tasks = [_task(name, tenants[number % len(tenants)], number) for name, number in names]
        admitted = await asyncio.gather(*(store.admit(task, NO_LIMITS) for task in tasks))
        assert all(isinstance(one, Admitted) and one.created for one in admitted)
        snapshot = await store.snapshot(MODEL, per_queue=1)
        pairs = [Assignment(task_id=task.task_id, worker_id=WORKER, charge=100.0) for task in tasks]
        claimed = await store.claim("seeder", MODEL, snapshot.version, pairs)
        assert len(claimed) == len(tasks)
        for first in range(0, TOKENS, 5):
            await store.append([_batch(one.task.task_id, first, 5) for one in claimed])
        ended = await asyncio.gather(*(store.complete(one.task.task_id, 1, _END, tokens=TOKENS) for one in claimed))
        assert all(ended)
        task_ids += [name for name, _ in names]
    await store.remove_worker(WORKER)
    return task_ids


def _registration() -> WorkerRegistration:
    return WorkerRegistration(
        worker_id=WORKER,
        instance_id="seeder-1",
        url="http://127.0.0.1:9",
        model=MODEL,
        model_digest="digest-of-the-seeder",
        dtype="float32",
        device="cpu",
        context_length=2048,
        slots_total=ROUND,
        vram_total_bytes=0,
        vram_used_bytes=0,
        kv_blocks_total=0,
        kv_block_tokens=0,
    )


def _task(name: str, tenant: str, number: int) -> NewTask:
    """Every fourth one has an idempotency key, every third a session."""
    return NewTask(
        task_id=name,
        tenant=tenant,
        model=MODEL,
        priority="batch" if number % 2 else "interactive",
        payload=b'{"prompt":"' + b"x" * 80 + b'"}',
        seed=number,
        max_tokens=TOKENS,
        prompt_tokens_estimate=20,
        body_hash=f"hash of {name}",
        idempotency_key=None if number % 4 else f"key of {name}",
        session_id=None if number % 3 else f"session-{number % 300}",
    )


def _batch(name: str, first: int, count: int) -> TokenBatch:
    tokens = tuple(TokenEvent(t=f" word{i}", i=i, id=1000 + i) for i in range(first, first + count))
    return TokenBatch(task_id=name, attempt=1, tokens=tokens)


_END = EndEvent(stop_reason="MAX_TOKENS", tokens_in=20, tokens_out=TOKENS)
