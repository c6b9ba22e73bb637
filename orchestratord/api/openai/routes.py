"""The paths of `/v1`. Read `_complete` first: both kinds of completion are this one function."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from llorch_wire.errors import ApiError, ErrorCode
from orchestratord.api import schemas
from orchestratord.api.body import read_object
from orchestratord.api.context import correlation_id
from orchestratord.api.openai.answers import Answer
from orchestratord.api.openai.requests import ChatOptions, CompletionOptions, Translated, parse_chat, parse_completion
from orchestratord.api.openai.shapes import ChatShape, CompletionShape, Json, Shape, error_frame
from orchestratord.api.services import services
from orchestratord.api.sse import EventStream, answer_or_leave
from orchestratord.api.tasks import idempotency_key, json_response
from orchestratord.runtime import ModelView, Tenant

router = APIRouter(tags=["openai"])

HOLD_S = 15.0
"""How long a stream's status is held back for its first token, so that a prompt which is too long is a 400."""

_NOT_YET = ("embeddings", "responses", "files", "batches")


@router.get("/v1/models", **schemas.OPENAI_MODELS)
async def list_models(request: Request) -> Response:
    """Every model that was ever registered."""
    s = services(request)
    s.keyring.client(request)
    models = [_model_json(view) for view in await s.orchestrator.models()]
    return json_response({"object": "list", "data": models})


@router.get("/v1/models/{model:path}", **schemas.OPENAI_MODEL)
async def get_model(request: Request) -> Response:
    """One model."""
    s = services(request)
    s.keyring.client(request)
    wanted = str(request.path_params["model"])
    for view in await s.orchestrator.models():
        if view.model == wanted:
            return json_response(_model_json(view))
    raise ApiError(ErrorCode.MODEL_NOT_FOUND, "no such model; GET /v1/models lists the ones there are", param="model")


@router.post(
    "/v1/chat/completions",
    **schemas.openai_route(
        ChatOptions, {"model": "demo", "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 64}
    ),
)
async def chat_completions(request: Request) -> Response:
    """Complete a chat."""
    tenant = services(request).keyring.client(request)
    translated = parse_chat(await read_object(request))
    return await _complete(request, tenant, translated, ChatShape(logprobs=translated.logprobs), "chatcmpl-")


@router.post(
    "/v1/completions",
    **schemas.openai_route(CompletionOptions, {"model": "demo", "prompt": "Once upon a time", "max_tokens": 64}),
)
async def completions(request: Request) -> Response:
    """Complete text or token ids."""
    tenant = services(request).keyring.client(request)
    translated = parse_completion(await read_object(request))
    return await _complete(request, tenant, translated, CompletionShape(logprobs=translated.logprobs), "cmpl-")


async def _complete(request: Request, tenant: Tenant, translated: Translated, shape: Shape, id_prefix: str) -> Response:
    s = services(request)
    answer = await Answer.open(
        s.orchestrator,
        tenant,
        translated,
        shape,
        id_prefix=id_prefix,
        idempotency_key=idempotency_key(request),
        correlation_id=correlation_id(),
    )
    if translated.stream:

        def source(group: asyncio.TaskGroup) -> AsyncGenerator[bytes, None]:
            return answer.stream(group)

        return EventStream(source, s.settings, closed=answer.close, late_error=error_frame, first_within_s=HOLD_S)
    try:
        body: Json = await answer_or_leave(request, answer.whole())
    finally:
        await answer.close()
    return json_response(body)


def _refuse(name: str) -> Any:
    async def refuse(request: Request) -> Response:
        raise ApiError(ErrorCode.NOT_FOUND, f"/v1/{name} is not available in this version; GET /docs lists what is")

    return refuse


for _name in _NOT_YET:
    for _path in (f"/v1/{_name}", f"/v1/{_name}/{{rest:path}}"):
        router.add_api_route(
            _path, _refuse(_name), methods=["GET", "POST", "DELETE"], include_in_schema=False, response_model=None
        )


def _model_json(view: ModelView) -> dict[str, Any]:
    return {
        "id": view.model,
        "object": "model",
        "created": 0,
        "owned_by": "llorch",
        "context_length": view.context_length,
        "workers_ready": view.workers_ready,
    }
