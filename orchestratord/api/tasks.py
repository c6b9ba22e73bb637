"""`/v2/tasks` and `/v2/queue`. Read `create_task` and `stream_events` first.

Routes read bodies and parameters themselves (see `body`), so that a bad one gets our error and nothing is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator
from typing import Any, cast, get_args

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from llorch_wire.errors import ApiError
from llorch_wire.events import ErrorEvent, encode_data, parse_position
from llorch_wire.sse import frame
from llorch_wire.tasks import UUID_PATTERN, TaskRequest, TaskStatus
from orchestratord.api import schemas
from orchestratord.api.body import only_parameters, read_model
from orchestratord.api.context import correlation_id
from orchestratord.api.errors import invalid
from orchestratord.api.services import services
from orchestratord.api.sse import EventStream, render
from orchestratord.jobs.addresses import refusal_of
from orchestratord.runtime import Submitted, TaskView, Tenant
from orchestratord.settings import Settings

router = APIRouter(tags=["tasks"])

MAX_LIST = 500
_UUID = re.compile(UUID_PATTERN)
_IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")
_LIST_CURSOR = re.compile(r"[A-Za-z0-9._:=-]{1,256}")


@router.post("/v2/tasks", status_code=202, **schemas.CREATE_TASK)
async def create_task(request: Request) -> Response:
    """Admit a task: 202 with its id, or its event stream where the client accepts `text/event-stream`."""
    s = services(request)
    tenant = s.keyring.client(request)
    key = idempotency_key(request)
    task = await read_model(request, TaskRequest)
    _check_callback(task, s.settings)
    streams = "text/event-stream" in request.headers.get("accept", "")
    submitted = await s.orchestrator.submit(
        task, tenant=tenant, idempotency_key=key, correlation_id=correlation_id(), attended=streams
    )
    headers = {"Location": f"/v2/tasks/{submitted.task_id}"}
    if streams:
        return event_stream(request, submitted.task_id, tenant, None, headers)
    return json_response(_submitted(submitted), 202, headers)


@router.get("/v2/tasks", **schemas.LIST_TASKS)
async def list_tasks(request: Request) -> Response:
    """Tasks of the caller's tenant, newest first, without their text."""
    s = services(request)
    tenant = s.keyring.client(request)
    only_parameters(request, "status", "model", "limit", "after")
    query = request.query_params
    status = query.get("status")
    if status is not None and status not in get_args(TaskStatus):
        raise invalid(f"`status` must be one of {', '.join(get_args(TaskStatus))}", "status")
    after = query.get("after")
    if after is not None and not _LIST_CURSOR.fullmatch(after):
        raise invalid("`after` must be the `next` of the page before", "after")
    views, cursor = await s.orchestrator.tasks(
        tenant,
        status=cast("TaskStatus | None", status),
        model=query.get("model"),
        limit=integer_parameter(request, "limit", 50, 1, MAX_LIST),
        after=after,
    )
    return json_response({"tasks": [task_json(view) for view in views], "next": cursor})


@router.get("/v2/tasks/{task_id}", **schemas.GET_TASK)
async def get_task(request: Request) -> Response:
    """One task with its text so far."""
    s = services(request)
    tenant = s.keyring.client(request)
    return json_response(task_json(await s.orchestrator.task(path_task_id(request), tenant)))


@router.get("/v2/tasks/{task_id}/events", **schemas.TASK_EVENTS)
async def stream_events(request: Request) -> Response:
    """The task's events after a cursor, then live, until its terminal event."""
    s = services(request)
    tenant = s.keyring.client(request)
    task_id = path_task_id(request)
    only_parameters(request, "after")
    cursor = cursor_of(request)
    await s.orchestrator.attend(task_id, tenant)
    return event_stream(request, task_id, tenant, cursor)


@router.post("/v2/tasks/{task_id}/cancel", **schemas.CANCEL_TASK)
@router.delete("/v2/tasks/{task_id}", **schemas.DELETE_TASK)
async def cancel_task(request: Request) -> Response:
    """End a task; one that ended already is returned as it is."""
    s = services(request)
    tenant = s.keyring.client(request)
    return json_response(task_json(await s.orchestrator.cancel(path_task_id(request), tenant)))


@router.get("/v2/queue", **schemas.QUEUE)
async def get_queue(request: Request) -> Response:
    """Waiting tasks by model, priority and tenant: every tenant's for an operator, else the caller's own."""
    s = services(request)
    s.keyring.refuse_browsers(request)
    caller = s.keyring.caller(request.headers.get("authorization"))
    sees_all = caller.is_operator or not s.keyring.needs_client_key
    if not sees_all:
        s.keyring.client(request)
    depths = [
        depth
        for depth in await s.orchestrator.queue()
        if sees_all or (caller.tenant is not None and depth.tenant == caller.tenant.name)
    ]
    rows = [
        {
            "model": depth.model,
            "priority": depth.priority,
            "tenant": depth.tenant,
            "depth": depth.depth,
            "oldest_age_ms": depth.oldest_age_ms,
        }
        for depth in depths
    ]
    oldest = max((depth.oldest_age_ms for depth in depths), default=0)
    return json_response({"depth": sum(d.depth for d in depths), "oldest_age_ms": oldest, "queues": rows})


def _check_callback(task: TaskRequest, settings: Settings) -> None:
    """Refuse a webhook that could never be delivered, before the task is admitted."""
    if task.callback_url is None:
        return
    allowed, signed = settings.allow_private_callbacks, settings.webhook_secret is not None
    refusal = refusal_of(task.callback_url, allow_private=allowed, has_secret=signed)
    if refusal is not None:
        raise invalid(refusal, "callback_url")


def event_stream(
    request: Request, task_id: str, tenant: Tenant, after: str | None, headers: dict[str, str] | None = None
) -> EventStream:
    """The SSE answer that follows a task."""
    s = services(request)

    async def frames(_group: asyncio.TaskGroup) -> AsyncGenerator[bytes, None]:
        follower = s.orchestrator.follow(task_id, tenant, after)
        async with contextlib.aclosing(follower):
            async for items in follower:
                if items:
                    yield render(items)

    async def gone() -> None:
        await s.orchestrator.disconnected(task_id, tenant)

    return EventStream(frames, s.settings, gone=gone, late_error=_late_error, headers=headers)


def task_json(view: TaskView) -> dict[str, Any]:
    """A task as `/v2` shows it."""
    record = view.record
    shown: dict[str, Any] = {
        "task_id": record.task_id,
        "model": record.model,
        "status": record.status,
        "priority": record.priority,
        "queue_position": record.queue_position,
        "attempt": record.attempt,
        "failures": record.failures,
        "worker_id": record.worker_id,
        "seed": record.seed,
        "max_tokens": record.max_tokens,
        "usage": {
            "tokens_in": record.usage.tokens_in,
            "tokens_out": record.usage.tokens_out,
            "cached_tokens": record.usage.cached_tokens,
        },
        "created_at_ms": record.created_at_ms,
        "started_at_ms": record.started_at_ms,
        "finished_at_ms": record.finished_at_ms,
        "deadline_at_ms": record.deadline_at_ms,
        "on_disconnect": record.on_disconnect,
        "session_id": record.session_id,
        "metadata": record.metadata,
        "events_url": events_url(record.task_id),
    }
    if view.predicted_start_ms is not None:
        shown["predicted_start_ms"] = view.predicted_start_ms
    if view.text is not None:
        shown["text"] = view.text
    if record.end is not None:
        shown["stop_reason"] = record.end.stop_reason
        shown["stop_sequence_matched"] = record.end.stop_sequence_matched
    if record.error is not None:
        shown["error"] = _event_error(record.error)
    return shown


def events_url(task_id: str) -> str:
    """Where a task's events are, relative to the server."""
    return f"/v2/tasks/{task_id}/events"


def path_task_id(request: Request) -> str:
    """The task id in the path. Raises ApiError 400 for anything but a UUID."""
    task_id = str(request.path_params["task_id"])
    if not _UUID.fullmatch(task_id):
        raise invalid("`task_id` must be a UUID", "task_id")
    return task_id.lower()


def cursor_of(request: Request, of: str = "an event of this task, such as 1-17") -> str | None:
    """`Last-Event-ID`, else `?after=`, else None. Raises ApiError 400 for what isn't a position."""
    for name, value in (
        ("Last-Event-ID", request.headers.get("last-event-id")),
        ("after", request.query_params.get("after")),
    ):
        if not value:
            continue
        try:
            parse_position(value)
        except ValueError:
            raise invalid(f"`{name}` must be the id of {of}", name) from None
        return value
    return None


def idempotency_key(request: Request) -> str | None:
    """The `Idempotency-Key` header. Raises ApiError 400 for one that is no plain short text."""
    key = request.headers.get("idempotency-key")
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise invalid("`Idempotency-Key` must be 1 to 255 printable ASCII characters", "Idempotency-Key")
    return key


def integer_parameter(request: Request, name: str, default: int, least: int, most: int) -> int:
    """A whole number in the query. Raises ApiError 400 outside of its bounds."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and least <= int(text) <= most):
        raise invalid(f"`{name}` must be a whole number from {least} to {most}", name)
    return int(text)


def json_response(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(body), status, headers, "application/json")


def _submitted(submitted: Submitted) -> dict[str, Any]:
    return {
        "task_id": submitted.task_id,
        "status": submitted.status,
        "model": submitted.model,
        "seed": submitted.seed,
        "queue_position": submitted.queue_position,
        "predicted_start_ms": submitted.predicted_start_ms,
        "predicted_start_p90_ms": submitted.predicted_start_p90_ms,
        "events_url": events_url(submitted.task_id),
        "created_at_ms": submitted.created_at_ms,
        "created": submitted.created,
    }


def _event_error(event: ErrorEvent) -> dict[str, Any]:
    return cast("dict[str, Any]", orjson.loads(encode_data(event)))


def _late_error(error: ApiError) -> bytes:
    if error.retriable:
        return b""  # the stream just ends and the client resumes: an `error` event would say that the task failed
    event = ErrorEvent(
        code=error.code.value,
        message=error.message,
        retriable=error.retriable,
        retry_after_ms=error.retry_after_ms,
        param=error.param,
    )
    return frame(event.EVENT, encode_data(event))
