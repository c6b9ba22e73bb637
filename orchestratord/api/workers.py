"""Workers, pools and the fleet feed: `/v2/workers`, `/v2/pools`, `/v2/fleet/events`.

Workers call `register` and `heartbeat`, operators the rest. Read `register` first.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator
from typing import Any, cast

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from llorch_wire.sse import frame
from llorch_wire.worker import DrainRequest, Heartbeat, WorkerRegistration
from orchestratord.api import schemas
from orchestratord.api.body import only_parameters, read_model
from orchestratord.api.errors import invalid
from orchestratord.api.services import services
from orchestratord.api.sse import EventStream
from orchestratord.api.tasks import cursor_of, json_response
from orchestratord.runtime import PoolView
from orchestratord.store.types import FleetEvent, WorkerView

router = APIRouter(tags=["workers"])

_WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_encoder = msgspec.json.Encoder()


@router.post("/v2/workers/register", **schemas.REGISTER)
async def register(request: Request) -> Response:
    """A worker says that it is there, with a new `instance_id` at every engine start."""
    s = services(request)
    s.keyring.worker(request)
    registration = await read_model(request, WorkerRegistration)
    reply = await s.orchestrator.register(registration)
    return json_response(reply.model_dump(mode="json"))


@router.post("/v2/workers/{worker_id}/heartbeat", **schemas.HEARTBEAT)
async def heartbeat(request: Request) -> Response:
    """A worker says that it is alive and what it runs; the answer carries orders. 404: register again."""
    s = services(request)
    s.keyring.worker(request)
    worker_id = _path_worker_id(request)
    beat = await read_model(request, Heartbeat)
    reply = await s.orchestrator.heartbeat(worker_id, beat)
    return json_response(reply.model_dump(mode="json"))


@router.get("/v2/workers", **schemas.LIST_WORKERS)
async def list_workers(request: Request) -> Response:
    """Every registered worker."""
    s = services(request)
    s.keyring.operator(request)
    return json_response({"workers": [worker_json(view) for view in await s.orchestrator.workers()]})


@router.get("/v2/workers/{worker_id}", **schemas.GET_WORKER)
async def get_worker(request: Request) -> Response:
    """One worker."""
    s = services(request)
    s.keyring.operator(request)
    return json_response(worker_json(await s.orchestrator.worker(_path_worker_id(request))))


@router.get("/v2/workers/{worker_id}/health", **schemas.WORKER_HEALTH)
async def worker_health(request: Request) -> Response:
    """Ask a worker for its health at its registered address, from here: whether tasks sent to it would arrive."""
    s = services(request)
    s.keyring.operator(request)
    health = await s.orchestrator.worker_health(_path_worker_id(request))
    return json_response({"reachable": health is not None, "health": health and health.model_dump(mode="json")})


@router.post("/v2/workers/{worker_id}/drain", **schemas.DRAIN_WORKER)
async def drain_worker(request: Request) -> Response:
    """No new work there; what runs finishes, or moves at the deadline. Holds until it is undone."""
    s = services(request)
    s.keyring.operator(request)
    worker_id = _path_worker_id(request)
    drain = await read_model(request, DrainRequest, optional=True)
    return json_response(worker_json(await s.orchestrator.drain_worker(worker_id, drain.deadline_ms)))


@router.post("/v2/workers/{worker_id}/undrain", **schemas.UNDRAIN_WORKER)
async def undrain_worker(request: Request) -> Response:
    """Take a drained worker back into service; answers the state that it has from its next heartbeat on."""
    s = services(request)
    s.keyring.operator(request)
    return json_response(worker_json(await s.orchestrator.undrain_worker(_path_worker_id(request))))


@router.delete("/v2/workers/{worker_id}", **schemas.DELETE_WORKER)
async def delete_worker(request: Request) -> Response:
    """Forget a worker; what runs there moves elsewhere."""
    s = services(request)
    s.keyring.operator(request)
    worker_id = _path_worker_id(request)
    await s.orchestrator.remove_worker(worker_id)
    return json_response({"worker_id": worker_id, "removed": True})


@router.get("/v2/pools", **schemas.LIST_POOLS)
async def list_pools(request: Request) -> Response:
    """Workers summed up by pool."""
    s = services(request)
    s.keyring.operator(request)
    return json_response({"pools": [_pool_json(pool) for pool in await s.orchestrator.pools()]})


@router.get("/v2/fleet/events", **schemas.FLEET_EVENTS)
async def fleet_events(request: Request) -> Response:
    """What happens in the fleet, in words: after a cursor (`0-0`: from the oldest kept), or from now on; then live."""
    s = services(request)
    s.keyring.operator(request)
    only_parameters(request, "after")
    after = cursor_of(request, "a line of this feed, such as 1760000000000-0, or 0-0 for the oldest kept")
    feed = s.orchestrator.fleet(after)
    first = await anext(feed, [])  # while there is no Redis this raises, and the client gets a status

    async def frames(_group: asyncio.TaskGroup) -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(feed):
            if first:
                yield _fleet_frames(first)
            async for events in feed:
                if events:
                    yield _fleet_frames(events)

    return EventStream(frames, s.settings, first_within_s=0.1)


def worker_json(view: WorkerView) -> dict[str, Any]:
    """A worker as `/v2` shows it."""
    shown = cast("dict[str, Any]", msgspec.to_builtins(view))
    shown["slots_free"] = max(0, view.slots_total - view.slots_used)
    return shown


def _pool_json(pool: PoolView) -> dict[str, Any]:
    return {
        **cast("dict[str, Any]", msgspec.to_builtins(pool)),
        "slots_free": max(0, pool.slots_total - pool.slots_used),
    }


def _fleet_frames(events: list[FleetEvent]) -> bytes:
    return b"".join([_fleet_frame(event) for event in events])


def _fleet_frame(event: FleetEvent) -> bytes:
    data = {"at_ms": event.at_ms, "kind": event.kind, "subject": event.subject, "text": event.text}
    return frame(event.kind, _encoder.encode(data), event.position)


def _path_worker_id(request: Request) -> str:
    worker_id = str(request.path_params["worker_id"])
    if not _WORKER_ID.fullmatch(worker_id):
        raise invalid("`worker_id` must be 1 to 128 of A-Z a-z 0-9 . _ - and start with a letter or digit", "worker_id")
    return worker_id
