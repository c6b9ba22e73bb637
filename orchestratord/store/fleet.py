"""The store's part for workers, replicas and the fleet feed."""

from __future__ import annotations

import msgspec

from llorch_wire.worker import Heartbeat, WorkerRegistration
from orchestratord.store import codec
from orchestratord.store.base import StoreBase, moment
from orchestratord.store.keys import key
from orchestratord.store.types import (
    FleetEvent,
    HeartbeatOutcome,
    ReplicaView,
    ServiceRates,
    WorkerView,
)

_HANDOVER_CHUNK = 256


class FleetStore(StoreBase):
    """Workers and replicas. See `orchestratord.store.store.Store`."""

    async def register_worker(
        self, registration: WorkerRegistration, lease_ms: int, *, now_ms: int | None = None
    ) -> None:
        """The worker takes work until its lease ends. A new `instance_id` at a known id replaces the old instance: its
        stopped attempts have stopped, its running ones will be found gone by their relays."""
        await self._run("register_worker", moment(now_ms), lease_ms, *codec.worker_fields(registration))

    async def heartbeat(
        self, worker_id: str, heartbeat: Heartbeat, lease_ms: int, *, now_ms: int | None = None
    ) -> HeartbeatOutcome:
        """Renews the lease. `known` is false for another instance than the registered one: it must register."""
        running = [part for attempt in heartbeat.running for part in (attempt.task_id, attempt.attempt)]
        known, drain, *unwanted = await self._run(
            "heartbeat",
            moment(now_ms),
            worker_id,
            heartbeat.instance_id,
            lease_ms,
            heartbeat.status,
            heartbeat.kv_blocks_free,
            repr(heartbeat.tokens_per_second),
            heartbeat.vram_used_bytes,
            *running,
        )
        cancel = tuple(
            (task_id.decode(), int(attempt)) for task_id, attempt in zip(unwanted[::2], unwanted[1::2], strict=True)
        )
        return HeartbeatOutcome(known=bool(known), drain=bool(drain), cancel=cancel)

    async def workers(self, *, now_ms: int | None = None) -> list[WorkerView]:
        """Every registered worker, by id; the lost ones too."""
        views = [codec.worker_view(row) for row in await self._run("workers", moment(now_ms), "")]
        return sorted(views, key=lambda view: view.worker_id)

    async def worker(self, worker_id: str, *, now_ms: int | None = None) -> WorkerView | None:
        """One worker; None when it isn't registered."""
        rows = await self._run("workers", moment(now_ms), worker_id)
        return codec.worker_view(rows[0]) if rows else None

    async def drain_worker(self, worker_id: str, deadline_ms: int, *, now_ms: int | None = None) -> bool:
        """No new work for this worker, whatever restarts, until `undrain_worker`; `deadline_ms` from now its running
        work must have moved. False when it isn't registered."""
        return bool(await self._run("drain_worker", moment(now_ms), worker_id, deadline_ms))

    async def undrain_worker(self, worker_id: str) -> bool:
        """The worker takes work again. False when it isn't registered."""
        return bool(await self._run("drain_worker", "", worker_id, ""))

    async def remove_worker(self, worker_id: str) -> bool:
        """Forgets a worker and an order to drain it. Attempts there stay running until their relays requeue them. False
        when it isn't registered."""
        return bool(await self._run("remove_worker", "", worker_id))

    async def mark_worker_lost(
        self, worker_id: str, instance_id: str, reason: str, *, unreachable: bool = False, now_ms: int | None = None
    ) -> bool:
        """True when this call marked it; False when another instance is registered or it was lost already. A heartbeat
        of the same instance takes the mark away; of an `unreachable` one, only `worker_answers` does."""
        mark = "1" if unreachable else "0"
        return bool(await self._run("mark_worker_lost", moment(now_ms), worker_id, instance_id, reason, mark))

    async def worker_answers(self, worker_id: str, instance_id: str, *, now_ms: int | None = None) -> bool:
        """An unreachable worker was reached. True when it takes work again by this call."""
        return bool(await self._run("worker_answers", moment(now_ms), worker_id, instance_id))

    async def replica_heartbeat(self, replica_id: str, url: str, lease_ms: int, *, now_ms: int | None = None) -> None:
        """This replica lives; when its lease ends the others adopt its tasks."""
        await self._run("replica_heartbeat", moment(now_ms), replica_id, url, lease_ms)

    async def replicas(self) -> list[ReplicaView]:
        """Every replica that holds a lease or whose lease has ended and whose tasks aren't adopted yet, by id."""
        flat = await self._run("replicas")
        views = [
            ReplicaView(replica_id=name.decode(), url=url.decode(), lease_expires_at_ms=int(float(expires)))
            for name, url, expires in zip(flat[::3], flat[1::3], flat[2::3], strict=True)
            if url is not None  # one that never spoke, or not since it was given up, has no address
        ]
        return sorted(views, key=lambda view: view.replica_id)

    async def hand_over(self, replica_id: str) -> int:
        """Every task that this replica owns becomes adoptable at once. Returns how many. Claim no more before."""
        return await self._hand_over(replica_id, leave=False)

    async def leave(self, replica_id: str) -> int:
        """As `hand_over`, and the replica's lease ends."""
        return await self._hand_over(replica_id, leave=True)

    async def _hand_over(self, replica_id: str, *, leave: bool) -> int:
        total = 0
        while True:
            moved = await self._run("hand_over", "", replica_id, _HANDOVER_CHUNK, int(leave))
            total += moved
            if moved < _HANDOVER_CHUNK:
                return total

    async def set_rates(self, model: str, rates: ServiceRates) -> None:
        """Replaces a model's measured service rates; `complete` refines them."""
        client = self._connection.client
        mapping = {name: repr(value) for name, value in msgspec.structs.asdict(rates).items()}
        await self._connection.call(lambda: client.hset(key("rates", model), mapping=mapping))

    async def rates(self, model: str) -> ServiceRates | None:
        """A model's measured service rates; None before the first task ended."""
        client = self._connection.client
        row: dict[bytes, bytes] = await self._connection.call(lambda: client.hgetall(key("rates", model)))
        if not row:
            return None
        return msgspec.convert(
            {name.decode(): value.decode() for name, value in row.items()}, ServiceRates, strict=False
        )

    async def fleet_event(self, kind: str, subject: str, text: str, *, now_ms: int | None = None) -> str:
        """Adds a line to the feed, which keeps about the last 2,000. Returns its position. Registrations, losses,
        drains and replicas that come and go are written by their own transitions."""
        return (await self._run("fleet_event", moment(now_ms), kind, subject, text)).decode()

    async def read_fleet(self, *, after: str = "0-0", limit: int = 256) -> list[FleetEvent]:
        """Lines after a position, oldest first. ValueError when `after` isn't a position."""
        codec.check_position(after)
        client = self._connection.client
        entries = await self._connection.call(lambda: client.xrange(key("fleet"), min=f"({after}", count=limit))
        return [
            FleetEvent(
                position=position.decode(),
                at_ms=int(values[b"at"]),
                kind=values[b"kind"].decode(),
                subject=values[b"subject"].decode(),
                text=values[b"text"].decode(),
            )
            for position, values in entries
        ]
