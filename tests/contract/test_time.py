"""What time alone changes: sweeps, leases, adoption. Also virtual time."""

from __future__ import annotations

import asyncio

import pytest

from orchestratord.store.store import Store
from orchestratord.store.types import SweepReport
from tests.contract.values import (
    LEASE_MS,
    LONG_MS,
    MODEL,
    T,
    admit,
    batch,
    claim,
    end,
    heartbeat,
    registration,
    running,
    try_claim,
    worker,
)

REPLICA_LEASE_MS = 2000


@pytest.fixture(autouse=True)
async def a_worker(store: Store) -> None:
    await worker(store, slots_total=8)


async def test_missed_deadlines_end_tasks_wherever_they_are(store: Store) -> None:
    await running(store, "backing", deadline_at_ms=T + 50)
    await store.requeue("backing", 1, "worker_error", failure=True, backoff_ms=9000, now_ms=T)
    await running(store, "running", deadline_at_ms=T + 50)
    await admit(store, "waiting", deadline_at_ms=T + 50)
    await admit(store, "later", deadline_at_ms=T + 51)
    assert await store.sweep(now_ms=T + 49, healthy_ms=0) == SweepReport()
    report = await store.sweep(now_ms=T + 50, healthy_ms=0)
    assert report.expired_queued == 2
    assert [task.task_id for task in report.expired_running] == ["running"]
    for name in ("backing", "running", "waiting"):
        record = await store.task(name, None)
        assert record is not None and record.error is not None
        assert (record.status, record.error.code) == ("failed", "DEADLINE_MISSED")
    view = await store.worker("w1", now_ms=T)
    assert view is not None and view.slots_used == 1, "until the worker has stopped it"
    await store.release("w1", "running", 1)
    assert await store.sweep(now_ms=T + 50, healthy_ms=0) == SweepReport()


async def test_each_step_of_a_sweep_is_bounded(store: Store) -> None:
    for number in range(5):
        await admit(store, f"t{number}", deadline_at_ms=T + 1)
    counts = [(await store.sweep(limit=2, now_ms=T + 1, healthy_ms=0)).expired_queued for _ in range(4)]
    assert counts == [2, 2, 1, 0]


async def test_a_silent_worker_is_lost_once_and_its_work_stays_until_requeued(store: Store) -> None:
    task = await running(store, "a")
    await store.heartbeat("w1", heartbeat(running=(("a", 1),)), LEASE_MS, now_ms=T + 1000)
    assert (await store.sweep(now_ms=T + 4999, healthy_ms=LONG_MS)).workers_lost == ()
    assert (await store.sweep(now_ms=T + 5000, healthy_ms=LONG_MS)).workers_lost == ("w1",)
    assert (await store.sweep(now_ms=T + 5000, healthy_ms=LONG_MS)).workers_lost == ()
    assert await store.running_on("w1") == [task]
    view = await store.worker("w1", now_ms=T + 1)
    assert view is not None and view.state == "lost"
    assert [event.kind for event in await store.read_fleet()] == ["worker_registered", "worker_lost"]
    assert (await store.requeue("a", 1, "worker_lost", failure=True, now_ms=T + 5001)).state == "queued"


async def test_a_lost_worker_that_comes_back_is_told_what_to_drop(store: Store) -> None:
    await running(store, "a")
    await running(store, "b")
    await store.sweep(now_ms=T + LEASE_MS, healthy_ms=LONG_MS)
    await store.requeue("a", 1, "worker_lost", failure=True, now_ms=T + LEASE_MS)
    beat = await store.heartbeat("w1", heartbeat(running=(("a", 1), ("b", 1))), LEASE_MS, now_ms=T + 6000)
    assert (beat.known, beat.cancel) == (True, (("a", 1),))
    view = await store.worker("w1", now_ms=T + 6000)
    assert view is not None and view.state == "ready"
    assert (await claim(store, "a", now_ms=T + 6000)).attempt == 2


async def test_leases_are_not_judged_before_redis_was_healthy_for_one(store: Store) -> None:
    """A Redis outage makes every lease look expired."""
    await running(store, "a")
    await store.replica_heartbeat("r1", "http://r1", REPLICA_LEASE_MS, now_ms=T)
    late = T + 60_000
    assert (await store.sweep(now_ms=late, healthy_ms=LEASE_MS - 1)).workers_lost == ()
    assert await store.adopt("r2", now_ms=late, healthy_ms=REPLICA_LEASE_MS - 1) == []
    assert len(await store.adopt("r2", now_ms=late, healthy_ms=REPLICA_LEASE_MS)) == 1
    assert (await store.sweep(now_ms=late, healthy_ms=LEASE_MS)).workers_lost == ("w1",)


async def test_a_call_that_was_held_up_judges_nothing(store: Store) -> None:
    """A sweep that waited in a paused Redis runs before the heartbeats that waited behind it."""
    await running(store, "a")
    run = store._run
    now, believable, *_, lost = await run("sweep", T + 60_000, "c", 64, LONG_MS, T + 50_000)
    assert (now, believable, lost) == (str(T + 60_000).encode(), 0, [])
    await store.replica_heartbeat("r1", "http://r1", REPLICA_LEASE_MS, now_ms=T)
    assert (await run("adopt", T + 60_000, "r2", 64, LONG_MS, T + 50_000))[1:] == [0, []]


async def test_a_new_store_judges_no_lease_yet(store: Store) -> None:
    assert (await store.sweep(healthy_ms=LONG_MS)).workers_lost == (), "nor knows Redis' clock"
    await store.register_worker(registration("w2"), LEASE_MS, now_ms=1)
    assert (await store.sweep()).workers_lost == ()
    assert (await store.sweep(healthy_ms=LONG_MS)).workers_lost == ("w2",)


async def test_a_dead_replicas_tasks_are_adopted_once_by_one(store: Store) -> None:
    for number in range(8):
        await running(store, f"t{number}")
    await store.replica_heartbeat("r1", "http://r1", REPLICA_LEASE_MS, now_ms=T)
    for name in "2345":
        await store.replica_heartbeat(f"r{name}", "http://other", REPLICA_LEASE_MS, now_ms=T + 1000)
    assert await store.adopt("r2", now_ms=T + 1999, healthy_ms=LONG_MS) == []
    adopted = await asyncio.gather(
        *(store.adopt(f"r{name}", limit=3, now_ms=T + 2000, healthy_ms=LONG_MS) for name in "23452345")
    )
    names = [task.task_id for tasks in adopted for task in tasks]
    assert sorted(names) == sorted(f"t{number}" for number in range(8))
    assert max(len(tasks) for tasks in adopted) == 3
    assert all(task.owner == f"r{name}" for name, tasks in zip("23452345", adopted, strict=True) for task in tasks)
    assert await store.owned("r1") == []
    assert [view.replica_id for view in await store.replicas()] == ["r2", "r3", "r4", "r5"]
    assert all(task.attempt == 1 for tasks in adopted for task in tasks)
    assert await store.append([batch("t0", 1, 0, 1)]) == ["appended"]
    assert await store.complete("t0", 1, end(1), now_ms=T + 2000)


async def test_an_owner_that_never_spoke_can_be_found_dead(store: Store) -> None:
    """A replica that was given up as dead wakes, claims, and dies before its next heartbeat."""
    await running(store, "a")
    assert await store.replicas() == []
    (task,) = await store.adopt("r2", now_ms=T, healthy_ms=0)
    assert (task.task_id, task.owner) == ("a", "r2")
    (task,) = await store.adopt("r3", now_ms=T, healthy_ms=0)
    assert task.owner == "r3"


async def test_a_replica_never_adopts_from_itself(store: Store) -> None:
    await running(store, "a")
    await store.replica_heartbeat("r1", "http://r1", REPLICA_LEASE_MS, now_ms=T)
    assert await store.adopt("r1", now_ms=T + 9000, healthy_ms=LONG_MS) == []
    assert [task.task_id for task in await store.owned("r1")] == ["a"]


async def test_handing_over_and_leaving(store: Store) -> None:
    for number in range(3):
        await running(store, f"t{number}")
    await store.replica_heartbeat("r1", "http://r1", REPLICA_LEASE_MS, now_ms=T)
    assert await store.hand_over("r1") == 3
    assert await store.hand_over("r1") == 0
    assert await store.audit() == []
    assert len(await store.adopt("r2", limit=2, now_ms=T, healthy_ms=0)) == 2
    assert [view.replica_id for view in await store.replicas()] == ["r1"]
    await store.cancel("t0", None, now_ms=T)
    await store.cancel("t1", None, now_ms=T)
    await store.cancel("t2", None, now_ms=T)
    for number in range(3):
        await store.release("w1", f"t{number}", 1)
    assert await store.leave("r1") == 0
    assert await store.replicas() == []


async def test_leaving_hands_over_too(store: Store) -> None:
    await running(store, "a")
    await store.replica_heartbeat("r1", "http://r1", REPLICA_LEASE_MS, now_ms=T)
    assert await store.leave("r1") == 1
    (task,) = await store.adopt("r2", now_ms=T, healthy_ms=0)
    assert (task.owner, task.attempt) == ("r2", 1)
    assert [event.kind for event in await store.read_fleet()] == [
        "worker_registered",
        "replica_joined",
        "replica_left",
    ]


async def virtual_times(store: Store) -> dict[str, float]:
    return (await store.snapshot(MODEL, now_ms=T)).virtual_times


async def test_virtual_time_is_charged_by_weight_and_settled_to_what_was_served(store: Store) -> None:
    await admit(store, "a", weight=2.0, prompt_tokens_estimate=10)
    await admit(store, "b", tenant="rival")
    await claim(store, "a", charge=100)
    assert await virtual_times(store) == {"acme": 50.0}
    await store.append([batch("a", 1, 0, 30)])
    await store.requeue("a", 1, "preempted", failure=False, now_ms=T)
    assert (await virtual_times(store))["acme"] == 20.0
    await claim(store, "a", charge=7)
    await store.append([batch("a", 2, 30, 10)])
    await store.complete("a", 2, end(40, tokens_in=16), now_ms=T)
    assert (await virtual_times(store))["acme"] == (16 + 40) / 2
    await claim(store, "b", charge=64)
    await store.cancel("b", None, now_ms=T)
    assert (await virtual_times(store))["rival"] == 10.0
    await store.release("w1", "b", 1)


async def test_idle_time_earns_no_credit(store: Store) -> None:
    await admit(store, "a")
    await claim(store, "a", charge=500)
    await admit(store, "b", tenant="rival")
    assert await virtual_times(store) == {"acme": 500.0, "rival": 500.0}
    await claim(store, "b", charge=40)
    await admit(store, "c", tenant="third")
    assert (await virtual_times(store))["third"] == 500.0
    await admit(store, "a2")
    assert (await virtual_times(store))["acme"] == 500.0


async def test_whoever_comes_after_everybody_left_starts_where_the_last_one_stood(store: Store) -> None:
    await admit(store, "a", prompt_tokens_estimate=300)
    await claim(store, "a", charge=500)
    await store.complete("a", 1, end(tokens_in=0), now_ms=T)
    await admit(store, "b", tenant="rival")
    assert (await virtual_times(store))["rival"] == 300.0
    assert await try_claim(store, "b", charge=0) != []
