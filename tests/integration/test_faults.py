"""What dies, and what must hold then: no token lost, doubled, reordered or computed twice where the work lived on."""

from __future__ import annotations

import asyncio

from llorch_wire.events import EndEvent, ErrorEvent
from orchestratord.values import StreamItem
from tests.integration.house import (
    TENANT,
    Town,
    check_stream,
    migrations_of,
    read_all,
    tokens_of,
    until,
)
from tests.support.scripted_tokens import expected


def live(town: Town) -> int:
    """Generations that run somewhere now."""
    return sum(len(worker.running) for worker in town.workers)


async def test_fifty_tasks_survive_their_orchestrator_without_recomputing(town: Town) -> None:
    first = await town.replica()
    worker = await town.worker(slots=8, token_ms=6)
    ids = [await town.submit(seed=seed, max_tokens=30) for seed in range(50)]
    await until(lambda: worker.counts["tokens"] > 300 and live(town) >= 4, "generations are running")
    await town.kill(first)
    second = await town.replica()
    streams = await asyncio.gather(*(read_all(second.follow(task_id, TENANT)) for task_id in ids))
    for seed, items in enumerate(streams):
        check_stream(items, seed, 30)
        # What was claimed and never delivered begins anew, with nothing lost; everything else is re-attached.
        assert all(event.tokens_kept == 0 for event in migrations_of(items))
    assert second.observations.counters["adoptions", "reattached"] >= 4
    assert town.recomputed() == 0
    await town.audit()


async def test_a_reader_moves_to_the_replica_that_adopts(town: Town) -> None:
    one, two = await town.replica(), await town.replica()
    await town.worker(slots=32, token_ms=15)
    ids = [await town.submit(seed=seed, max_tokens=150, ignore_eos=True) for seed in range(8)]
    before = await asyncio.gather(*(read_all(one.follow(task_id, TENANT), stop_after=20) for task_id in ids))
    await town.kill(one)

    async def rest(task_id: str, items: list[StreamItem]) -> list[StreamItem]:
        cursor = [item.position for item in items if item.position][-1]
        return items + await read_all(two.follow(task_id, TENANT, cursor))

    streams = await asyncio.gather(*(rest(task_id, items) for task_id, items in zip(ids, before, strict=True)))
    for seed, items in enumerate(streams):
        assert [token.i for token in tokens_of(items)] == list(range(150))
        assert tokens_of(items) == expected(seed, 150, ignore_eos=True)[0]
        assert migrations_of(items) == []
    assert town.recomputed() == 0
    await town.audit()


async def test_a_graceful_stop_hands_over_at_once(town: Town) -> None:
    one = await town.replica()
    await town.worker(slots=8, token_ms=15)
    ids = [await town.submit(seed=seed, max_tokens=100, ignore_eos=True) for seed in range(6)]
    await until(lambda: live(town) == 6, "all run")
    two = await town.replica()
    reading = [asyncio.create_task(read_all(one.follow(task_id, TENANT))) for task_id in ids]
    await until(lambda: one.observations.readers_active == 6, "six read")
    await one.stop(2.0)
    cut = await asyncio.gather(*reading)
    assert not any(isinstance(items[-1].event, EndEvent) for items in cut if items)
    streams = await asyncio.gather(*(read_all(two.follow(task_id, TENANT)) for task_id in ids))
    for seed, items in enumerate(streams):
        assert tokens_of(items) == expected(seed, 100, ignore_eos=True)[0]
        assert migrations_of(items) == []
    assert town.recomputed() == 0
    await town.audit()


async def test_a_killed_worker_is_continued_elsewhere(town: Town) -> None:
    orchestrator = await town.replica()
    doomed = await town.worker("w1", slots=6, token_ms=8)
    ids = [await town.submit(seed=seed, max_tokens=80, ignore_eos=True) for seed in range(6)]
    await until(lambda: doomed.counts["tokens"] > 60, "tokens were generated")
    await town.worker("w2", slots=6, token_ms=4)
    reading = [asyncio.create_task(read_all(orchestrator.follow(task_id, TENANT))) for task_id in ids]
    await doomed.die()
    streams = await asyncio.gather(*reading)
    for seed, items in enumerate(streams):
        assert tokens_of(items) == expected(seed, 80, ignore_eos=True)[0]
        (moved,) = migrations_of(items)
        assert (moved.reason, moved.worker_id, moved.attempt) == ("worker_lost", "w2", 2)
        assert 0 < moved.tokens_kept < 80
    await town.audit()


async def test_a_stopped_worker_is_found_out_and_its_late_words_change_nothing(town: Town) -> None:
    orchestrator = await town.replica()
    stopped = await town.worker("w1", slots=4, token_ms=8)
    ids = [await town.submit(seed=seed, max_tokens=80, ignore_eos=True) for seed in range(4)]
    await until(lambda: stopped.counts["tokens"] > 40, "tokens were generated")
    await town.worker("w2", slots=4, token_ms=8)
    reading = [asyncio.create_task(read_all(orchestrator.follow(task_id, TENANT))) for task_id in ids]
    stopped.freeze()
    await until(lambda: len(town.workers[1].running) == 4, "they go on at the other worker")
    stopped.thaw()
    streams = await asyncio.gather(*reading)
    for seed, items in enumerate(streams):
        assert tokens_of(items) == expected(seed, 80, ignore_eos=True)[0]
        assert [event.reason for event in migrations_of(items)] == ["worker_lost"]
    await until(lambda: not stopped.running, "the zombie's generations are ended by its heartbeat's orders")
    await town.audit()


async def test_a_restarted_worker_at_the_same_address(town: Town) -> None:
    orchestrator = await town.replica()
    worker = await town.worker("w1", slots=4, token_ms=8)
    ids = [await town.submit(seed=seed, max_tokens=60, ignore_eos=True) for seed in range(4)]
    await until(lambda: worker.counts["tokens"] > 40, "tokens were generated")
    reading = [asyncio.create_task(read_all(orchestrator.follow(task_id, TENANT))) for task_id in ids]
    await worker.restart()
    for seed, items in enumerate(await asyncio.gather(*reading)):
        assert tokens_of(items) == expected(seed, 60, ignore_eos=True)[0]
        assert len(migrations_of(items)) == 1
    await town.audit()


async def test_redis_dies_and_comes_back_in_mid_stream(town: Town) -> None:
    orchestrator = await town.replica()
    worker = await town.worker(slots=6, token_ms=10)
    ids = [await town.submit(seed=seed, max_tokens=100, ignore_eos=True) for seed in range(6)]
    reading = [asyncio.create_task(read_all(orchestrator.follow(task_id, TENANT))) for task_id in ids]
    await until(lambda: worker.counts["tokens"] > 100, "tokens were generated")
    town.redis.kill()
    await until(lambda: worker.counts["tokens"] > 350, "the worker goes on meanwhile")
    town.redis.start()
    results = await asyncio.gather(*reading, return_exceptions=True)
    for seed, (task_id, items) in enumerate(zip(ids, results, strict=True)):
        if isinstance(items, BaseException):  # a reader that was reading its history just then may resume
            items = await read_all(orchestrator.follow(task_id, TENANT))
        assert tokens_of(items) == expected(seed, 100, ignore_eos=True)[0]
        assert isinstance(items[-1].event, EndEvent)
    assert town.recomputed() == 0
    await town.audit()


async def test_a_task_that_kills_workers_is_stopped_and_says_so(town: Town) -> None:
    orchestrator = await town.replica()
    await town.worker("w1", token_ms=2)
    await town.worker("w2", token_ms=2)
    task_id = await town.submit(prompt="!exit 0\nhush")
    (last,) = (await read_all(orchestrator.follow(task_id, TENANT)))[-1:]
    assert isinstance(last.event, ErrorEvent)
    assert last.event.code == "RETRIES_EXHAUSTED"
    assert "hush" not in last.event.message
    record = (await orchestrator.task(task_id, TENANT)).record
    assert (record.status, record.failures) == ("failed", 4)
    healthy = await town.submit(seed=5, max_tokens=10)
    check_stream(await read_all(orchestrator.follow(healthy, TENANT)), 5, 10)
    await town.audit()


async def test_retriable_and_final_errors_of_a_worker(town: Town) -> None:
    orchestrator = await town.replica()
    await town.worker("w1", token_ms=2)
    retried = await town.submit(prompt="!error VRAM_OOM 3", seed=4, max_tokens=9, ignore_eos=True)
    items = await read_all(orchestrator.follow(retried, TENANT))
    assert tokens_of(items) == expected(4, 9, ignore_eos=True)[0]
    assert {event.reason for event in migrations_of(items)} == {"worker_error"}
    final = await town.submit(prompt="!error INVALID_PARAMS 2", seed=4, max_tokens=9)
    items = await read_all(orchestrator.follow(final, TENANT))
    assert isinstance(items[-1].event, ErrorEvent)
    assert items[-1].event.code == "INVALID_PARAMS"
    assert (await orchestrator.task(final, TENANT)).record.attempt == 1
    await town.audit()


async def test_a_stream_that_falls_silent_at_a_healthy_worker_moves_on(town: Town) -> None:
    orchestrator = await town.replica()
    worker = await town.worker("w1", slots=2, token_ms=3)
    task_id = await town.submit(seed=9, max_tokens=30, ignore_eos=True)
    reading = asyncio.create_task(read_all(orchestrator.follow(task_id, TENANT)))
    await until(lambda: worker.counts["tokens"] > 5, "tokens were generated")
    for generation in worker.running:
        generation.mute = True
    items = await reading
    assert tokens_of(items) == expected(9, 30, ignore_eos=True)[0]
    await town.audit()


async def test_no_worker_left_the_task_waits_in_its_place(town: Town) -> None:
    orchestrator = await town.replica()
    worker = await town.worker("w1", slots=2, token_ms=5)
    task_id = await town.submit(seed=9, max_tokens=60, ignore_eos=True)
    reading = asyncio.create_task(read_all(orchestrator.follow(task_id, TENANT)))
    await until(lambda: worker.counts["tokens"] > 5, "tokens were generated")
    await worker.die()

    async def waits() -> bool:
        return (await orchestrator.task(task_id, TENANT)).record.status == "queued"

    await until(waits, "it waits")
    later = await town.submit(seed=10, max_tokens=5)
    worker.slots = 1
    await worker.restart()
    items = await reading
    assert tokens_of(items) == expected(9, 60, ignore_eos=True)[0]
    check_stream(await read_all(orchestrator.follow(later, TENANT)), 10, 5)
    await town.audit()


async def test_a_namesake_takes_its_predecessors_tasks_up_at_once(town: Town) -> None:
    first = await town.replica(replica_id="always-this-one")
    worker = await town.worker(slots=4, token_ms=10)
    ids = [await town.submit(seed=seed, max_tokens=120, ignore_eos=True) for seed in range(4)]
    await until(lambda: worker.counts["tokens"] > 40, "generations are running")
    await town.kill(first)
    second = await town.replica(replica_id="always-this-one")
    for seed, task_id in enumerate(ids):
        items = await read_all(second.follow(task_id, TENANT))
        assert tokens_of(items) == expected(seed, 120, ignore_eos=True)[0]
        assert migrations_of(items) == []
    assert town.recomputed() == 0
    await town.audit()
