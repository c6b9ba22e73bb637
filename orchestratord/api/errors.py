"""How a failure looks over HTTP: one shape for `/v2`, OpenAI's for `/v1`. Every error response is made here.

    /v2   {"error": {"code", "message", "param"?, "retriable", "retry_after_ms"?, "correlation_id"}}
    /v1   {"error": {"message", "type", "param", "code"}}         as OpenAI's client library reads it

429 and 503 carry `Retry-After` (whole seconds, rounded up) and `X-Backoff-Ms`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route

from llorch_wire.errors import ApiError, ErrorCode
from llorch_wire.events import ErrorEvent
from llorch_wire.tasks import problems
from orchestratord.api.context import correlation_id

DEFAULT_RETRY_AFTER_MS = 1000

# OpenAI's `type` by HTTP status; its client picks the exception class by the status alone.
_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
# Codes that have a name of their own in OpenAI's world; every other one is ours in lower case.
_OPENAI_CODES = {
    ErrorCode.UNAUTHORIZED: "invalid_api_key",
    ErrorCode.INVALID_PARAMS: "invalid_value",
    ErrorCode.QUEUE_FULL: "rate_limit_exceeded",
    ErrorCode.RATE_LIMITED: "rate_limit_exceeded",
    ErrorCode.QUOTA_EXCEEDED: "insufficient_quota",
}


class ClientGoneError(Exception):
    """The client closed its connection before it had its answer; there is nobody to tell."""


class UnknownRouteError(ApiError):
    """No such path, or not with this method; keeps the `Allow` header of a 405."""

    def __init__(self, code: ErrorCode, message: str, allow: str | None = None) -> None:
        super().__init__(code, message)
        self.allow = allow


def invalid(message: str, param: str | None = None) -> ApiError:
    """A 400 INVALID_PARAMS."""
    return ApiError(ErrorCode.INVALID_PARAMS, message, param=param)


def from_validation(error: ValidationError, *, prefix: str = "") -> ApiError:
    """The first thing wrong with a body, and how many more there are. Never quotes a value."""
    found = problems(error)
    first = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    param = f"{prefix}{first.field}" if first.field else (prefix.rstrip(".") or "body")
    return invalid(first.message + more, param)


def from_event(event: ErrorEvent) -> ApiError:
    """The failure that a task's `error` event tells, for answers that wait for the end of a stream."""
    try:
        code = ErrorCode(event.code)
    except ValueError:
        code = ErrorCode.INTERNAL
    return ApiError(code, event.message, param=event.param, retry_after_ms=event.retry_after_ms)


def error_object(error: ApiError) -> dict[str, Any]:
    """The `error` object of `/v2`."""
    body: dict[str, Any] = {"code": error.code.value, "message": error.message}
    if error.param is not None:
        body["param"] = error.param
    body["retriable"] = error.retriable
    retry_after_ms = _retry_after_ms(error)
    if retry_after_ms is not None:
        body["retry_after_ms"] = retry_after_ms
    body["correlation_id"] = correlation_id()
    return body


def openai_error_object(error: ApiError) -> dict[str, Any]:
    """The `error` object of `/v1`."""
    return {
        "message": error.message,
        "type": _OPENAI_TYPES.get(error.status, "server_error"),
        "param": error.param,
        "code": _OPENAI_CODES.get(error.code, error.code.value.lower()),
    }


def error_response(error: ApiError, *, openai: bool) -> Response:
    """The response that tells a client of `error`, in the dialect it speaks."""
    body = openai_error_object(error) if openai else error_object(error)
    headers: dict[str, str] = {}
    retry_after_ms = _retry_after_ms(error)
    if retry_after_ms is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_ms / 1000)))
        headers["X-Backoff-Ms"] = str(retry_after_ms)
    if error.code is ErrorCode.UNAUTHORIZED:
        headers["WWW-Authenticate"] = 'Bearer realm="llorch"'
    if isinstance(error, UnknownRouteError) and error.allow:
        headers["Allow"] = error.allow
    if openai:
        headers["X-Should-Retry"] = "true" if error.retriable else "false"
    return Response(orjson.dumps({"error": body}), error.status, headers, "application/json")


def speaks_openai(path: str) -> bool:
    """Whether a path belongs to the dialect of `/v1`."""
    return path == "/v1" or path.startswith("/v1/")


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Answer every exception that a route raises in the shapes above. `routes`: every one, for `Allow`."""

    async def on_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error, openai=speaks_openai(request.scope["path"]))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(_from_http(request, error, routes), openai=speaks_openai(request.scope["path"]))

    async def on_client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; the log line shows it

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(ClientGoneError, on_client_gone)
    app.add_exception_handler(HTTPException, on_http_error)


def _from_http(request: Request, error: HTTPException, routes: Sequence[BaseRoute]) -> ApiError:
    if error.status_code == 405:
        allow = _allowed(request, routes)
        hint = f"; it takes {allow}" if allow else ""
        return UnknownRouteError(ErrorCode.METHOD_NOT_ALLOWED, f"{request.method} is not for this path{hint}", allow)
    if error.status_code == 404:
        return UnknownRouteError(ErrorCode.NOT_FOUND, "no such path; GET /docs lists the ones there are")
    return ApiError(ErrorCode.INTERNAL, "unexpected failure; the log has it under this correlation id")


def _allowed(request: Request, routes: Sequence[BaseRoute]) -> str:
    """Every method that this path takes; the framework's own answer knows those of one route only."""
    methods: set[str] = set()
    for route in routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


def _retry_after_ms(error: ApiError) -> int | None:
    if error.retry_after_ms is not None:
        return error.retry_after_ms
    return DEFAULT_RETRY_AFTER_MS if error.status in (429, 503) else None
