"""The main job, undisturbed: queue, dispatch, relay, end; readers before, during and after."""

from __future__ import annotations

import asyncio

import pytest

from llorch_wire.errors import ApiError, ErrorCode
from llorch_wire.events import EndEvent, QueuedEvent, StartedEvent
from tests.integration.house import TENANT, Town, check_stream, read_all, tokens_of, until
from tests.support.scripted_tokens import expected


async def test_one_task_streams_from_queue_to_end(town: Town) -> None:
    orchestrator = await town.replica()
    worker = await town.worker()
    task_id = await town.submit(seed=7, max_tokens=30)
    items = await read_all(orchestrator.follow(task_id, TENANT))
    check_stream(items, 7, 30)
    view = await orchestrator.task(task_id, TENANT)
    assert view.record.status == "completed"
    assert view.text == "".join(token.t for token in expected(7, 30)[0])
    await until(lambda: worker.counts["acks"] == 1, "the worker may forget the end")
    await town.audit()


async def test_fifty_tasks_share_the_slots(town: Town) -> None:
    orchestrator = await town.replica()
    worker = await town.worker(slots=6, token_ms=2)
    ids = [await town.submit(seed=seed, max_tokens=12) for seed in range(50)]
    streams = await asyncio.gather(*(read_all(orchestrator.follow(task_id, TENANT)) for task_id in ids))
    for seed, items in enumerate(streams):
        check_stream(items, seed, 12)
    assert worker.counts["executes"] == 50
    assert town.recomputed() == 0
    await town.audit()


async def test_readers_with_a_cursor_get_exactly_the_rest(town: Town) -> None:
    orchestrator = await town.replica()
    await town.worker(token_ms=4)
    task_id = await town.submit(seed=11, max_tokens=40, ignore_eos=True)
    first = await read_all(orchestrator.follow(task_id, TENANT), stop_after=9)
    cursor = [item.position for item in first if item.position][-1]
    during, beside = await asyncio.gather(
        read_all(orchestrator.follow(task_id, TENANT, cursor)), read_all(orchestrator.follow(task_id, TENANT))
    )
    whole = [item for item in beside if item.position]
    assert [item for item in [*first, *during] if item.position] == whole
    for position in (whole[0].position, whole[1].position, whole[20].position):
        after = await read_all(orchestrator.follow(task_id, TENANT, position))
        assert after == whole[[item.position for item in whole].index(position) + 1 :]
    assert await read_all(orchestrator.follow(task_id, TENANT, whole[-1].position)) == []


async def test_cursors_that_the_log_cannot_honour(town: Town) -> None:
    orchestrator = await town.replica()
    await town.worker(token_ms=1)
    task_id = await town.submit(seed=3, max_tokens=5)
    await town.finished(task_id)
    for cursor, code in (
        ("9-1", ErrorCode.CONFLICT),
        ("1-400", ErrorCode.CONFLICT),
        ("banana", ErrorCode.INVALID_PARAMS),
    ):
        with pytest.raises(ApiError) as refused:
            await read_all(orchestrator.follow(task_id, TENANT, cursor))
        assert refused.value.code is code
    with pytest.raises(ApiError) as unknown:
        await read_all(orchestrator.follow("00000000-0000-4000-8000-000000000000", TENANT))
    assert unknown.value.code is ErrorCode.NOT_FOUND


async def test_a_task_waits_for_a_worker_and_tells_its_place(town: Town) -> None:
    orchestrator = await town.replica()
    worker = await town.worker(slots=1, token_ms=2)
    worker.freeze()
    blocked = [await town.submit(seed=seed, max_tokens=4) for seed in range(3)]
    reading = asyncio.create_task(read_all(orchestrator.follow(blocked[-1], TENANT)))

    async def waits() -> bool:
        return orchestrator.observations.readers_active == 1 and bool(await orchestrator.queue())

    await until(waits, "one reads and some wait")
    worker.thaw()
    items = await reading
    assert isinstance(items[0].event, QueuedEvent)
    assert isinstance(items[-1].event, EndEvent)
    assert any(isinstance(item.event, StartedEvent) for item in items)


async def test_two_replicas_serve_each_others_readers(town: Town) -> None:
    one, two = await town.replica(), await town.replica()
    await town.worker(slots=8, token_ms=3)
    ids = [await town.submit(at=(one, two)[seed % 2], seed=seed, max_tokens=25) for seed in range(16)]
    at_one = [read_all(one.follow(task_id, TENANT)) for task_id in ids]
    at_two = [read_all(two.follow(task_id, TENANT)) for task_id in ids]
    streams = await asyncio.gather(*at_one, *at_two)
    for seed, items in enumerate(streams):
        check_stream(items, seed % 16, 25)
    relayed = [replica.observations.counters["tokens_relayed", "scripted"] for replica in (one, two)]
    assert sum(relayed) == sum(len(expected(seed, 25)[0]) for seed in range(16))
    await town.audit()


async def test_idempotent_submission_and_unknown_model(town: Town) -> None:
    orchestrator = await town.replica()
    await town.worker()
    same = "11111111-1111-4111-8111-111111111111"
    assert await town.submit(task_id=same, seed=1) == await town.submit(task_id=same, seed=1)
    with pytest.raises(ApiError) as conflict:
        await town.submit(task_id=same, seed=2)
    assert conflict.value.code is ErrorCode.CONFLICT
    with pytest.raises(ApiError) as unknown:
        await town.submit(model="nope")
    assert unknown.value.code is ErrorCode.MODEL_NOT_FOUND
    assert "`scripted`" in unknown.value.message
    assert orchestrator.observations.counters["admissions", "conflict"] == 1


async def test_a_refused_prompt_fails_once_without_quoting_it(town: Town) -> None:
    orchestrator = await town.replica()
    worker = await town.worker()
    task_id = await town.submit(prompt="!refuse\nmy secret words")
    items = await read_all(orchestrator.follow(task_id, TENANT))
    assert getattr(items[-1].event, "code", None) == "CONTEXT_LENGTH_EXCEEDED"
    assert "secret" not in str(items[-1].event)
    assert worker.counts["executes"] == 0
    assert len(tokens_of(items)) == 0
    assert (await orchestrator.task(task_id, TENANT)).record.attempt == 1


async def test_a_prompt_of_megabytes(town: Town) -> None:
    orchestrator = await town.replica()
    await town.worker()
    task_id = await town.submit(seed=2, max_tokens=6, prompt="story " * 300_000)
    check_stream(await read_all(orchestrator.follow(task_id, TENANT)), 2, 6)


async def test_a_reader_that_falls_behind_is_cut_off_and_resumes(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestratord.follower.RING_ITEMS", 32)
    orchestrator = await town.replica()
    worker = await town.worker(token_ms=1)
    task_id = await town.submit(seed=2, max_tokens=400, ignore_eos=True)
    stream = orchestrator.follow(task_id, TENANT)
    items = [item for _ in range(3) for item in await anext(stream)]
    await until(lambda: worker.counts["tokens"] >= 300, "the stream ran away")
    items += await read_all(stream)
    assert orchestrator.observations.counters["readers_cut_off", "behind"] == 1
    assert not isinstance(items[-1].event, EndEvent)
    cursor = [item.position for item in items if item.position][-1]
    items += await read_all(orchestrator.follow(task_id, TENANT, cursor))
    assert tokens_of(items) == expected(2, 400, ignore_eos=True)[0]


async def test_the_end_tells_how_long_the_task_waited(town: Town) -> None:
    orchestrator = await town.replica()
    worker = await town.worker(slots=1, token_ms=10)
    await town.submit(seed=1, max_tokens=30, ignore_eos=True)
    waits = await town.submit(seed=2, max_tokens=30, ignore_eos=True)
    await until(lambda: worker.counts["executes"] == 2, "the second runs")
    await worker.restart()
    end = (await read_all(orchestrator.follow(waits, TENANT)))[-1].event
    record = (await orchestrator.task(waits, TENANT)).record
    assert isinstance(end, EndEvent) and record.started_at_ms is not None and record.attempt == 2
    assert end.queue_time_ms == record.started_at_ms - record.created_at_ms >= 200
