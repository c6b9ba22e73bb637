"""Workers that register and heartbeat, and then don't do what workers do: no task spins on them, none is lost."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from llorch_wire.events import ErrorEvent
from llorch_wire.worker import ExecuteRequest
from orchestratord import settle
from tests.integration.house import TENANT, Town, read_all, tokens_of, until
from tests.support.scripted_engine import Generation
from tests.support.scripted_tokens import expected
from tests.support.scripted_worker import ScriptedWorker


async def state_of(town: Town, worker_id: str) -> str:
    return next(view.state for view in await town.any.workers() if view.worker_id == worker_id)


async def test_a_worker_that_heartbeats_but_can_not_be_reached_gets_no_more_work(town: Town) -> None:
    """Each heartbeat brought it back, and every third task waited for its time-out."""
    await town.replica()
    await town.worker("w1", slots=4)
    mute = await town.worker("w2", slots=4)
    mute.thawed.clear()  # its connections open and say nothing; its heartbeats go on

    async def is_lost() -> bool:
        await town.submit(max_tokens=1)
        return await state_of(town, "w2") == "lost"

    await until(is_lost, "it was found out")
    lease = next(view.lease_expires_at_ms for view in await town.any.workers() if view.worker_id == "w2")

    async def has_heartbeaten() -> bool:
        view = next(view for view in await town.any.workers() if view.worker_id == "w2")
        assert view.state == "lost"
        return view.lease_expires_at_ms > lease + 1000

    await until(has_heartbeaten, "it heartbeats for a second")
    ids = [await town.submit(max_tokens=3) for _ in range(12)]
    for task_id in ids:
        assert await town.finished(task_id) == "completed"
        assert (await town.any.task(task_id, None)).record.attempt == 1

    mute.thawed.set()

    async def is_back() -> bool:
        return await state_of(town, "w2") == "ready"

    await until(is_back, "it is back without registering again")
    pinned = await town.submit(max_tokens=3, placement={"mode": "pin", "pin_worker": "w2"})
    assert await town.finished(pinned) == "completed"
    await town.audit()


class WithoutExecute(ScriptedWorker):
    """Something else listens at its address."""

    async def _execute(self, request: web.Request) -> web.StreamResponse:
        self.counts["executes"] += 1
        return web.json_response({"detail": "Not Found"}, status=404)


class Yielding(ScriptedWorker):
    """Gives every generation up at once."""

    def begin(self, body: ExecuteRequest) -> Generation:
        generation = super().begin(body)
        self.give_up(generation)
        return generation


class Cancelling(ScriptedWorker):
    """Ends every generation unasked."""

    def begin(self, body: ExecuteRequest) -> Generation:
        generation = super().begin(body)
        self.end(generation, "CANCELLED")
        return generation


@pytest.mark.parametrize("kind", [WithoutExecute, Yielding, Cancelling])
async def test_a_worker_that_never_gives_a_token_ends_a_task_after_a_bounded_number_of_attempts(
    town: Town, kind: type[ScriptedWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hundred attempts a second, for ever, none of them a failure."""
    monkeypatch.setattr(settle, "MAX_IDLE_YIELDS", 2)
    orchestrator = await town.replica(max_failures=3)
    worker = await town.worker(kind=kind)
    task_id = await town.submit()
    async with asyncio.timeout(60):
        items = await read_all(orchestrator.follow(task_id, TENANT))
    last = items[-1].event
    assert isinstance(last, ErrorEvent) and last.code == "RETRIES_EXHAUSTED"
    assert worker.counts["executes"] <= 6
    await town.audit()


class CancellingAtFirst(ScriptedWorker):
    """Ends its first five generations unasked, as workers do that are told so after a failover."""

    def begin(self, body: ExecuteRequest) -> Generation:
        generation = super().begin(body)
        if self.counts["executes"] <= 5:
            self.end(generation, "CANCELLED")
        return generation


async def test_a_stop_that_nobody_asked_for_is_no_failure(town: Town) -> None:
    orchestrator = await town.replica(max_failures=2)
    await town.worker(kind=CancellingAtFirst)
    task_id = await town.submit(seed=3, ignore_eos=True)
    items = await read_all(orchestrator.follow(task_id, TENANT))
    assert tokens_of(items) == expected(3, 20, ignore_eos=True)[0]
    assert orchestrator.observations.counters["migrations", "worker_error"] == 5, "it wasn't preempted"
    await town.audit()
