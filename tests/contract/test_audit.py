"""The audit finds every broken invariant, and repairs what can be repaired. Redis is broken by hand here."""

from __future__ import annotations

from typing import Any

import pytest

from llorch_wire.events import TERMINAL_SEQUENCE
from orchestratord.store.audit import AuditPlace
from orchestratord.store.keys import key
from orchestratord.store.store import Store
from tests.contract.values import MODEL, T, admit, batch, end, running, worker


@pytest.fixture
async def house(breakable_store: Store) -> Store:
    """One task in each state: waits, retries, runs, stops, done."""
    store = breakable_store
    await worker(store, slots_total=8)
    for name in ("retries", "runs", "stops", "done", "handed"):
        await running(store, name, idempotency_key=name, deadline_at_ms=T + 10**6)
    await store.append([batch("runs", 1, 0, 3)])
    await store.requeue("retries", 1, "worker_error", failure=True, backoff_ms=1000, now_ms=T)
    await store.cancel("stops", None, now_ms=T)
    await store.complete("done", 1, end(), now_ms=T)
    await admit(store, "waits", priority="batch")
    assert await store.audit() == []
    return store


SCORE = 123.0
QUEUE = ("queue", MODEL, "batch", "acme")
BREAKS: dict[str, tuple[Any, ...]] = {
    "a waiting task missing from its queue": ("zrem", QUEUE, "waits"),
    "a waiting task missing from its model's order": ("zrem", ("waiting-in", MODEL, "batch"), "waits"),
    "a waiting task at another place": ("zadd", QUEUE, {"waits": SCORE}),
    "a running task in a queue too": ("zadd", QUEUE, {"runs": SCORE}),
    "a running task without its slot": ("hdel", ("running", "w1"), "runs"),
    "a slot with another attempt": ("hset", ("running", "w1"), "runs", "7"),
    "an ended task in a slot": ("hset", ("running", "w1"), "done", "1"),
    "an unknown task in a slot": ("hset", ("running", "w2"), "ghost", "1"),
    "a running attempt that is stopping too": ("hset", ("stopping", "w1"), "runs:1", str(T)),
    "a running task without its owner": ("srem", ("owned", "r1"), "runs"),
    "an owner that can't be found dead": ("zrem", ("replicas",), "r1"),
    "a running task with two owners": ("sadd", ("owned", "r2"), "runs"),
    "an owned task that is handed over too": ("sadd", ("orphans",), "runs"),
    "a retry that is forgotten": ("zrem", ("retry",), "retries"),
    "a running task that retries": ("zadd", ("retry",), {"runs": SCORE}),
    "a deadline forgotten": ("zrem", ("deadlines",), "runs"),
    "a deadline of an ended task": ("zadd", ("deadlines",), {"done": SCORE}),
    "an ended task not among the finished": ("zrem", ("done",), "done"),
    "a running task among the finished": ("zadd", ("done",), {"runs": SCORE}),
    "a task missing from its listing": ("zrem", ("tasks-by", "acme", "running"), "runs"),
    "a task in a wrong listing": ("zadd", ("tasks-by", "acme", "failed"), {"runs": SCORE}),
    "a task in another tenant's listing": ("zadd", ("tasks-by", "rival", "running"), {"runs": SCORE}),
    "a wrong depth": ("hset", ("waiting",), MODEL, "9"),
    "no depth": ("hdel", ("waiting",), MODEL),
    "a depth of nothing": ("hset", ("waiting",), "ghost model", "1"),
    "a queue not registered": ("srem", ("queues", MODEL), "batch:acme"),
    "a registered queue that is empty": ("sadd", ("queues", MODEL), "batch:nobody"),
    "an active tenant forgotten": ("srem", ("active", MODEL), "acme"),
    "an active tenant without tasks": ("sadd", ("active", MODEL), "nobody"),
    "a payload of an ended task": ("set", ("payload", "done"), "x"),
    "an orphaned log": ("xadd", ("log", "ghost"), {"a": "b"}),
    "an orphaned payload": ("set", ("payload", "ghost"), "x"),
    "an idempotency record of nothing": ("set", ("idem", "acme", "k"), "ghost"),
    "a lease of nobody": ("zadd", ("worker-leases",), {"ghost": SCORE}),
    "a worker that isn't one": ("sadd", ("workers",), "ghost"),
    "a worker under a wrong model": ("sadd", ("workers-of", "other"), "w1"),
    "an order to drain nobody": ("hset", ("drains",), "ghost", "1"),
}


@pytest.mark.parametrize("what", list(BREAKS))
async def test_each_break_is_found_and_repaired(house: Store, what: str) -> None:
    command, parts, *arguments = BREAKS[what]
    client = house._connection.client
    if command in ("hset",):
        await client.hset(key(*parts), *arguments)
    else:
        await getattr(client, command)(key(*parts), *arguments)
    found = await house.audit()
    assert found, what
    assert not any(finding.repaired for finding in found)
    repaired = await house.audit(repair=True)
    assert any(finding.repaired for finding in repaired)
    assert [finding for finding in await house.audit(repair=True) if not finding.repaired] == []
    assert await house.audit() == []
    for name, status in (("waits", "queued"), ("runs", "running"), ("done", "completed"), ("retries", "queued")):
        record = await house.task(name, None)
        assert record is not None and record.status == status


UNREPAIRABLE: dict[str, tuple[Any, ...]] = {
    "a payload lost": ("delete", ("payload", "waits")),
    "a live log that is sealed": ("xadd", ("log", "waits"), {"end": "{}"}, f"0-{TERMINAL_SEQUENCE}"),
    "an ended log without its seal": ("xdel", ("log", "done"), f"1-{TERMINAL_SEQUENCE}"),
    "tokens that no log has": ("hset", ("task", "runs"), "tokens_logged", "9"),
    "a log that begins elsewhere": ("xdel", ("log", "runs"), "0-1"),
    "a hole in the tokens": ("xadd", ("log", "runs"), {"tokens": '[5,[1],["x"]]'}, "1-6"),
    "a log that can't be read": ("xadd", ("log", "runs"), {"tokens": "rubbish"}, "1-6"),
    "a key that nobody makes": ("set", ("mystery", "x"), "1"),
}


@pytest.mark.parametrize("what", list(UNREPAIRABLE))
async def test_what_only_a_person_can_mend_is_found(house: Store, what: str) -> None:
    command, parts, *arguments = UNREPAIRABLE[what]
    client = house._connection.client
    await getattr(client, command)(key(*parts), *arguments)
    assert await house.audit(), what


async def test_repair_leaves_a_whole_store_alone(house: Store) -> None:
    assert await house.audit(repair=True) == []


@pytest.fixture
async def crowded(breakable_store: Store) -> Store:
    """450 queued tasks, and as many index entries without a task."""
    store = breakable_store
    await worker(store)
    for number in range(450):
        await admit(store, f"t{number}")
    client = store._connection.client
    await client.zadd(key("tasks-by", "acme", "queued"), {f"ghost{number}": float(number) for number in range(450)})
    return store


async def test_large_indexes_are_checked_in_windows(crowded: Store) -> None:
    found = await crowded.audit(repair=True, logs=False)
    assert len(found) == 450 and all(finding.repaired for finding in found)
    assert await crowded.audit(logs=False) == []


async def test_a_sweep_with_a_budget_comes_round_in_pieces(crowded: Store) -> None:
    """However small the budget, each run does a step; a place crosses processes as text."""
    store = crowded
    await store._connection.client.zrem(key("waiting-in", MODEL, "interactive"), "t7")
    found, runs = [], 0
    place: AuditPlace | None = None
    while True:
        some, place = await store.audit_from(place, budget_s=0.0)
        found, runs = found + some, runs + 1
        if place is None:
            break
        place = AuditPlace.decode(place.encode())
    assert runs > 3 and all(finding.repaired for finding in found)
    assert sum("ghost" in finding.detail for finding in found) == 450
    assert any("t7" in finding.detail for finding in found)
    assert await store.audit() == []
