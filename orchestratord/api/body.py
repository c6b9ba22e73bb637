"""Reading what a client sends: bounded in size, in time and in depth, with our own errors.

FastAPI's own body parsing isn't used: it buffers without a bound, and its errors quote what was sent.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar, cast

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from llorch_wire.errors import ApiError, ErrorCode
from orchestratord.api.errors import from_validation, invalid
from orchestratord.api.services import services

M = TypeVar("M", bound=BaseModel)


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body. Raises ApiError 413 before more than `max_bytes` are held, 400 when it takes too long."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                if len(body) + len(chunk) > max_bytes:
                    raise _too_large(max_bytes)
                body += chunk
    except TimeoutError:
        raise invalid(f"the body did not arrive within {timeout_s:g} s; send it again", "body") from None
    except ClientDisconnect:
        raise invalid("the connection closed before the body was complete", "body") from None
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises ApiError 400 for anything else: other JSON, other encodings, NaN, lone surrogates, nesting
    without end.

    A key that stands there twice counts as its last value (RFC 8259 leaves it open; most parsers do so).
    """
    if not body.strip():
        raise invalid("the body is empty: send a JSON object", "body")
    try:
        value: object = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # orjson's messages name a position and a reason, never the text itself.
        place = _not_utf8(body)
        if place is not None:
            raise invalid(
                f"the body is not valid UTF-8: byte {place} can't stand there; encode it anew", "body"
            ) from None
        hint = " (a lone surrogate: strings must be valid Unicode)" if "surrogate" in str(error) else ""
        raise invalid(f"the body is not valid JSON: {error}{hint}", "body") from None
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object", "body")
    return cast("dict[str, Any]", value)


def _not_utf8(body: bytes) -> int | None:
    """Where the first byte is that isn't UTF-8, from 0; None where all are."""
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return None


def parse_model(model: type[M], value: dict[str, Any]) -> M:
    """A validated message. Raises ApiError 400 naming the field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise from_validation(error) from None


async def read_model(request: Request, model: type[M], *, optional: bool = False) -> M:
    """Read and validate a body under the server's bounds; with `optional` an empty one counts as `{}`."""
    settings = services(request).settings
    body = await read_body(request, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_ms / 1000)
    if optional and not body.strip():
        return parse_model(model, {})
    return parse_model(model, parse_object(body))


async def read_object(request: Request) -> dict[str, Any]:
    """Read a JSON object under the server's bounds, not validated yet."""
    settings = services(request).settings
    body = await read_body(request, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_ms / 1000)
    return parse_object(body)


def only_parameters(request: Request, *names: str) -> None:
    """Refuse query parameters that the route doesn't know, by name; a typo must not be ignored."""
    for name in request.query_params:
        if name not in names:
            shown = name if name.isidentifier() and len(name) <= 64 else "?"
            known = ", ".join(names) or "none"
            raise invalid(f"unknown query parameter `{shown}`; known here: {known}", shown)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(ErrorCode.PAYLOAD_TOO_LARGE, f"the body is larger than {max_bytes} bytes", param="body")
