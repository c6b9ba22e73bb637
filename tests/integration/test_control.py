"""Cancel, disconnect, deadline, preempt, drain, stickiness, and a replica that lost its lease without knowing."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from llorch_wire.errors import ApiError, ErrorCode
from llorch_wire.events import EndEvent, ErrorEvent, StartedEvent
from orchestratord.runtime import Orchestrator, Tenant
from orchestratord.values import StreamItem
from tests.integration.house import TENANT, Town, check_stream, migrations_of, read_all, tokens_of, until
from tests.support.scripted_tokens import expected


def check_cancelled(items: list[StreamItem]) -> None:
    """Contiguous tokens, then exactly one CANCELLED end."""
    assert [token.i for token in tokens_of(items)] == list(range(len(tokens_of(items))))
    assert isinstance(items[-1].event, EndEvent)
    assert items[-1].event.stop_reason == "CANCELLED"
    assert items[-1].event.tokens_out == len(tokens_of(items))
    assert sum(isinstance(item.event, EndEvent | ErrorEvent) for item in items) == 1


async def slots_are_free(town: Town) -> None:
    async def free() -> bool:
        return all(view.slots_used == 0 for view in await town.any.workers())

    await until(free, "every slot is free", 2.0)


async def test_cancel_while_queued_and_twice(town: Town) -> None:
    orchestrator = await town.replica()
    await town.worker(slots=1, token_ms=20)
    await town.submit(seed=1, max_tokens=200, ignore_eos=True)
    task_id = await town.submit(seed=2)
    reading = asyncio.create_task(read_all(orchestrator.follow(task_id, TENANT)))
    await until(lambda: orchestrator.observations.readers_active == 1, "somebody reads")
    assert (await orchestrator.cancel(task_id, TENANT)).record.status == "cancelled"
    assert (await orchestrator.cancel(task_id, TENANT)).record.status == "cancelled"
    check_cancelled(await reading)
    with pytest.raises(ApiError) as hidden:
        await orchestrator.cancel(task_id, Tenant("another"))
    assert hidden.value.code is ErrorCode.NOT_FOUND
    await town.audit()


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_cancel_while_running_frees_the_slot(town: Town, elsewhere: bool) -> None:
    one = await town.replica()
    worker = await town.worker(slots=1, token_ms=5)
    task_id = await town.submit(seed=1, max_tokens=4_000, ignore_eos=True)
    reading = asyncio.create_task(read_all(one.follow(task_id, TENANT)))
    await until(lambda: worker.counts["tokens"] > 5, "it runs")
    two = await town.replica() if elsewhere else one
    await two.cancel(task_id, TENANT)
    await until(lambda: not worker.running, "the worker stopped", 1.0)
    check_cancelled(await reading)
    await slots_are_free(town)
    check_stream(await read_all(two.follow(await town.submit(seed=3, max_tokens=6), TENANT)), 3, 6)
    assert worker.counts["tokens"] < 4_000
    await until(lambda: len(one._house.relays) + len(two._house.relays) == 0, "no relay is left")
    await town.audit()


async def test_cancel_during_migration_and_after_the_end(town: Town) -> None:
    orchestrator = await town.replica()
    worker = await town.worker(slots=1, token_ms=5)
    task_id = await town.submit(seed=1, max_tokens=400, ignore_eos=True)
    reading = asyncio.create_task(read_all(orchestrator.follow(task_id, TENANT)))
    await until(lambda: worker.counts["tokens"] > 5, "it runs")
    await worker.die()

    async def waits() -> bool:
        return (await orchestrator.task(task_id, TENANT)).record.status == "queued"

    await until(waits, "it waits for another worker")
    await orchestrator.cancel(task_id, TENANT)
    check_cancelled(await reading)
    await worker.restart()
    ended = await town.submit(seed=4, max_tokens=5)
    await town.finished(ended)
    assert (await orchestrator.cancel(ended, TENANT)).record.status == "completed"
    check_stream(await read_all(orchestrator.follow(ended, TENANT)), 4, 5)
    await town.audit()


async def test_a_reader_that_leaves_cancels_only_what_asked_for_it(town: Town) -> None:
    orchestrator = await town.replica()
    worker = await town.worker(slots=4, token_ms=5)
    cancels = await town.submit(seed=1, max_tokens=4_000, ignore_eos=True, on_disconnect="cancel")
    goes_on = await town.submit(seed=2, max_tokens=60, ignore_eos=True)
    for task_id in (cancels, goes_on):
        async with contextlib.aclosing(orchestrator.follow(task_id, TENANT)) as stream:
            async for items in stream:
                if any(isinstance(item.event, StartedEvent) for item in items):
                    break
        await orchestrator.disconnected(task_id, TENANT)
    assert (await orchestrator.task(cancels, TENANT)).record.status == "cancelled"
    check = await read_all(orchestrator.follow(goes_on, TENANT))
    assert tokens_of(check) == expected(2, 60, ignore_eos=True)[0]
    await until(lambda: not worker.running, "both are over")
    await town.audit()


async def test_deadlines_end_what_waits_and_what_runs(town: Town) -> None:
    orchestrator = await town.replica()
    worker = await town.worker(slots=1, token_ms=5)
    runs = await town.submit(seed=1, max_tokens=4_000, ignore_eos=True, deadline_ms=900)
    await until(lambda: worker.counts["tokens"] > 0, "it runs")
    waits = await town.submit(seed=2, deadline_ms=300)
    for task_id in (waits, runs):
        items = await read_all(orchestrator.follow(task_id, TENANT))
        assert isinstance(items[-1].event, ErrorEvent)
        assert items[-1].event.code == "DEADLINE_MISSED"
    await until(lambda: not worker.running, "the worker stopped")
    await slots_are_free(town)
    await town.audit()


async def test_batch_yields_to_interactive_and_goes_on_from_its_token(town: Town) -> None:
    orchestrator = await town.replica()
    worker = await town.worker(slots=2, token_ms=5)
    batch = [
        await town.submit(seed=seed, max_tokens=500, ignore_eos=True, priority="batch", tenant=Tenant("bulk"))
        for seed in range(2)
    ]
    reading = [asyncio.create_task(read_all(orchestrator.follow(task_id, Tenant("bulk")))) for task_id in batch]
    await until(lambda: worker.counts["tokens"] > 20, "batch holds every slot")
    urgent = await town.submit(seed=7, max_tokens=40, ignore_eos=True)
    items = await read_all(orchestrator.follow(urgent, TENANT))
    assert tokens_of(items) == expected(7, 40, ignore_eos=True)[0]
    streams = await asyncio.gather(*reading)
    for seed, stream in enumerate(streams):
        assert tokens_of(stream) == expected(seed, 500, ignore_eos=True)[0]
    moves = [event for stream in streams for event in migrations_of(stream)]
    assert [event.reason for event in moves] == ["preempted"]
    assert orchestrator.observations.counters["preemptions", "scripted"] == 1
    assert worker.counts["preempts"] == 1
    assert town.recomputed() == 0
    await town.audit()


async def test_a_drained_worker_takes_nothing_and_moves_what_runs_at_the_deadline(town: Town) -> None:
    orchestrator = await town.replica()
    first = await town.worker("w1", slots=4, token_ms=10)
    task_id = await town.submit(seed=5, max_tokens=300, ignore_eos=True)
    reading = asyncio.create_task(read_all(orchestrator.follow(task_id, TENANT)))
    await until(lambda: first.counts["tokens"] > 5, "it runs")
    await orchestrator.drain_worker("w1", 300)
    await town.worker("w2", slots=4, token_ms=2)
    items = await reading
    assert tokens_of(items) == expected(5, 300, ignore_eos=True)[0]
    assert [(event.reason, event.worker_id) for event in migrations_of(items)] == [("drained", "w2")]
    assert first.counts["executes"] == 1
    await orchestrator.undrain_worker("w1")

    async def is_back() -> bool:
        return (await orchestrator.worker("w1")).state == "ready"

    await until(is_back, "it takes work again")
    await town.audit()


async def test_a_session_stays_with_its_worker_and_a_pin_waits_for_its_own(town: Town) -> None:
    orchestrator = await town.replica()
    for name in ("w1", "w2", "w3"):
        await town.worker(name, token_ms=1, pool=f"pool-{name}")

    async def where(**fields: object) -> str | None:
        task_id = await town.submit(max_tokens=4, **fields)
        await town.finished(task_id)
        return (await orchestrator.task(task_id, TENANT)).record.worker_id

    assert len({await where(session_id="chat") for _ in range(6)}) == 1
    assert {await where(placement={"mode": "pin", "pin_worker": "w2"}) for _ in range(3)} == {"w2"}
    assert await where(placement={"mode": "prefer", "prefer_pools": ["pool-w3"]}) == "w3"
    await town.workers[1].die()

    async def is_lost() -> bool:
        return (await orchestrator.worker("w2")).state == "lost"

    pinned = await town.submit(max_tokens=4, placement={"mode": "pin", "pin_worker": "w2"})

    async def waits() -> bool:
        return (await orchestrator.task(pinned, TENANT)).record.status == "queued"

    await until(is_lost, "w2 is lost")
    await until(waits, "the pinned task waits for it")
    await town.workers[1].restart()
    assert await town.finished(pinned) == "completed"
    await town.audit()


async def lease_loop(orchestrator: Orchestrator) -> asyncio.Task[None]:
    return next(task for task in orchestrator._tasks if task.get_name() == "lease")


async def test_two_owners_of_one_attempt_neither_double_nor_lose_a_token(town: Town) -> None:
    """A replica whose lease lapsed goes on relaying while another adopts: what a paused process does when it wakes."""
    one = await town.replica()
    worker = await town.worker(slots=4, token_ms=10)
    ids = [await town.submit(seed=seed, max_tokens=600, ignore_eos=True) for seed in range(4)]
    reading = [asyncio.create_task(read_all(one.follow(task_id, TENANT))) for task_id in ids]
    await until(lambda: worker.counts["tokens"] > 20, "they run")
    two = await town.replica()
    (await lease_loop(one)).cancel()
    await until(lambda: len(two._house.relays) == 4, "the other replica adopted them")
    both = worker.counts["tokens"]
    await until(lambda: worker.counts["tokens"] > both + 60, "both relay for a while")
    assert len(one._house.relays) == 4
    one._loop(one._house.replicas.run, "lease")
    await until(lambda: len(one._house.relays) == 0, "the first lets go")
    assert len(two._house.relays) == 4
    streams = await asyncio.gather(*reading, *(read_all(two.follow(task_id, TENANT)) for task_id in ids))
    for seed, items in enumerate(streams):
        assert tokens_of(items) == expected(seed % 4, 600, ignore_eos=True)[0]
        assert isinstance(items[-1].event, EndEvent)
        assert migrations_of(items) == []
    assert town.recomputed() == 0
    await town.audit()


async def test_fleet_feed_and_pools(town: Town) -> None:
    orchestrator = await town.replica()
    feed = orchestrator.fleet("0-0")
    await town.worker("w1", pool="rack-1")
    kinds: list[str] = []
    async with contextlib.aclosing(feed):
        async with asyncio.timeout(10):
            async for events in feed:
                kinds += [event.kind for event in events]
                if "worker_registered" in kinds:
                    break
    (pool,) = await orchestrator.pools()
    assert (pool.pool, pool.workers_ready, pool.models) == ("rack-1", 1, ("scripted",))
    (model,) = await orchestrator.models()
    assert (model.model, model.workers_ready) == ("scripted", 1)
