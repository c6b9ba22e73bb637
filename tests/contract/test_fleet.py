"""Workers, replicas, the feed, listings, hints."""

from __future__ import annotations

import asyncio

import pytest

from llorch_wire.tasks import TaskStatus
from orchestratord.store.hints import HintReader
from orchestratord.store.store import Store
from orchestratord.store.types import HeartbeatOutcome, QueueDepth
from tests.contract.values import (
    LEASE_MS,
    MODEL,
    T,
    admit,
    batch,
    end,
    error,
    heartbeat,
    registration,
    running,
    try_claim,
    worker,
)


async def test_a_worker_is_seen_as_it_registered(store: Store) -> None:
    await worker(store, pool="p 1", vram_total_bytes=2**40, kv_blocks_total=100, determinism="exact", version="1.2")
    await store.heartbeat(
        "w1",
        heartbeat(kv_blocks_free=40, tokens_per_second=12.5, vram_used_bytes=2**39),
        LEASE_MS,
        now_ms=T + 1000,
    )
    (view,) = await store.workers(now_ms=T + 1000)
    assert (view.worker_id, view.pool, view.determinism, view.version) == ("w1", "p 1", "exact", "1.2")
    assert (view.kv_blocks_total, view.kv_blocks_free, view.tokens_per_second) == (100, 40, 12.5)
    assert (view.vram_total_bytes, view.vram_used_bytes) == (2**40, 2**39)
    assert (view.state, view.slots_total, view.slots_used) == ("ready", 2, 0)
    assert (view.registered_at_ms, view.lease_expires_at_ms) == (T, T + 1000 + LEASE_MS)
    assert await store.worker("nobody", now_ms=T) is None


async def test_a_heartbeat_of_an_unregistered_instance_must_register(store: Store) -> None:
    assert await store.heartbeat("w1", heartbeat(), LEASE_MS, now_ms=T) == HeartbeatOutcome(known=False)
    await worker(store)
    assert (await store.heartbeat("w1", heartbeat(), LEASE_MS, now_ms=T)).known
    assert not (await store.heartbeat("w1", heartbeat("i0"), LEASE_MS, now_ms=T)).known


async def test_drained_stays_drained(store: Store) -> None:
    await worker(store)
    await admit(store, "a")
    assert await store.drain_worker("w1", 5000, now_ms=T)
    assert (await store.heartbeat("w1", heartbeat(), LEASE_MS, now_ms=T)).drain
    await worker(store, instance_id="i2")
    view = await store.worker("w1", now_ms=T)
    assert view is not None and (view.state, view.drain_deadline_at_ms) == ("draining", T + 5000)
    assert await try_claim(store, "a") == []
    assert await store.undrain_worker("w1")
    assert len(await try_claim(store, "a")) == 1
    assert not await store.drain_worker("nobody", 1, now_ms=T) and not await store.undrain_worker("nobody")


async def test_a_worker_that_drains_itself_takes_nothing(store: Store) -> None:
    await worker(store)
    await admit(store, "a")
    await store.heartbeat("w1", heartbeat(status="draining"), LEASE_MS, now_ms=T)
    view = await store.worker("w1", now_ms=T)
    assert view is not None and (view.state, view.drain_deadline_at_ms) == ("draining", None)
    assert await try_claim(store, "a") == []


async def test_removing_leaves_attempts_to_their_owners(store: Store) -> None:
    await worker(store)
    task = await running(store, "a")
    await running(store, "b")
    await store.cancel("b", None, now_ms=T)
    await store.drain_worker("w1", 1, now_ms=T)
    assert await store.remove_worker("w1")
    assert not await store.remove_worker("w1")
    assert await store.workers(now_ms=T) == [] and await store.running_on("w1") == [task]
    assert (await store.requeue("a", 1, "worker_lost", failure=True, now_ms=T)).state == "queued"
    await worker(store)
    view = await store.worker("w1", now_ms=T)
    assert view is not None and (view.state, view.slots_used) == ("ready", 0)


async def test_a_worker_may_come_back_with_another_model(store: Store) -> None:
    await worker(store)
    await worker(store, instance_id="i2", model="other")
    assert (await store.snapshot(MODEL, now_ms=T)).workers == ()
    assert [view.worker_id for view in (await store.snapshot("other", now_ms=T)).workers] == ["w1"]
    assert await store.models() == sorted([MODEL, "other"])


async def test_marking_lost_names_the_instance_that_was_probed(store: Store) -> None:
    await worker(store, instance_id="i2")
    assert not await store.mark_worker_lost("w1", "i1", "probed", now_ms=T)
    assert await store.mark_worker_lost("w1", "i2", "probed", now_ms=T)
    assert not await store.mark_worker_lost("w1", "i2", "probed", now_ms=T)
    assert not await store.mark_worker_lost("nobody", "i2", "probed", now_ms=T)
    events = await store.read_fleet()
    assert [(event.kind, event.subject, event.text, event.at_ms) for event in events[1:]] == [
        ("worker_lost", "w1", "probed", T)
    ]


async def test_heartbeats_alone_do_not_bring_an_unreachable_worker_back(store: Store) -> None:
    await worker(store)
    assert not await store.worker_answers("w1", "i1", now_ms=T), "it never was unreachable"
    assert await store.mark_worker_lost("w1", "i1", "silent", unreachable=True, now_ms=T)
    for second in range(3):
        await store.heartbeat("w1", heartbeat("i1"), 3000, now_ms=T + 1000 * second)
        view = await store.worker("w1", now_ms=T + 1000 * second)
        assert view is not None and view.state == "lost"
        assert await store.audit() == []
    assert not await store.worker_answers("w1", "another", now_ms=T + 2500)
    assert await store.worker_answers("w1", "i1", now_ms=T + 2500)
    assert not await store.worker_answers("w1", "i1", now_ms=T + 2500)
    view = await store.worker("w1", now_ms=T + 2500)
    assert view is not None and view.state == "ready"
    assert [event.kind for event in await store.read_fleet()][1:] == ["worker_lost", "worker_back"]
    assert await store.audit() == []


async def test_one_that_answers_but_no_longer_heartbeats_stays_lost_until_it_does(store: Store) -> None:
    await worker(store)
    await store.mark_worker_lost("w1", "i1", "silent", unreachable=True, now_ms=T)
    assert not await store.worker_answers("w1", "i1", now_ms=T + 10**6)
    await store.heartbeat("w1", heartbeat("i1"), 3000, now_ms=T + 10**6)
    view = await store.worker("w1", now_ms=T + 10**6)
    assert view is not None and view.state == "ready"


async def test_replicas(store: Store) -> None:
    await store.replica_heartbeat("r2", "http://b", 2000, now_ms=T)
    await store.replica_heartbeat("r1", "http://a", 2000, now_ms=T)
    await store.replica_heartbeat("r1", "http://a2", 2000, now_ms=T + 500)
    assert [(view.replica_id, view.url, view.lease_expires_at_ms) for view in await store.replicas()] == [
        ("r1", "http://a2", T + 2500),
        ("r2", "http://b", T + 2000),
    ]


async def test_the_feed_is_read_from_a_cursor(store: Store) -> None:
    first = await store.fleet_event("note", "somebody", "one", now_ms=T)
    second = await store.fleet_event("note", "somebody", "two é", now_ms=T)
    assert [event.text for event in await store.read_fleet()] == ["one", "two é"]
    assert [event.position for event in await store.read_fleet(after=first)] == [second]
    assert await store.read_fleet(after=second) == []
    with pytest.raises(ValueError, match="position"):
        await store.read_fleet(after="banana")


async def test_listing_by_status_and_model_in_pages(store: Store) -> None:
    await worker(store, slots_total=16)
    await worker(store, "w2", model="other")
    for name in ("done", "failed", "gone", "runs"):
        await running(store, name)
    await store.append([batch("done", 1, 0, 1)])
    await store.complete("done", 1, end(1), now_ms=T)
    await store.complete("failed", 1, error(), now_ms=T)
    await store.cancel("gone", None, now_ms=T)
    await store.release("w1", "gone", 1)
    await admit(store, "waits", model="other")
    await admit(store, "theirs", tenant="rival")

    async def names(status: TaskStatus | None = None, model: str | None = None) -> list[str]:
        records, after = await store.list_tasks("acme", status=status, model=model)
        assert after is None
        return [record.task_id for record in records]

    assert await names() == ["waits", "runs", "gone", "failed", "done"]
    assert await names("running") == ["runs"] and await names("completed") == ["done"]
    assert await names("cancelled") == ["gone"] and await names("failed") == ["failed"]
    assert await names(model="other") == ["waits"] and await names("queued", MODEL) == []
    seen: list[str] = []
    after: str | None = None
    while True:
        page, after = await store.list_tasks("acme", limit=2, after=after)
        seen += [record.task_id for record in page]
        if after is None:
            break
    assert seen == ["waits", "runs", "gone", "failed", "done"]
    for wrong in ("banana", "-1", "1.5", "", "9" * 40, "+inf"):
        with pytest.raises(ValueError, match="cursor"):
            await store.list_tasks("acme", after=wrong)


async def test_queue_depths(store: Store) -> None:
    await worker(store)
    assert await store.queue(now_ms=T) == []
    await admit(store, "a", now_ms=T)
    await admit(store, "b", now_ms=T + 100)
    await admit(store, "c", now_ms=T + 200, priority="batch", tenant="rival")
    assert await store.queue(now_ms=T + 300) == [
        QueueDepth(model=MODEL, priority="batch", tenant="rival", depth=1, oldest_age_ms=100),
        QueueDepth(model=MODEL, priority="interactive", tenant="acme", depth=2, oldest_age_ms=300),
    ]


async def next_name(hints: HintReader) -> str:
    async with asyncio.timeout(10):
        async for name in hints:
            return name
    raise AssertionError("the hints ended")


async def test_hints_wake_whoever_subscribed(store: Store) -> None:
    await worker(store)
    async with store.hints() as hints:
        await hints.subscribe("queue")
        await admit(store, "a")
        assert await next_name(hints) == "queue"
        await hints.unsubscribe("queue")
        await hints.subscribe("log:a")
        await try_claim(store, "a")
        assert await next_name(hints) == "log:a"
        await store.append([batch("a", 1, 0, 1), batch("a", 1, 1, 1)])
        assert await next_name(hints) == "log:a"
        await hints.subscribe("cancel:a")
        await store.cancel("a", None, now_ms=T)
        assert {await next_name(hints), await next_name(hints)} >= {"cancel:a"}
    await store.release("w1", "a", 1)


async def test_a_subscription_lasts_as_long_as_its_last_holder(store: Store) -> None:
    async with store.hints() as hints:
        await hints.subscribe("fleet")
        await hints.subscribe("fleet")
        await hints.unsubscribe("fleet")
        await store.fleet_event("note", "x", "y", now_ms=T)
        assert await next_name(hints) == "fleet"
        await hints.unsubscribe("fleet")
        await hints.unsubscribe("fleet")


async def test_registrations_are_idempotent(store: Store) -> None:
    for _ in range(3):
        await store.register_worker(registration(), LEASE_MS, now_ms=T)
    assert [event.kind for event in await store.read_fleet()] == ["worker_registered"]
