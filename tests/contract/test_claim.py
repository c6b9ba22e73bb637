"""Claims: what is checked, what is written, who wins."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from llorch_wire.events import MigratedEvent, StartedEvent
from orchestratord.store.keys import key
from orchestratord.store.store import Store
from orchestratord.store.types import Assignment, PlacementSpec
from tests.contract.values import (
    LEASE_MS,
    MODEL,
    T,
    admit,
    batch,
    claim,
    end,
    heartbeat,
    running,
    try_claim,
    worker,
)


async def test_a_claim_writes_attempt_owner_slot_and_event(store: Store) -> None:
    await worker(store)
    await admit(store, "a", correlation_id="c-1", on_disconnect="cancel")
    (claimed,) = await try_claim(store, "a", now_ms=T + 7)
    task = claimed.task
    assert claimed.payload == b'{"prompt":"once"}' and claimed.resume_token_ids == ()
    assert (task.attempt, task.worker_id, task.instance_id, task.owner) == (1, "w1", "i1", "r1")
    assert (task.worker_url, task.claimed_at_ms, task.correlation_id) == ("http://127.0.0.1:9001", T + 7, "c-1")
    entry = (await store.read_log("a", after="0-1"))[0]
    assert entry.position == "1-0"
    assert msgspec.json.decode(entry.data, type=StartedEvent) == StartedEvent(
        task_id="a",
        worker_id="w1",
        model=MODEL,
        model_digest="digest-a",
        seed=-(2**63) + 1,
        attempt=1,
        determinism="prefix",
        started_at_ms=T + 7,
    )
    assert await store.owned("r1") == await store.running_on("w1") == [task]
    assert await store.waiting_models() == []
    record = await store.task("a", "acme")
    assert record is not None and (record.status, record.attempt, record.started_at_ms) == ("running", 1, T + 7)
    assert record.queue_position is None


async def test_a_plan_from_another_version_is_refused_whole(store: Store) -> None:
    await worker(store)
    await admit(store, "a")
    await admit(store, "b")
    stale = (await store.snapshot(MODEL, now_ms=T)).version
    await claim(store, "a")
    assert await store.claim("r2", MODEL, stale, [Assignment(task_id="b", worker_id="w1", charge=1)], now_ms=T) == []
    assert len(await try_claim(store, "b")) == 1


async def test_admissions_do_not_make_a_plan_stale(store: Store) -> None:
    await worker(store)
    await admit(store, "a")
    version = (await store.snapshot(MODEL, now_ms=T)).version
    await admit(store, "b")
    pair = Assignment(task_id="a", worker_id="w1", charge=1)
    assert len(await store.claim("r1", MODEL, version, [pair], now_ms=T)) == 1


@pytest.mark.parametrize("change", ["drain", "undrain", "lost", "register", "requeue", "complete", "release"])
async def test_everything_else_does(store: Store, change: str) -> None:
    await worker(store)
    await running(store, "r")
    await running(store, "c")
    await store.cancel("c", None, now_ms=T)
    version = (await store.snapshot(MODEL, now_ms=T)).version
    match change:
        case "drain":
            await store.drain_worker("w1", 1000, now_ms=T)
        case "undrain":
            await store.undrain_worker("w1")
        case "lost":
            await store.mark_worker_lost("w1", "i1", "probed", now_ms=T)
        case "register":
            await worker(store, "w2")
        case "requeue":
            await store.requeue("r", 1, "preempted", failure=False, now_ms=T)
        case "complete":
            await store.complete("r", 1, end(), now_ms=T)
        case _:
            await store.release("w1", "c", 1)
    assert (await store.snapshot(MODEL, now_ms=T)).version != version


async def test_slots_bound_the_claims_of_one_call(store: Store) -> None:
    await worker(store, slots_total=2)
    for name in "abc":
        await admit(store, name)
    version = (await store.snapshot(MODEL, now_ms=T)).version
    pairs = [Assignment(task_id=name, worker_id="w1", charge=1) for name in ("a", "b", "c", "a")]
    claimed = await store.claim("r1", MODEL, version, pairs, now_ms=T)
    assert [one.task.task_id for one in claimed] == ["a", "b"]


async def test_a_worker_that_takes_no_work_gets_none(store: Store) -> None:
    await worker(store)
    await admit(store, "a")
    await store.drain_worker("w1", 30_000, now_ms=T)
    assert await try_claim(store, "a") == []
    await store.undrain_worker("w1")
    await store.heartbeat("w1", heartbeat(status="failed"), LEASE_MS, now_ms=T)
    assert await try_claim(store, "a") == []
    await store.heartbeat("w1", heartbeat(status="starting"), LEASE_MS, now_ms=T)
    assert await try_claim(store, "a") == []
    await store.heartbeat("w1", heartbeat(), LEASE_MS, now_ms=T)
    assert await try_claim(store, "a", now_ms=T + LEASE_MS) == []
    await store.mark_worker_lost("w1", "i1", "probed", now_ms=T)
    assert await try_claim(store, "a") == []
    assert await try_claim(store, "a", "nobody") == []
    await store.heartbeat("w1", heartbeat(), LEASE_MS, now_ms=T)
    assert len(await try_claim(store, "a")) == 1


@pytest.mark.parametrize(
    ("placement", "goes"),
    [
        ({"pin_worker": "w1"}, True),
        ({"pin_worker": "w2"}, False),
        ({"pin_pool": "local"}, True),
        ({"pin_pool": "far"}, False),
        ({"pin_pool": "local", "pin_worker": "w2"}, False),
    ],
)
async def test_a_pin_is_respected_whatever_the_plan_says(store: Store, placement: dict[str, Any], goes: bool) -> None:
    await worker(store)
    await admit(store, "a", placement=PlacementSpec(mode="pin", **placement))
    assert len(await try_claim(store, "a")) == goes


async def test_a_worker_of_another_model_is_refused(store: Store) -> None:
    await worker(store)
    await worker(store, "w2", model="other")
    await admit(store, "a")
    assert await try_claim(store, "a", "w2") == []


async def test_a_continuation_needs_the_same_weights(store: Store) -> None:
    await worker(store)
    await worker(store, "w2", model_digest="digest-b")
    await worker(store, "w3", dtype="bfloat16")
    await worker(store, "w4")
    await running(store, "a")
    await store.append([batch("a", 1, 0, 3)])
    await store.requeue("a", 1, "worker_lost", failure=True, now_ms=T)
    (waiting,) = (await store.snapshot(MODEL, now_ms=T)).waiting
    assert (waiting.required_digest, waiting.required_dtype, waiting.tokens_kept) == ("digest-a", "float32", 3)
    assert await try_claim(store, "a", "w2") == []
    assert await try_claim(store, "a", "w3") == []
    (claimed,) = await try_claim(store, "a", "w4")
    assert claimed.task.attempt == 2
    assert claimed.resume_token_ids == (1000, 1001, 1002)
    entry = (await store.read_log("a", after="1-3"))[0]
    assert entry.position == "2-3"
    assert msgspec.json.decode(entry.data, type=MigratedEvent) == MigratedEvent(
        task_id="a", worker_id="w4", attempt=2, reason="worker_lost", tokens_kept=3
    )


async def test_without_tokens_any_weights_will_do(store: Store) -> None:
    await worker(store)
    await worker(store, "w2", model_digest="digest-b")
    await running(store, "a")
    await store.requeue("a", 1, "worker_error", failure=True, now_ms=T)
    assert (await claim(store, "a", "w2")).attempt == 2


async def test_a_task_past_its_deadline_is_not_started(store: Store) -> None:
    await worker(store)
    await admit(store, "a", deadline_at_ms=T + 10)
    assert await try_claim(store, "a", now_ms=T + 10) == []


async def test_two_replicas_never_start_the_same_task(store: Store) -> None:
    await worker(store, slots_total=64)
    for number in range(20):
        await admit(store, f"t{number}")

    async def dispatch(replica: str) -> list[str]:
        mine: list[str] = []
        while (snapshot := await store.snapshot(MODEL, per_queue=3, now_ms=T)).waiting:
            pairs = [Assignment(task_id=task.task_id, worker_id="w1", charge=1) for task in snapshot.waiting]
            claimed = await store.claim(replica, MODEL, snapshot.version, pairs, now_ms=T)
            mine += [one.task.task_id for one in claimed]
        return mine

    first, second, third = await asyncio.gather(dispatch("r1"), dispatch("r2"), dispatch("r3"))
    assert sorted(first + second + third) == sorted(f"t{number}" for number in range(20))
    for replica, mine in (("r1", first), ("r2", second), ("r3", third)):
        assert sorted(task.task_id for task in await store.owned(replica)) == sorted(mine)


async def test_a_repeated_claim_gives_the_same_answer(store: Store) -> None:
    """A claim whose answer was lost is sent again by the connection, with its own id."""
    await worker(store)
    await admit(store, "a")
    version = (await store.snapshot(MODEL, now_ms=T)).version
    run = store._run
    first = await run("claim", T, "r1", MODEL, version, "call-1", "a", "w1", "10.0")
    again = await run("claim", T, "r1", MODEL, version, "call-1", "a", "w1", "10.0")
    assert first == again and len(first) == 1
    assert (await store.workers(now_ms=T))[0].slots_used == 1


async def test_sessions_and_prefixes_are_remembered(store: Store) -> None:
    await worker(store)
    await worker(store, "w2")
    await admit(store, "a", session_id="s 1", prefix_hashes=("p1", "p2"))
    await claim(store, "a")
    await admit(store, "b", session_id="s 1", prefix_hashes=("p1", "p3"))
    await admit(store, "c", session_id="s 1", tenant="rival")
    snapshot = await store.snapshot(MODEL, now_ms=T)
    by_id = {task.task_id: task for task in snapshot.waiting}
    assert by_id["b"].session_worker == "w1" and by_id["b"].prefix_hashes == ("p1", "p3")
    assert by_id["c"].session_worker is None
    assert snapshot.prefix_workers == {"p1": ("w1",)}
    await claim(store, "b", "w2")
    await admit(store, "d", prefix_hashes=("p1",))
    assert (await store.snapshot(MODEL, now_ms=T)).prefix_workers == {"p1": ("w2", "w1")}


async def test_the_snapshot_gives_the_head_of_every_queue_in_order(store: Store) -> None:
    await worker(store)
    far = PlacementSpec(mode="pin", pin_pool="far")
    for number in range(5):
        await admit(store, f"pinned{number}", placement=far)
    for number in range(5):
        await admit(store, f"free{number}")
        await admit(store, f"batch{number}", priority="batch", tenant="rival")
    snapshot = await store.snapshot(MODEL, per_queue=2, now_ms=T)
    assert [task.task_id for task in snapshot.waiting] == ["pinned0", "pinned1", "free0", "batch0", "free1", "batch1"]
    assert snapshot.waiting[0].placement == far


async def test_a_continuation_hides_nobody_behind_it(store: Store) -> None:
    """It may wait for weights that no worker has any more."""
    await worker(store)
    await running(store, "a")
    await store.append([batch("a", 1, 0, 1)])
    await admit(store, "b")
    await store.requeue("a", 1, "worker_lost", failure=True, now_ms=T)
    snapshot = await store.snapshot(MODEL, per_queue=1, now_ms=T)
    assert [task.task_id for task in snapshot.waiting] == ["a", "b"]


async def test_a_snapshot_of_many_queues_is_bounded(store: Store) -> None:
    await worker(store)
    for number in range(300):
        await admit(store, f"a{number}", tenant=f"tenant {number}")
        await admit(store, f"b{number}", tenant=f"tenant {number // 100}")
    snapshot = await store.snapshot(MODEL, per_queue=100, now_ms=T)
    heads = {task.tenant: task.task_id for task in reversed(snapshot.waiting)}
    assert len(snapshot.waiting) <= 1024
    assert heads == {f"tenant {number}": f"a{number}" if number else "a0" for number in range(300)}


async def test_an_empty_model_has_an_empty_snapshot(store: Store) -> None:
    snapshot = await store.snapshot("nothing", now_ms=T)
    assert (snapshot.version, snapshot.waiting, snapshot.workers, snapshot.now_ms) == (0, (), (), T)


async def test_the_prefix_index_has_a_bound_and_forgets_the_longest_unused(store: Store) -> None:
    for number in range(6):
        await worker(store, f"w{number}", slots_total=64)
    for number in range(45):
        await admit(store, f"t{number}", prefix_hashes=tuple(f"p{number}-{piece}" for piece in range(200)))
        await claim(store, f"t{number}", now_ms=T + number)
    client = store._connection.client
    assert await client.hlen(key("prefix", MODEL)) == await client.zcard(key("prefix-age", MODEL)) == 8192
    await admit(store, "again", prefix_hashes=("p0-0", "p44-0", "p44-199"))
    known = (await store.snapshot(MODEL, now_ms=T)).prefix_workers
    assert known == {"p44-0": ("w1",), "p44-199": ("w1",)}, "the first were forgotten"
    for number in range(6):
        await admit(store, f"more{number}", prefix_hashes=("shared",))
        await claim(store, f"more{number}", f"w{number}", now_ms=T + 100)
    await admit(store, "last", prefix_hashes=("shared",))
    assert (await store.snapshot(MODEL, now_ms=T)).prefix_workers["shared"] == ("w5", "w4", "w3", "w2")
