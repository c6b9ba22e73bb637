"""Admission: identity, limits, order, the first event."""

from __future__ import annotations

import msgspec
import pytest

from llorch_wire.events import QueuedEvent, StartedEvent
from orchestratord.store.store import Store
from orchestratord.store.types import Admitted, PlacementSpec, QueueLimits, Refused
from tests.contract.values import LIMITS, MODEL, T, admit, claim, end, new_task, running, worker


@pytest.fixture(autouse=True)
async def a_worker(store: Store) -> None:
    await worker(store)


async def test_a_task_is_queued_with_its_event(store: Store) -> None:
    outcome = await admit(store, "a")
    assert outcome == Admitted(
        task_id="a", created=True, seed=-(2**63) + 1, created_at_ms=T, queue_position=1, status="queued", model=MODEL
    )
    (entry,) = await store.read_log("a")
    assert (entry.position, entry.kind) == ("0-1", "queued")
    assert msgspec.json.decode(entry.data, type=QueuedEvent) == QueuedEvent(task_id="a", queue_position=1)
    assert await store.payload("a") == b'{"prompt":"once"}'
    assert await store.waiting_models() == [MODEL]


async def test_an_unknown_model_is_refused_and_nothing_is_written(store: Store) -> None:
    assert await store.admit(new_task("a", model="none"), LIMITS) == Refused(reason="model_unknown")
    assert await store.task("a", None) is None
    assert not await store.model_known("none")
    assert await store.models() == [MODEL]


async def test_the_same_id_and_body_is_the_same_task(store: Store) -> None:
    first = await admit(store, "a")
    again = await store.admit(new_task("a", seed=5), LIMITS, now_ms=T + 9)
    assert isinstance(again, Admitted)
    assert (again.created, again.seed, again.created_at_ms) == (False, first.seed, T)
    assert await store.admit(new_task("a", body_hash="other"), LIMITS) == Refused(reason="conflict")


async def test_another_tenants_id_is_a_conflict_that_tells_nothing(store: Store) -> None:
    await admit(store, "a")
    assert await store.admit(new_task("a", tenant="rival"), LIMITS) == Refused(reason="conflict")
    assert await store.task("a", "rival") is None
    assert await store.cancel("a", "rival") is None


async def test_an_idempotency_key_finds_its_task_within_the_tenant(store: Store) -> None:
    await admit(store, "a", idempotency_key="k 1", body_hash="h")
    again = await store.admit(new_task("b", idempotency_key="k 1", body_hash="h"), LIMITS)
    assert isinstance(again, Admitted)
    assert (again.task_id, again.created) == ("a", False)
    assert await store.admit(new_task("c", idempotency_key="k 1", body_hash="x"), LIMITS) == Refused(reason="conflict")
    other = await admit(store, "d", idempotency_key="k 1", body_hash="x", tenant="rival")
    assert other.created


async def test_an_idempotency_record_lives_as_long_as_its_task(store: Store) -> None:
    task = await running(store, "a", idempotency_key="k", body_hash="h")
    await store.complete("a", task.attempt, end(), now_ms=T + 5)
    again = await store.admit(new_task("b", idempotency_key="k", body_hash="h"), LIMITS)
    assert isinstance(again, Admitted)
    assert (again.task_id, again.status, again.queue_position) == ("a", "completed", 0)
    assert await store.delete_task("a")
    assert (await admit(store, "c", idempotency_key="k", body_hash="other")).created


async def test_positions_count_interactive_before_batch(store: Store) -> None:
    assert (await admit(store, "b1", priority="batch")).queue_position == 1
    assert (await admit(store, "b2", priority="batch")).queue_position == 2
    assert (await admit(store, "i1", tenant="rival")).queue_position == 1
    assert (await admit(store, "i2")).queue_position == 2
    record = await store.task("b1", "acme")
    assert record is not None and record.queue_position == 3
    await claim(store, "i1")
    record = await store.task("b2", "acme")
    assert record is not None and record.queue_position == 3


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (QueueLimits(per_model=2), "queue_full_model"),
        (QueueLimits(per_tenant=2), "queue_full_tenant"),
        (QueueLimits(total=2), "queue_full_total"),
    ],
)
async def test_full_queues_refuse(store: Store, limits: QueueLimits, reason: str) -> None:
    await admit(store, "a")
    await admit(store, "b", priority="batch")
    refused = await store.admit(new_task("c"), limits)
    assert refused == Refused(reason=reason, limit=2)
    assert await store.task("c", None) is None
    again = await store.admit(new_task("a"), limits)
    assert isinstance(again, Admitted) and not again.created
    await claim(store, "a")
    assert isinstance(await store.admit(new_task("c"), limits), Admitted)


@pytest.mark.parametrize("limits", [{"per_model": 2}, {"per_tenant": 2}, {"total": 2}])
async def test_interactive_work_may_drop_the_oldest_batch(store: Store, limits: dict[str, int]) -> None:
    policy = QueueLimits(policy="drop_oldest_batch", **limits)
    await admit(store, "b1", priority="batch", placement=PlacementSpec(mode="pin", pin_pool="far"))
    await admit(store, "b2", priority="batch")
    assert isinstance(await store.admit(new_task("b3", priority="batch"), policy), Refused)
    assert isinstance(await store.admit(new_task("i1"), policy), Admitted)
    dropped = await store.task("b1", "acme")
    assert dropped is not None and dropped.status == "failed"
    assert dropped.error is not None and dropped.error.code == "QUEUE_FULL" and dropped.error.retriable
    assert isinstance(await store.admit(new_task("i2"), policy), Admitted)
    assert isinstance(await store.admit(new_task("i3"), policy), Refused)


async def test_every_field_comes_back(store: Store) -> None:
    await admit(
        store,
        "a",
        tenant="ten:ant/é %",
        session_id="null",
        metadata={"k": "v é", "n": ""},
        on_disconnect="cancel",
        callback_url="https://example.org/x",
        deadline_at_ms=T + 60_000,
        priority="batch",
        seed=2**63 - 1,
    )
    record = await store.task("a", "ten:ant/é %")
    assert record is not None
    assert (record.session_id, record.metadata, record.on_disconnect) == ("null", {"k": "v é", "n": ""}, "cancel")
    assert (record.callback_url, record.deadline_at_ms, record.seed) == ("https://example.org/x", T + 60_000, 2**63 - 1)
    (depth,) = await store.queue(now_ms=T + 500)
    assert (depth.tenant, depth.priority, depth.depth, depth.oldest_age_ms) == ("ten:ant/é %", "batch", 1, 500)


async def test_an_int64_seed_reaches_the_started_event_exactly(store: Store) -> None:
    task = await running(store, "a", seed=2**63 - 1)
    assert task.seed == 2**63 - 1
    entry = (await store.read_log("a", after="0-1"))[0]
    assert msgspec.json.decode(entry.data, type=StartedEvent).seed == 2**63 - 1


async def test_a_prefix_hash_with_a_space_is_an_error(store: Store) -> None:
    with pytest.raises(ValueError, match="prefix hash"):
        await store.admit(new_task("a", prefix_hashes=("x y",)), LIMITS)


async def test_a_repeat_of_a_call_whose_reader_left_is_a_new_task(store: Store) -> None:
    await admit(store, "a", idempotency_key="k", body_hash="h", on_disconnect="cancel")
    assert await store.cancel("a", "acme", abandoned=True)
    assert await store.admit(new_task("x", idempotency_key="k", body_hash="other"), LIMITS) == Refused(
        reason="conflict"
    )
    anew = await admit(store, "b", idempotency_key="k", body_hash="h", on_disconnect="cancel")
    assert (anew.task_id, anew.created, anew.status) == ("b", True, "queued")
    again = await admit(store, "c", idempotency_key="k", body_hash="h", on_disconnect="cancel")
    assert (again.task_id, again.created) == ("b", False)
    assert await store.delete_task("a")
    again = await admit(store, "c", idempotency_key="k", body_hash="h", on_disconnect="cancel")
    assert (again.task_id, again.created) == ("b", False)


async def test_a_repeat_of_what_was_cancelled_on_purpose_stays_cancelled(store: Store) -> None:
    await admit(store, "a", idempotency_key="k", body_hash="h")
    await store.cancel("a", "acme")
    again = await admit(store, "b", idempotency_key="k", body_hash="h")
    assert (again.task_id, again.created, again.status) == ("a", False, "cancelled")


async def test_a_known_key_with_another_tasks_id_is_a_conflict(store: Store) -> None:
    await admit(store, "a", idempotency_key="k", body_hash="h")
    await admit(store, "b", body_hash="h")
    for name in ("b", "new"):
        both = new_task(name, idempotency_key="k", body_hash="h", own_id=True)
        assert await store.admit(both, LIMITS) == Refused(reason="conflict_pair")
    same = await admit(store, "a", idempotency_key="k", body_hash="h", own_id=True)
    assert (same.task_id, same.created) == ("a", False)


async def test_a_key_that_comes_with_a_known_id_stands_for_it_from_then_on(store: Store) -> None:
    await admit(store, "a", body_hash="h")
    for one in ("k1", "k2"):
        assert not (await admit(store, "a", idempotency_key=one, body_hash="h", own_id=True)).created
    for one in ("k1", "k2"):
        other = new_task("b", idempotency_key=one, body_hash="other")
        assert await store.admit(other, LIMITS) == Refused(reason="conflict")
        assert (await admit(store, "b", idempotency_key=one, body_hash="h")).task_id == "a"
    await store.cancel("a", "acme")
    assert await store.delete_task("a")
    for number, one in enumerate(("k1", "k2")):
        assert (await admit(store, f"n{number}", idempotency_key=one, body_hash="other")).created


async def test_a_task_has_so_many_keys_at_most(store: Store) -> None:
    await admit(store, "a", idempotency_key="k", body_hash="h")
    for number in range(63):
        await admit(store, "a", idempotency_key=f"k{number}", body_hash="h", own_id=True)
    one_more = new_task("a", idempotency_key="more", body_hash="h", own_id=True)
    assert await store.admit(one_more, LIMITS) == Refused(reason="conflict_keys", limit=64)
    assert not (await admit(store, "a", idempotency_key="k5", body_hash="h", own_id=True)).created
