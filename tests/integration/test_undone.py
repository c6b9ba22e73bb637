"""A failover of Sentinel undoes the last writes. What is left must still lead every surviving task to a whole end."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
import redis as redis_py

from llorch_wire.errors import ApiError
from llorch_wire.events import EndEvent
from orchestratord import followers
from tests.integration.house import TENANT, Town, read_all, tokens_of, until
from tests.support.scripted_tokens import expected


def snapshot(town: Town) -> dict[bytes, bytes]:
    """Everything in Redis, at one instant."""
    with contextlib.closing(redis_py.Redis.from_url(town.redis.url)) as client:
        names = client.keys("*")
        pipe = client.pipeline()
        for name in names:
            pipe.dump(name)
        return {name: value for name, value in zip(names, pipe.execute(), strict=True) if value is not None}


def undo(town: Town, saved: dict[bytes, bytes]) -> None:
    """Redis is as it was then, at once."""
    with contextlib.closing(redis_py.Redis.from_url(town.redis.url)) as client:
        pipe = client.pipeline()
        pipe.flushall()
        for name, value in saved.items():
            pipe.restore(name, 0, value)
        pipe.execute()


async def test_tokens_that_were_undone_are_read_again(town: Town) -> None:
    orchestrator = await town.replica()
    worker = await town.worker(slots=4, token_ms=10)
    ids = [await town.submit(seed=seed, max_tokens=120, ignore_eos=True) for seed in range(4)]
    reading = [asyncio.create_task(read_all(orchestrator.follow(task_id, TENANT))) for task_id in ids]
    await until(lambda: worker.counts["tokens"] > 80, "tokens came")
    saved = snapshot(town)
    await until(lambda: worker.counts["tokens"] > 240, "more tokens came")
    undo(town, saved)
    for seed, items in enumerate(await asyncio.gather(*reading)):
        assert tokens_of(items) == expected(seed, 120, ignore_eos=True)[0]
    for seed, task_id in enumerate(ids):
        items = await read_all(orchestrator.follow(task_id, TENANT))
        assert tokens_of(items) == expected(seed, 120, ignore_eos=True)[0], "the log is whole"
    assert town.recomputed() == 0
    await town.audit()


async def test_an_end_never_stands_after_a_log_that_lacks_its_tokens(town: Town) -> None:
    """The last tokens were undone between their append and the end: the task was completed with a text without them."""
    orchestrator = await town.replica()
    await town.worker(slots=1, token_ms=10)
    store = town.replicas[0].store
    saved: dict[bytes, bytes] = {}
    complete = store.complete

    async def late(*args: Any, **options: Any) -> bool:
        if not tried:
            undo(town, saved)
        tried.append(1)
        return await complete(*args, **options)

    tried: list[int] = []
    store.complete = late
    task_id = await town.submit(seed=3, max_tokens=40, ignore_eos=True)
    reading = asyncio.create_task(read_all(orchestrator.follow(task_id, TENANT)))
    await until(lambda: town.workers[0].counts["tokens"] >= 20, "tokens came")
    saved |= snapshot(town)
    items = await reading
    assert tokens_of(items) == expected(3, 40, ignore_eos=True)[0]
    assert isinstance(items[-1].event, EndEvent)
    assert tokens_of(await read_all(orchestrator.follow(task_id, TENANT))) == expected(3, 40, ignore_eos=True)[0]
    assert len(tried) == 2
    await town.audit()


async def test_a_reader_beyond_an_end_that_history_now_has_is_told(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower in attempt 2 waited for ever once its task had been taken back to attempt 1 and cancelled there."""
    monkeypatch.setattr(followers, "DOUBT_S", 0.5)
    orchestrator = await town.replica()
    doomed = await town.worker("w1", slots=2, token_ms=10)
    ids = [await town.submit(seed=seed, max_tokens=2_000, ignore_eos=True) for seed in range(2)]
    reading = [asyncio.create_task(read_all(orchestrator.follow(task_id, TENANT))) for task_id in ids]
    before = snapshot(town)
    del before[f"{{o}}:task:{ids[1]}".encode()], before[f"{{o}}:log:{ids[1]}".encode()]
    await until(lambda: doomed.counts["tokens"] > 40, "tokens came")
    survivor = await town.worker("w2", slots=2, token_ms=10)
    await doomed.die()
    await until(lambda: survivor.counts["tokens"] > 40, "they go on in attempt 2")
    undo(town, before)
    await orchestrator.cancel(ids[0], TENANT)
    undone, gone = await asyncio.gather(*reading)
    assert not any(isinstance(items[-1].event, EndEvent) for items in (undone, gone))
    with pytest.raises(ApiError) as caught:
        await read_all(orchestrator.follow(ids[0], TENANT, undone[-1].position))
    assert caught.value.code == "CONFLICT"
    with pytest.raises(ApiError) as caught:
        await read_all(orchestrator.follow(ids[1], TENANT, gone[-1].position))
    assert caught.value.code == "NOT_FOUND"


async def test_a_reader_that_comes_in_the_moment_of_the_failover_gets_no_hole(town: Town) -> None:
    """The log's end was read before the failover and the log after it: the first tokens were left out."""
    orchestrator = await town.replica()
    worker = await town.worker(slots=1, token_ms=20)
    store = town.replicas[0].store
    read_log, saved = store.read_log, snapshot(town)

    async def late(*args: Any, **options: Any) -> Any:
        if saved:
            undo(town, saved)
            saved.clear()
        return await read_log(*args, **options)

    task_id = await town.submit(seed=3, max_tokens=60, ignore_eos=True)
    saved.clear()
    saved |= snapshot(town)
    await until(lambda: worker.counts["tokens"] >= 10, "tokens came")
    store.read_log = late
    items = await read_all(orchestrator.follow(task_id, TENANT))
    while not isinstance(items[-1].event, EndEvent):
        cursor = next((item.position for item in reversed(items) if item.position), None)
        items += await read_all(orchestrator.follow(task_id, TENANT, cursor))
    assert tokens_of(items) == expected(3, 60, ignore_eos=True)[0]
    await town.audit()


async def test_a_reader_ahead_of_an_undone_log_gets_no_token_twice(town: Town) -> None:
    """Where reader and follower met at the start of the next attempt, tokens that only the reader had came again."""
    orchestrator = await town.replica()
    doomed = await town.worker("w1", slots=1, token_ms=10)
    task_id = await town.submit(seed=3, max_tokens=150, ignore_eos=True)
    reading = asyncio.create_task(read_all(orchestrator.follow(task_id, TENANT), stop_after=102))
    await town.worker("w2", slots=1, token_ms=10)
    saved = snapshot(town)
    items = await reading
    await doomed.die()
    undo(town, saved)
    items += await read_all(orchestrator.follow(task_id, TENANT, items[-1].position))
    assert tokens_of(items) == expected(3, 150, ignore_eos=True)[0]
    await town.audit()


async def test_a_reader_that_came_another_way_is_told_so(town: Town) -> None:
    """Its last id was in an attempt that was undone; the log has its next token in an earlier one."""
    orchestrator = await town.replica()
    first = await town.worker("w1", slots=1, token_ms=10)
    await town.worker("w2", slots=1, token_ms=10)
    task_id = await town.submit(seed=3, max_tokens=100, ignore_eos=True)
    await until(lambda: first.counts["tokens"] + town.workers[1].counts["tokens"] >= 60, "tokens came")
    runs_at = next(worker for worker in town.workers if worker.running)
    await runs_at.die()
    items = await read_all(orchestrator.follow(task_id, TENANT))
    assert items[-1].position is not None and items[-1].position.startswith("2-")
    for way in ("2-30", "2-59"):  # as a client would hold it, had attempt 2 begun earlier in another history
        with pytest.raises(ApiError) as caught:
            await read_all(orchestrator.follow(task_id, TENANT, way))
        assert caught.value.code == "CONFLICT"


async def test_an_attempt_number_that_is_handed_out_twice_is_no_failure(town: Town) -> None:
    """The worker still runs the undone attempt 2, which began where the log no longer is: the new one replaces it."""
    orchestrator = await town.replica()
    worker = await town.worker(slots=1, token_ms=10)
    task_id = await town.submit(seed=3, max_tokens=300, ignore_eos=True, priority="batch")
    reading = asyncio.create_task(read_all(orchestrator.follow(task_id, TENANT)))
    await until(lambda: worker.counts["tokens"] >= 20, "tokens came")
    saved = snapshot(town)
    await until(lambda: worker.counts["tokens"] >= 60, "more tokens came")
    await town.finished(await town.submit(seed=1, max_tokens=5, ignore_eos=True))  # preempts
    await until(lambda: any(g.request.attempt == 2 and g.next_index > g.first_index for g in worker.running), "resumed")
    undo(town, saved)
    assert tokens_of(await reading) == expected(3, 300, ignore_eos=True)[0]
    begun = [(attempt, first) for ran, attempt, first, _ in worker.computed_ranges() if ran == task_id]
    assert [attempt for attempt, _ in begun[:3]] == [1, 2, 2] and begun[2][1] < begun[1][1], begun
    assert orchestrator.observations.counters["migrations", "worker_error"] == 0
    await town.audit()
