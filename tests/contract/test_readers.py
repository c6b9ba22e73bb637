"""Tasks that are to end with their reader: who attends them, and what is left when that replica has gone."""

from __future__ import annotations

import pytest

from orchestratord.store.store import Store
from tests.contract.values import LONG_MS, T, admit, end, running, worker

LEASE = 2_000
GRACE = 10_000


@pytest.fixture(autouse=True)
async def a_worker(store: Store) -> None:
    await worker(store)


async def replicas(store: Store, *names: str, now_ms: int = T) -> None:
    for name in names:
        await store.replica_heartbeat(name, f"http://{name}", LEASE, now_ms=now_ms)


async def test_a_dead_replicas_readers_are_missed_from_when_that_is_noticed(store: Store) -> None:
    await replicas(store, "r1", "r2")
    await running(store, "runs", on_disconnect="cancel", attended_by="r1")
    await admit(store, "waits", on_disconnect="cancel", attended_by="r1")
    await admit(store, "elsewhere", on_disconnect="cancel", attended_by="r2")
    await admit(store, "goes on", attended_by="r1")
    await admit(store, "never read", on_disconnect="cancel")
    assert await store.unattended(GRACE, now_ms=T) == []
    await replicas(store, "r2", now_ms=T + 3_000)
    await store.adopt("r2", healthy_ms=LONG_MS, now_ms=T + 3_000)
    assert sorted(await store.unattended(GRACE, now_ms=T + 3_000 + GRACE - 1)) == [("runs", False), ("waits", False)]
    assert sorted(await store.unattended(GRACE, now_ms=T + 3_000 + GRACE)) == [("runs", True), ("waits", True)]


async def test_readers_of_a_replica_that_leaves_have_the_grace_too(store: Store) -> None:
    await replicas(store, "r1")
    await running(store, "a", on_disconnect="cancel", attended_by="r1")
    while await store.hand_over("r1"):
        pass
    assert await store.unattended(GRACE) == []
    await store.leave("r1")
    assert await store.unattended(GRACE) == [("a", False)]


async def test_a_reader_that_comes_back_attends_it_again(store: Store) -> None:
    await admit(store, "a", on_disconnect="cancel", attended_by="r1")
    await store.readers_lost("r1", now_ms=T)
    assert [task_id for task_id, _ in await store.unattended(GRACE, now_ms=T)] == ["a"]
    assert not await store.attend("a", "rival", "r2", now_ms=T)
    assert await store.attend("a", "acme", "r2", now_ms=T)
    assert await store.unattended(GRACE, now_ms=T) == []
    await store.readers_lost("r1", now_ms=T)
    assert await store.unattended(GRACE, now_ms=T) == []


async def test_a_repeat_that_streams_attends_it(store: Store) -> None:
    await admit(store, "a", idempotency_key="k", body_hash="h", on_disconnect="cancel", attended_by="r1")
    await admit(store, "b", idempotency_key="k", body_hash="h", on_disconnect="cancel", attended_by="r2")
    await store.readers_lost("r1", now_ms=T)
    assert await store.unattended(GRACE, now_ms=T) == []


async def test_one_that_leaves_late_doesnt_cancel_what_a_later_one_reads_elsewhere(store: Store) -> None:
    await admit(store, "a", on_disconnect="cancel", attended_by="r1")
    await store.attend("a", None, "r2", now_ms=T)
    late = await store.cancel("a", None, left="r1")
    assert late is not None and (late.status, late.changed) == ("queued", False)
    last = await store.cancel("a", None, left="r2")
    assert last is not None and (last.status, last.changed) == ("cancelled", True)


async def test_what_has_ended_needs_no_reader(store: Store) -> None:
    task = await running(store, "a", on_disconnect="cancel", attended_by="r1")
    await admit(store, "b", on_disconnect="cancel", attended_by="r1")
    await store.readers_lost("r1", now_ms=T)
    await store.complete("a", task.attempt, end(), now_ms=T)
    await store.cancel("b", None, abandoned=True)
    assert await store.unattended(GRACE, now_ms=T) == []
    assert not await store.attend("a", None, "r2", now_ms=T)
    await admit(store, "on", attended_by="r1")
    assert not await store.attend("on", None, "r2", now_ms=T)
