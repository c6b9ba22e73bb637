"""Registration and heartbeats against small HTTP servers that play orchestratord's replicas."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest_asyncio
from aiohttp import web

from llorch_wire.worker import Heartbeat, Orders, WorkerRegistration
from worker.registration import Registration


class Replica:
    """One replica: knows workers that registered with the shared set, answers as it is told."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.fleet, self.name = fleet, name
        self.status = 200
        self.beats: list[dict[str, Any]] = []
        self.registrations: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.runner: web.AppRunner | None = None
        self.url = ""

    async def start(self, port: int = 0) -> None:
        app = web.Application()
        app.router.add_post("/v2/workers/register", self.register)
        app.router.add_post("/v2/workers/{id}/heartbeat", self.heartbeat)
        app.router.add_delete("/v2/workers/{id}", self.remove)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self.runner is not None:
            await self.runner.cleanup()
            self.runner = None

    def reply(self) -> dict[str, Any]:
        urls = [replica.url for replica in self.fleet.replicas]
        return {"lease_ms": 4000, "heartbeat_ms": 50, "replicas": urls}

    async def register(self, request: web.Request) -> web.Response:
        self.keys.add(request.headers.get("Authorization"))
        if self.status != 200:
            return web.json_response({}, status=self.status)
        body = json.loads(await request.read())
        self.registrations.append(body)
        self.fleet.known[body["worker_id"]] = body["instance_id"]
        return web.json_response(self.reply())

    async def heartbeat(self, request: web.Request) -> web.Response:
        if self.status != 200:
            return web.json_response({}, status=self.status)
        body = json.loads(await request.read())
        if self.fleet.known.get(request.match_info["id"]) != body["instance_id"]:
            return web.json_response({}, status=404)
        self.beats.append(body)
        return web.json_response({**self.reply(), "orders": self.fleet.orders})

    async def remove(self, request: web.Request) -> web.Response:
        self.fleet.known.pop(request.match_info["id"], None)
        return web.json_response({})


class Fleet:
    def __init__(self) -> None:
        self.replicas: list[Replica] = []
        self.known: dict[str, str] = {}
        self.orders: dict[str, Any] = {"drain": False, "cancel": []}

    async def add(self) -> Replica:
        replica = Replica(self, str(len(self.replicas)))
        await replica.start()
        self.replicas.append(replica)
        return replica


class Subject:
    """A worker as the registration sees it."""

    worker_id = "w1"

    def __init__(self) -> None:
        self.instance: str | None = "i1"
        self.beat_instance = "i1"
        self.status = "ready"
        self.orders: list[Orders] = []

    def registration(self) -> WorkerRegistration | None:
        if self.instance is None:
            return None
        return WorkerRegistration(
            worker_id="w1",
            instance_id=self.instance,
            url="http://127.0.0.1:1",
            model="demo",
            model_digest="d",
            dtype="float32",
            device="cpu",
            context_length=10,
            slots_total=1,
        )

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(instance_id=self.beat_instance, status=self.status)

    def obey(self, orders: Orders) -> None:
        self.orders.append(orders)


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[Fleet]:
    made = Fleet()
    yield made
    for replica in made.replicas:
        await replica.stop()


@pytest_asyncio.fixture
async def running() -> AsyncIterator[Callable[[Registration], None]]:
    tasks: list[asyncio.Task[None]] = []
    yield lambda registration: tasks.append(asyncio.create_task(registration.run()))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


Run = Callable[[Registration], None]


async def test_registers_and_beats_with_its_key(fleet: Fleet, running: Run) -> None:
    replica, subject = await fleet.add(), Subject()
    running(Registration([replica.url], subject, key="correct-horse"))
    await until(lambda: len(replica.beats) >= 3)
    assert len(replica.registrations) == 1
    assert replica.keys == {"Bearer correct-horse"}
    assert subject.orders[0] == Orders()


async def test_registers_again_after_404_and_for_a_new_instance(fleet: Fleet, running: Run) -> None:
    replica, subject = await fleet.add(), Subject()
    registration = Registration([replica.url], subject, key=None)
    running(registration)
    await until(lambda: len(replica.beats) >= 1)
    fleet.known.clear()
    await until(lambda: len(replica.registrations) == 2)
    subject.instance = subject.beat_instance = "i2"
    registration.wake()
    await until(lambda: fleet.known == {"w1": "i2"})


async def test_rotates_to_a_replica_it_was_told_of(fleet: Fleet, running: Run) -> None:
    first, second = await fleet.add(), await fleet.add()
    running(Registration([first.url], Subject(), key=None))
    await until(lambda: len(first.beats) >= 2)
    assert second.beats == []
    await first.stop()
    await until(lambda: len(second.beats) >= 2)
    assert second.registrations == [], "the other replica knows it from the shared store"


async def test_survives_an_orchestrator_that_is_down_for_long(fleet: Fleet, running: Run) -> None:
    replica = await fleet.add()
    port = int(replica.url.rpartition(":")[2])
    await replica.stop()
    running(Registration([replica.url], Subject(), key=None))
    await asyncio.sleep(0)
    await replica.start(port)
    await until(lambda: len(replica.beats) >= 1)
    replica.status = 503
    await replica.stop()
    replica.status = 200
    seen = len(replica.beats)
    await replica.start(port)
    await until(lambda: len(replica.beats) > seen)


async def test_errors_of_one_replica_lead_to_the_next(fleet: Fleet, running: Run) -> None:
    bad, good = await fleet.add(), await fleet.add()
    bad.status = 500
    running(Registration([bad.url, good.url], Subject(), key=None))
    await until(lambda: len(good.beats) >= 1)


async def test_a_change_is_told_at_once(fleet: Fleet, running: Run) -> None:
    replica, subject = await fleet.add(), Subject()
    registration = Registration([replica.url], subject, key=None)
    running(registration)
    await until(lambda: len(replica.beats) >= 1)
    registration._interval_s = 600.0  # only a wake-up can bring the next one
    await until(lambda: registration._wake.is_set() is False)
    # The engine died: its successor's id isn't registered yet, the old instance is reported as failed.
    subject.instance, subject.beat_instance, subject.status = None, "i2", "failed"
    registration.wake()
    await until(lambda: replica.beats[-1]["status"] == "failed")
    assert replica.beats[-1]["instance_id"] == "i1"


async def test_orders_are_obeyed(fleet: Fleet, running: Run) -> None:
    replica, subject = await fleet.add(), Subject()
    fleet.orders = {"drain": True, "cancel": [{"task_id": "t", "attempt": 2}]}
    running(Registration([replica.url], subject, key=None))
    await until(lambda: len(subject.orders) >= 1)
    assert subject.orders[0].drain
    assert [(ref.task_id, ref.attempt) for ref in subject.orders[0].cancel] == [("t", 2)]


async def test_goodbye(fleet: Fleet) -> None:
    replica, subject = await fleet.add(), Subject()
    registration = Registration([replica.url], subject, key=None)
    await registration.say_goodbye()
    assert replica.beats == []
    task = asyncio.create_task(registration.run())
    await until(lambda: len(replica.beats) >= 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    subject.status = "draining"
    await registration.say_goodbye()
    assert replica.beats[-1]["status"] == "draining"
    assert fleet.known == {"w1": "i1"}
    registration.leave_at_end = True
    await registration.say_goodbye()
    assert fleet.known == {}


async def test_nonsense_answers_are_no_trouble(fleet: Fleet, running: Run) -> None:
    async def nonsense(_request: web.Request) -> web.Response:
        return web.Response(body=b"<html>")

    app = web.Application()
    app.router.add_post("/{path:.*}", nonsense)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    replica = await fleet.add()
    try:
        running(Registration([f"http://127.0.0.1:{runner.addresses[0][1]}", replica.url], Subject(), key=None))
        await until(lambda: len(replica.beats) >= 1)
    finally:
        await runner.cleanup()
