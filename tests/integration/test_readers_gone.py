"""Tasks that are to end with their reader, when the replica that it was read at goes: by SIGKILL, or in good order."""

from __future__ import annotations

import asyncio
import contextlib

from llorch_wire.events import EndEvent
from llorch_wire.tasks import TaskRequest
from orchestratord.runtime import Orchestrator
from tests.integration.house import TENANT, Town, read_all, tokens_of, until
from tests.support.scripted_tokens import expected

GRACE_S = 2.0
LONG = {"model": "scripted", "prompt": "hello", "max_tokens": 100_000, "ignore_eos": True}


async def streamed(one: Orchestrator, **changes: object) -> str:
    """A task whose client streams it here from the beginning."""
    request = TaskRequest.model_validate({**LONG, "on_disconnect": "cancel", **changes})
    submitted = await one.submit(request, tenant=TENANT, correlation_id="test", attended=True)
    return submitted.task_id


async def test_after_a_kill_what_nobody_comes_back_for_ends(town: Town) -> None:
    one, two = await town.replica(reader_grace_s=GRACE_S), await town.replica(reader_grace_s=GRACE_S)
    worker = await town.worker(slots=5, token_ms=15)
    left, back = await streamed(one), await streamed(one, max_tokens=400, seed=3)
    elsewhere = await streamed(one)
    goes_on, unread = await town.submit(at=one, **LONG), await town.submit(at=one, **LONG, on_disconnect="cancel")
    await until(lambda: len(worker.running) == 5, "all run")
    waits = await streamed(one)
    await two.attend(elsewhere, TENANT)
    async with contextlib.aclosing(two.follow(elsewhere, TENANT)) as reading:
        await anext(reading)
        before = await read_all(one.follow(back, TENANT), stop_after=20)
        await town.kill(one)
        cursor = [item.position for item in before if item.position][-1]
        after = await read_all(two.follow(back, TENANT, cursor))
        assert tokens_of(before) + tokens_of(after) == expected(3, 400, ignore_eos=True)[0]
        for task_id in (left, waits):
            assert await town.finished(task_id) == "cancelled"
        for task_id in (elsewhere, goes_on, unread):
            assert (await two.task(task_id, TENANT)).record.status == "running"
    assert town.recomputed() == 0
    await town.audit()


async def test_a_stop_ends_calls_that_cannot_come_back_and_nothing_else(town: Town) -> None:
    one = await town.replica(reader_grace_s=GRACE_S)
    worker = await town.worker(slots=4, token_ms=15)
    call, stream, left = await streamed(one), await streamed(one, max_tokens=200, seed=3), await streamed(one)
    one.serve([call])
    await until(lambda: len(worker.running) == 3, "all run")
    reading = asyncio.create_task(read_all(one.follow(stream, TENANT)))
    await until(lambda: one.observations.readers_active == 1, "it is read")
    await one.stop(2.0)
    assert len(worker.running) == 2
    before = await reading
    assert not any(isinstance(item.event, EndEvent) for item in before)
    await town.kill(one)
    two = await town.replica(reader_grace_s=GRACE_S)
    assert (await two.task(call, TENANT)).record.status == "cancelled"
    cursor = [item.position for item in before if item.position][-1]
    after = await read_all(two.follow(stream, TENANT, cursor))
    assert tokens_of(before) + tokens_of(after) == expected(3, 200, ignore_eos=True)[0]
    assert await town.finished(left) == "cancelled"
    await town.audit()


async def test_a_namesakes_readers_are_missed_as_well(town: Town) -> None:
    one = await town.replica(reader_grace_s=GRACE_S, replica_id="same")
    worker = await town.worker(slots=4, token_ms=15)
    left = await streamed(one)
    await until(lambda: len(worker.running) == 1, "it runs")
    await town.kill(one)
    await town.replica(reader_grace_s=GRACE_S, replica_id="same")
    assert await town.finished(left) == "cancelled"
    await until(lambda: not worker.running, "the generation has ended")
    await town.audit()
