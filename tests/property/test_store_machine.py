"""Thousands of interleavings of every transition, on the real Lua scripts, against the model of model.py.

After each step the audit must be clean and the store must say what the model says. `LLORCH_PROPERTY_EXAMPLES` sets how
many runs there are on the real server (a third of them on fakeredis, which is slow), `LLORCH_PROPERTY_STEPS` how long
each is. Rules mostly pick a task for which
something happens (`Pick`), and now and then any task, or one that doesn't exist.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from typing import Any, ClassVar, TypeVar

import fakeredis
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llorch_wire.events import EndEvent, ErrorEvent
from orchestratord.store.connection import Connection
from orchestratord.store.errors import LogGapError
from orchestratord.store.store import Store
from orchestratord.store.types import Admitted, Assignment, PlacementSpec, QueueLimits
from tests.contract.values import LEASE_MS, LONG_MS, MODEL, T, batch, heartbeat, new_task, registration
from tests.property.model import Model, State, Task
from tests.support.redis_server import redis_server

EXAMPLES = int(os.environ.get("LLORCH_PROPERTY_EXAMPLES", "25"))
STEPS = int(os.environ.get("LLORCH_PROPERTY_STEPS", "30"))
REPLICA_LEASE_MS = 2000
NAMES = st.sampled_from([f"t{number}" for number in range(12)])
PICKS = st.tuples(st.integers(0, 7), st.sampled_from([False] * 4 + [True]), st.sampled_from([False] * 7 + [True]))
"""Which of the tasks in question; an older attempt of it; any task instead."""
WORKERS = st.sampled_from(["w1", "w2", "w3"])
REPLICAS = st.sampled_from(["r1", "r2", "r3"])
INSTANCES = st.sampled_from(["i1", "i2"])
R = TypeVar("R")


class StoreMachine(RuleBasedStateMachine):
    url: ClassVar[str | None] = None
    """The real server's; None is fakeredis."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.store = self.run(self._connect())
        self.model = Model(LEASE_MS, REPLICA_LEASE_MS, T)

    async def _connect(self) -> Store:
        if self.url is None:
            return Store(Connection(fakeredis.FakeAsyncRedis(), "fakeredis", 20.0))
        store = await Store.connect(self.url, timeout_s=20.0)
        await store._connection.client.flushall()
        return store

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.run(self.store.aclose())
        self.runner.close()

    @property
    def now(self) -> int:
        return self.model.now

    def pick(self, pick: tuple[int, bool, bool], *states: str) -> tuple[str, int]:
        """A task in one of the states, and its attempt: usually the current one."""
        index, older, anything = pick
        tasks = [task for task in self.model.tasks.values() if anything or task.state in states]
        if not tasks:
            return "t0", 1
        task = tasks[index % len(tasks)]
        return task.task_id, max(1, task.attempt - older)

    def any_task(self, *states: str) -> bool:
        return any(task.state in states for task in self.model.tasks.values())

    @initialize()
    def a_house_at_work(self) -> None:
        for worker_id, pool in (("w1", "near"), ("w2", "far")):
            self.register_worker(worker_id, "i1", pool, "d1", 2)
        for replica in ("r1", "r2", "r3"):
            self.replica_heartbeat(replica)
        for number, (tenant, priority) in enumerate([("acme", "interactive"), ("rival", "batch"), ("acme", "batch")]):
            self.admit(f"t{number}", tenant, priority, None, (None, 5000, None)[number], None, 100, False)
        self.claim([((0, False, False), "w1", 16), ((0, False, False), "w2", 16)], "r1", False)
        self.append((0, False, False), 0, 2)
        self.requeue((0, False, False), "preempted", False, 0)
        self.claim([((0, False, False), "w1", 16)], "r2", False)

    # --- rules

    @rule(by=st.sampled_from([1, 1, 400, 400, 1100, 2500, 4100]), who_lives=st.sampled_from([3, 3, 3, 1, 2, 0]))
    def time_passes(self, by: int, who_lives: int) -> None:
        """Workers heartbeat (with what they run) and replicas too, if they live."""
        self.model.now += by
        for worker in list(self.model.workers.values()):
            if who_lives & 1 and not worker.lost:
                runs = [(task.task_id, task.attempt) for task in self.model.running_on(worker.worker_id)]
                self.heartbeat(worker.worker_id, worker.instance, runs)
        for replica in list(self.model.replicas):
            if who_lives & 2 and self.model.replicas[replica] > self.now - by:
                self.replica_heartbeat(replica)

    @rule(
        name=NAMES,
        tenant=st.sampled_from(["acme", "rival"]),
        priority=st.sampled_from(["interactive", "batch"]),
        pool=st.sampled_from([None, None, "near", "far"]),
        lifetime=st.sampled_from([None, None, 900, 5000]),
        key=st.sampled_from([None, None, "k1", "k2"]),
        per_model=st.sampled_from([100, 100, 3]),
        drop=st.booleans(),
    )
    def admit(
        self,
        name: str,
        tenant: str,
        priority: Any,
        pool: str | None,
        lifetime: int | None,
        key: str | None,
        per_model: int,
        drop: bool,
    ) -> None:
        deadline = None if lifetime is None else self.now + lifetime
        weight = 2.0 if tenant == "rival" else 1.0
        expected = self.model.admit(
            Task(name, tenant, weight, priority, pool, deadline, key, 10, 0), per_model=per_model, drop=drop
        )
        task = new_task(
            name,
            tenant=tenant,
            weight=weight,
            priority=priority,
            placement=PlacementSpec(mode="pin", pin_pool=pool) if pool else PlacementSpec(),
            deadline_at_ms=deadline,
            idempotency_key=key,
            session_id="s",
            prefix_hashes=("p1", name),
        )
        limits = QueueLimits(per_model=per_model, policy="drop_oldest_batch" if drop else "reject")
        outcome = self.run(self.store.admit(task, limits, now_ms=self.now))
        if isinstance(outcome, Admitted):
            assert expected == ("created" if outcome.created else "known")
            assert outcome.task_id == name
            assert outcome.queue_position == (self.model.position(self.model.tasks[name]) or 0)
        else:
            assert outcome.reason == expected

    @rule(
        worker_id=WORKERS,
        instance=INSTANCES,
        pool=st.sampled_from(["near", "far"]),
        digest=st.sampled_from(["d1", "d2"]),
        slots=st.integers(1, 3),
    )
    def register_worker(self, worker_id: str, instance: str, pool: str, digest: str, slots: int) -> None:
        self.model.register(worker_id, instance, pool, digest, slots)
        worker = registration(worker_id, instance, pool=pool, model_digest=digest, slots_total=slots)
        self.run(self.store.register_worker(worker, LEASE_MS, now_ms=self.now))

    @rule(
        worker_id=WORKERS,
        instance=INSTANCES,
        runs=st.lists(st.tuples(NAMES, st.integers(1, 3)), max_size=3, unique=True),
    )
    def heartbeat(self, worker_id: str, instance: str, runs: list[tuple[str, int]]) -> None:
        expected = self.model.heartbeat(worker_id, instance, runs)
        beat = heartbeat(instance, running=tuple(runs))
        outcome = self.run(self.store.heartbeat(worker_id, beat, LEASE_MS, now_ms=self.now))
        assert (outcome.known, outcome.drain, list(outcome.cancel)) == expected

    @precondition(lambda self: self.any_task("queued"))
    @rule(
        picks=st.lists(st.tuples(PICKS, WORKERS, st.sampled_from([0, 16, 64])), min_size=1, max_size=4),
        replica=REPLICAS,
        stale=st.sampled_from([False] * 5 + [True]),
    )
    def claim(self, picks: list[tuple[Any, str, int]], replica: str, stale: bool) -> None:
        pairs = [(self.pick(pick, "queued")[0], worker_id, charge) for pick, worker_id, charge in picks]
        version = self.run(self.store.snapshot(MODEL, now_ms=self.now)).version - stale
        assignments = [Assignment(task_id=name, worker_id=worker, charge=charge) for name, worker, charge in pairs]
        claimed = self.run(self.store.claim(replica, MODEL, version, assignments, now_ms=self.now))
        expected = [pair for pair in pairs if not stale and self.model.claim(pair[0], pair[1], replica, pair[2])]
        assert [(one.task.task_id, one.task.worker_id) for one in claimed] == [pair[:2] for pair in expected]
        for one in claimed:
            task = self.model.tasks[one.task.task_id]
            assert (one.task.attempt, one.task.tokens_logged) == (task.attempt, task.tokens)
            assert one.resume_token_ids == tuple(range(1000, 1000 + task.tokens))

    @precondition(lambda self: self.any_task("running"))
    @rule(which=PICKS, offset=st.sampled_from([0, 0, 0, -2, -1, 1]), count=st.integers(1, 3))
    def append(self, which: Any, offset: int, count: int) -> None:
        name, attempt = self.pick(which, "running")
        task = self.model.tasks.get(name)
        first = max(0, (task.tokens if task else 0) + offset)
        expected = self.model.append(name, attempt, first, count)
        try:
            (outcome,) = self.run(self.store.append([batch(name, attempt, first, count)]))
        except LogGapError:
            assert expected == "gap"
        else:
            assert outcome == expected

    @precondition(lambda self: self.any_task("running"))
    @rule(which=PICKS, failed=st.booleans())
    def complete(self, which: Any, failed: bool) -> None:
        name, attempt = self.pick(which, "running")
        state: State = "failed" if failed else "completed"
        event = ErrorEvent(code="X", message="y") if failed else EndEvent(stop_reason="EOS", tokens_in=0, tokens_out=0)
        expected = self.model.complete(name, attempt, state)
        assert self.run(self.store.complete(name, attempt, event, now_ms=self.now)) == expected

    @precondition(lambda self: self.any_task("running", "queued", "retry"))
    @rule(which=PICKS)
    def cancel(self, which: Any) -> None:
        name, _ = self.pick(which, "running", "queued", "retry")
        expected = self.model.cancel(name)
        outcome = self.run(self.store.cancel(name, None, now_ms=self.now))
        assert (None if outcome is None else (outcome.changed, outcome.running is not None)) == expected

    @precondition(lambda self: any(worker.stopping for worker in self.model.workers.values()))
    @rule(which=PICKS)
    def release(self, which: Any) -> None:
        name, attempt = self.pick(which, "cancelled", "failed")
        task = self.model.tasks.get(name)
        worker_id = (task.worker if task else None) or "w1"
        if (worker := self.model.workers.get(worker_id)) is not None:
            worker.stopping.pop((name, attempt), None)
        self.run(self.store.release(worker_id, name, attempt))

    @precondition(lambda self: self.any_task("running"))
    @rule(
        which=PICKS,
        reason=st.sampled_from(["worker_lost", "preempted"]),
        progressed=st.booleans(),
        backoff=st.sampled_from([0, 0, 600]),
    )
    def requeue(self, which: Any, reason: Any, progressed: bool, backoff: int) -> None:
        name, attempt = self.pick(which, "running")
        failure = reason == "worker_lost"
        expected = self.model.requeue(name, attempt, failure, progressed, backoff, 3)
        outcome = self.run(
            self.store.requeue(
                name,
                attempt,
                reason,
                failure=failure,
                progressed=progressed,
                backoff_ms=backoff,
                max_failures=3,
                now_ms=self.now,
            )
        )
        assert outcome.state == expected

    @rule()
    def sweep(self) -> None:
        expected = self.model.sweep()
        report = self.run(self.store.sweep(now_ms=self.now, healthy_ms=LONG_MS))
        running = sorted(task.task_id for task in report.expired_running)
        assert (report.retried, report.expired_queued, running, sorted(report.workers_lost)) == expected

    @precondition(lambda self: sum(not worker.lost for worker in self.model.workers.values()) > 1)
    @rule(worker_id=WORKERS, instance=INSTANCES)
    def mark_worker_lost(self, worker_id: str, instance: str) -> None:
        expected = self.model.mark_lost(worker_id, instance)
        assert self.run(self.store.mark_worker_lost(worker_id, instance, "probed", now_ms=self.now)) == expected

    @precondition(lambda self: len(self.model.workers) > 2)
    @rule(worker_id=WORKERS)
    def remove_worker(self, worker_id: str) -> None:
        assert self.run(self.store.remove_worker(worker_id)) == self.model.remove_worker(worker_id)

    @rule(worker_id=WORKERS, undo=st.booleans())
    def drain_worker(self, worker_id: str, undo: bool) -> None:
        known = worker_id in self.model.workers
        if undo:
            self.model.drained.discard(worker_id)
            assert self.run(self.store.undrain_worker(worker_id)) == known
        else:
            self.model.drained |= {worker_id} if known else set()
            assert self.run(self.store.drain_worker(worker_id, 1000, now_ms=self.now)) == known

    @rule(replica=REPLICAS)
    def replica_heartbeat(self, replica: str) -> None:
        self.model.speak(replica)
        self.run(self.store.replica_heartbeat(replica, "http://x", REPLICA_LEASE_MS, now_ms=self.now))

    @rule(replica=REPLICAS, limit=st.integers(1, 4))
    def adopt(self, replica: str, limit: int) -> None:
        adoptable = self.model.adoptable(replica)
        adopted = self.run(self.store.adopt(replica, limit=limit, now_ms=self.now, healthy_ms=LONG_MS))
        names = [task.task_id for task in adopted]
        assert set(names) <= adoptable and len(names) == min(limit, len(adoptable))
        assert all(task.owner == replica for task in adopted)
        self.model.adopt(replica, names)

    @rule(replica=REPLICAS, leave=st.booleans())
    def hand_over(self, replica: str, leave: bool) -> None:
        expected = self.model.hand_over(replica)
        if leave:
            self.model.leave(replica)
            assert self.run(self.store.leave(replica)) == expected
        else:
            assert self.run(self.store.hand_over(replica)) == expected

    @precondition(lambda self: self.any_task("completed", "failed", "cancelled"))
    @rule(which=PICKS)
    def delete_task(self, which: Any) -> None:
        name, _ = self.pick(which, "completed", "failed", "cancelled")
        assert self.run(self.store.delete_task(name)) == self.model.delete(name)

    # --- what must always hold

    @invariant()
    def the_audit_is_clean(self) -> None:
        assert self.run(self.store.audit()) == []

    @invariant()
    def the_store_says_what_the_model_says(self) -> None:
        self.run(self._compare())

    async def _compare(self) -> None:
        snapshot = await self.store.snapshot(MODEL, now_ms=self.now)
        model = self.model
        assert [task.task_id for task in snapshot.waiting] == [task.task_id for task in model.waiting()]
        assert {view.worker_id: (view.state, view.slots_used) for view in snapshot.workers} == {
            worker.worker_id: (
                "lost"
                if worker.lost or worker.lease_end <= self.now
                else "draining"
                if worker.worker_id in model.drained
                else "ready",
                model.slots_used(worker),
            )
            for worker in model.workers.values()
        }
        assert {name: value for name, value in snapshot.virtual_times.items() if value} == pytest.approx(
            {name: value for name, value in model.virtual.items() if value}
        )
        assert {view.replica_id: view.lease_expires_at_ms for view in await self.store.replicas()} == {
            replica: model.replicas[replica] for replica in model.speakers
        }
        listed = [await self.store.list_tasks(tenant, limit=100) for tenant in ("acme", "rival")]
        records = {record.task_id: record for page, _ in listed for record in page}
        assert records.keys() == model.tasks.keys()
        for name, task in model.tasks.items():
            record = records[name]
            status = "queued" if task.state == "retry" else task.state
            assert (record.status, record.attempt, record.failures) == (status, task.attempt, task.failures)
            assert (record.usage.tokens_out, record.queue_position) == (task.tokens, model.position(task))
        owners = {task.task_id: task.owner for task in model.tasks.values() if task.state == "running"}
        owned = {task.task_id: name for name in ("r1", "r2", "r3") for task in await self.store.owned(name)}
        assert owned == {name: owner for name, owner in owners.items() if owner}


def check(url: str | None) -> None:
    machine = type("Machine", (StoreMachine,), {"url": url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES if url else max(1, EXAMPLES // 3),
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


def test_on_fakeredis() -> None:
    check(None)


def test_on_a_real_server() -> None:
    with redis_server() as server:
        check(server.url)
