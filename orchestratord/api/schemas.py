"""What `/openapi.json` says about each route: bodies, answers, errors, examples.

Routes read their bodies themselves, so FastAPI can't derive this; the schemas come from the wire types that validate
the same bodies. Each constant is the keyword arguments of one route.
"""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic import BaseModel

from llorch_wire.errors import STATUS, ErrorCode
from llorch_wire.tasks import TaskRequest
from llorch_wire.worker import DrainRequest, Heartbeat, HeartbeatReply, RegisterReply, WorkerRegistration
from orchestratord.store.types import WorkerView

Route = dict[str, Any]
_REF = "#/components/schemas/{model}"
_ID = "6a1f0c5e-3f0a-4f6e-9a51-2f4f6a1f9d10"
_STREAM_EXAMPLE = (
    f'id: 0-1\nevent: queued\ndata: {{"task_id":"{_ID}","queue_position":0,"predicted_start_ms":0}}\n\n'
    'id: 1-1\nevent: token\ndata: {"t":"Once","i":0,"id":371}\n\n'
    'id: 1-18446744073709551615\nevent: end\ndata: {"stop_reason":"EOS","tokens_in":4,"tokens_out":1}\n\n'
)
_TASK_EXAMPLE = {
    "task_id": _ID,
    "model": "demo",
    "status": "completed",
    "priority": "interactive",
    "queue_position": None,
    "attempt": 1,
    "worker_id": "local-0",
    "seed": 7,
    "usage": {"tokens_in": 4, "tokens_out": 12, "cached_tokens": 0},
    "text": "Once upon a time there was a fox.",
    "stop_reason": "EOS",
}


def _codes(status: int) -> str:
    return ", ".join(code for code in ErrorCode if STATUS[code] == status)


def _error(status: int) -> Route:
    return {"description": _codes(status), "content": {"application/json": {"schema": {"$ref": _ref("Error")}}}}


def _ref(name: str) -> str:
    return _REF.format(model=name)


def _json(description: str, schema: Route, example: object = None) -> Route:
    content: Route = {"schema": schema}
    if example is not None:
        content["example"] = example
    return {"description": description, "content": {"application/json": content}}


def _stream(description: str) -> Route:
    return {
        "description": description,
        "content": {"text/event-stream": {"schema": {"type": "string"}, "example": _STREAM_EXAMPLE}},
    }


def _body(model: type[BaseModel], example: object, *, required: bool = True) -> Route:
    content = {"schema": {"$ref": _ref(model.__name__)}, "example": example}
    return {"required": required, "content": {"application/json": content}}


def _parameter(name: str, where: str, text: str, schema: Route | None = None) -> Route:
    return {
        "name": name,
        "in": where,
        "required": where == "path",
        "description": text,
        "schema": schema or {"type": "string"},
    }


def route(
    responses: dict[int | str, Route], *errors: int, parameters: tuple[Route, ...] = (), body: Route | None = None
) -> Route:
    """Keyword arguments of a route: its answers, its error statuses, its parameters, its body."""
    extra: Route = {}
    if parameters:
        extra["parameters"] = list(parameters)
    if body is not None:
        extra["requestBody"] = body
    return {
        "response_model": None,
        "responses": {**responses, **{status: _error(status) for status in errors}},
        "openapi_extra": extra,
    }


_TASK_ID = _parameter("task_id", "path", "the task's id", {"type": "string", "format": "uuid"})
_WORKER_ID = _parameter("worker_id", "path", "the worker's id")
_AFTER_HEADER = _parameter("Last-Event-ID", "header", "id of the last event seen: the stream goes on right after it")
_AFTER = _parameter("after", "query", "as Last-Event-ID, for clients that can't set headers")
_CORRELATION = _parameter(
    "X-Correlation-Id", "header", "taken if it is 1 to 64 of A-Z a-z 0-9 . _ -, else made; echoed"
)
_IDEMPOTENCY = _parameter(
    "Idempotency-Key", "header", "the same key and body again is the same task; another body: 409"
)
_OBJECT: Route = {"type": "object"}
_TASK = _json("The task", {"$ref": _ref("Task")}, _TASK_EXAMPLE)
_WORKER = _json("The worker", {"$ref": _ref("WorkerView")})

CREATE_TASK = route(
    {
        202: _json(
            "Admitted",
            {"$ref": _ref("Submitted")},
            {
                "task_id": _ID,
                "status": "queued",
                "model": "demo",
                "seed": 7,
                "queue_position": 0,
                "predicted_start_ms": 0,
                "events_url": f"/v2/tasks/{_ID}/events",
                "created_at_ms": 1760000000000,
            },
        ),
        200: _stream("The event stream itself, where the client accepts text/event-stream"),
    },
    400, 401, 404, 409, 413, 429, 503,
    parameters=(_IDEMPOTENCY, _CORRELATION),
    body=_body(TaskRequest, {"model": "demo", "prompt": "Once upon a time", "max_tokens": 64}),
)  # fmt: skip
LIST_TASKS = route(
    {200: _json("A page", {"type": "object", "properties": {"tasks": {"type": "array"}, "next": {"type": "string"}}})},
    400,
    401,
    parameters=(
        _parameter("status", "query", "queued, running, completed, failed or cancelled"),
        _parameter("model", "query", "only this model's"),
        _parameter("limit", "query", "1 to 500, default 50", {"type": "integer"}),
        _parameter("after", "query", "`next` of the page before"),
    ),
)
GET_TASK = route({200: _TASK}, 400, 401, 404, parameters=(_TASK_ID,))
CANCEL_TASK = route({200: _TASK}, 400, 401, 404, 503, parameters=(_TASK_ID,))
DELETE_TASK = CANCEL_TASK
TASK_EVENTS = route(
    {200: _stream("The events")}, 400, 401, 404, 409, 410, 503, parameters=(_TASK_ID, _AFTER_HEADER, _AFTER)
)
QUEUE = route({200: _json("Waiting tasks", _OBJECT)}, 401, 503)

REGISTER = route(
    {200: _json("Lease and pace", {"$ref": _ref("RegisterReply")})},
    400, 401, 403, 503,
    body=_body(WorkerRegistration, {
        "worker_id": "local-0", "instance_id": "1f2e", "url": "http://127.0.0.1:40123", "model": "demo",
        "model_digest": "sha256:…", "dtype": "float32", "device": "cpu", "context_length": 2048, "slots_total": 8,
    }),
)  # fmt: skip
HEARTBEAT = route(
    {200: _json("Orders", {"$ref": _ref("HeartbeatReply")})},
    400, 401, 403, 404, 503,
    parameters=(_WORKER_ID,),
    body=_body(Heartbeat, {"instance_id": "1f2e", "running": [], "slots_free": 8}),
)  # fmt: skip
LIST_WORKERS = route({200: _json("Every worker", _OBJECT)}, 401, 403, 503)
GET_WORKER = route({200: _WORKER}, 400, 401, 403, 404, parameters=(_WORKER_ID,))
WORKER_HEALTH = route(
    {200: _json("Whether it can be reached from here, and what it says", _OBJECT)},
    400, 401, 403, 404,
    parameters=(_WORKER_ID,),
)  # fmt: skip
DRAIN_WORKER = route(
    {200: _WORKER},
    400, 401, 403, 404,
    parameters=(_WORKER_ID,),
    body=_body(DrainRequest, {"deadline_ms": 30000}, required=False),
)  # fmt: skip
UNDRAIN_WORKER = route({200: _WORKER}, 400, 401, 403, 404, parameters=(_WORKER_ID,))
DELETE_WORKER = route({200: _json("Forgotten", _OBJECT)}, 400, 401, 403, 404, parameters=(_WORKER_ID,))
LIST_POOLS = route({200: _json("Every pool", _OBJECT)}, 401, 403, 503)
FLEET_EVENTS = route({200: _stream("The feed")}, 400, 401, 403, 503, parameters=(_AFTER_HEADER, _AFTER))

HEALTH = route({200: _json("The process lives", _OBJECT)})
READY = route({200: _json("Ready", _OBJECT), 503: _json("Not ready, with the reason", _OBJECT)})
METRICS = route({200: {"description": "Prometheus text", "content": {"text/plain": {}}}}, 401, 403)
VERSION = route({200: _json("Versions", _OBJECT)})
CAPABILITIES = route({200: _json("Capabilities and bounds", _OBJECT)})
OPENAI_MODELS = route({200: _json("As OpenAI's API has it", _OBJECT)}, 401)
OPENAI_MODEL = route({200: _json("As OpenAI's API has it", _OBJECT)}, 401, 404)


def openai_route(body: type[BaseModel], example: object) -> Route:
    """A `/v1` route that makes completions."""
    return route(
        {200: _json("As OpenAI's API has it; an event stream where `stream` is true", _OBJECT)},
        400, 401, 404, 413, 429, 503,
        body=_body(body, example),
    )  # fmt: skip


def components(*more: type[BaseModel]) -> Route:
    """The schemas that the routes refer to."""
    found: Route = {}
    models = (TaskRequest, WorkerRegistration, RegisterReply, Heartbeat, HeartbeatReply, DrainRequest, *more)
    for model in models:
        schema = model.model_json_schema(ref_template=_REF, mode="validation")
        found.update(schema.pop("$defs", {}))
        found[model.__name__] = schema
    _, views = msgspec.json.schema_components([WorkerView], ref_template="#/components/schemas/{name}")
    found.update(views)
    found["Error"] = _ERROR
    found["Submitted"] = _SUBMITTED
    found["Task"] = _TASK_SCHEMA
    return found


_INT: Route = {"type": "integer"}
_TEXT: Route = {"type": "string"}
_ERROR: Route = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "retriable", "correlation_id"],
            "properties": {
                "code": {"type": "string", "enum": [code.value for code in ErrorCode]},
                "message": _TEXT,
                "param": {"type": "string", "description": "the field at fault, dotted"},
                "retriable": {"type": "boolean"},
                "retry_after_ms": _INT,
                "correlation_id": _TEXT,
            },
        }
    },
}
_SUBMITTED: Route = {
    "type": "object",
    "properties": {
        "task_id": _TEXT,
        "status": _TEXT,
        "model": _TEXT,
        "seed": {"type": "integer", "description": "drawn where none was given"},
        "queue_position": _INT,
        "predicted_start_ms": {"type": ["integer", "null"]},
        "predicted_start_p90_ms": {"type": ["integer", "null"]},
        "events_url": _TEXT,
        "created_at_ms": _INT,
        "created": {"type": "boolean", "description": "false where the same task had been admitted before"},
    },
}
_TASK_SCHEMA: Route = {
    "type": "object",
    "properties": {
        "task_id": _TEXT,
        "model": _TEXT,
        "status": {"type": "string", "enum": ["queued", "running", "completed", "failed", "cancelled"]},
        "queue_position": {"type": ["integer", "null"]},
        "attempt": _INT,
        "worker_id": {"type": ["string", "null"]},
        "seed": _INT,
        "usage": {"type": "object", "properties": {"tokens_in": _INT, "tokens_out": _INT, "cached_tokens": _INT}},
        "text": {"type": "string", "description": "so far, or whole"},
        "stop_reason": {"type": "string", "enum": ["EOS", "MAX_TOKENS", "STOP_SEQUENCE", "CANCELLED"]},
        "error": _OBJECT,
    },
}
