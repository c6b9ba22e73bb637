"""What surrounds every request: its correlation id, its line in the log, and the answer when a route breaks.

Read `RequestContext.__call__` first. It is plain ASGI, outermost, so that it costs a stream nothing per chunk but one
call and sees what every other layer answers.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llorch_wire.errors import ApiError, ErrorCode
from orchestratord.logging import describe_exception

CORRELATION_HEADER = "x-correlation-id"
_ACCEPTED = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET = ("/health", "/ready", "/metrics", "/v2/workers")
"""Paths that are asked for all the time: logged at debug."""

_correlation_id: ContextVar[str] = ContextVar("correlation_id", default="")

ErrorAnswer = Callable[[ApiError, str], ASGIApp]


def correlation_id() -> str:
    """The id of the request being answered; empty outside of one."""
    return _correlation_id.get()


def new_correlation_id() -> str:
    """A fresh id."""
    return uuid.uuid4().hex


class RequestContext:
    """ASGI middleware: takes or makes the correlation id, echoes it, logs the request, turns a crash into a 500."""

    def __init__(self, app: ASGIApp, answer: ErrorAnswer, max_active: int) -> None:
        self._app = app
        self._answer = answer
        self._max_active = max_active
        self._active = 0
        self._log = structlog.get_logger("orchestratord.api")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(CORRELATION_HEADER, "")
        identity = given if _ACCEPTED.fullmatch(given) else new_correlation_id()
        token = _correlation_id.set(identity)
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[CORRELATION_HEADER] = identity
                headers["x-request-id"] = identity
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        with structlog.contextvars.bound_contextvars(correlation_id=identity):
            self._active += 1
            try:
                await self._bounded(scope)(scope, receive, send_with_id)
            except Exception as error:
                self._log.error("request failed", path=_route(scope), **describe_exception(error))
                if status:
                    raise _AlreadyLoggedError from None  # the stream has begun: the server can only cut it
                failure = ApiError(ErrorCode.INTERNAL, "unexpected failure; the log has it under this correlation id")
                await self._answer(failure, scope["path"])(scope, receive, send_with_id)
            finally:
                self._active -= 1
                self._write_line(scope, status, time.monotonic() - started)
                _correlation_id.reset(token)

    def _bounded(self, scope: Scope) -> ASGIApp:
        """The app, or a refusal where too many requests are being answered already; probes and workers always pass."""
        if self._active <= self._max_active or scope["path"].startswith(_QUIET):
            return self._app
        refusal = ApiError(ErrorCode.RATE_LIMITED, "too many requests are open here; come back in a moment")
        return self._answer(refusal, scope["path"])

    def _write_line(self, scope: Scope, status: int, seconds: float) -> None:
        quiet = scope["path"].startswith(_QUIET) and status < 500
        write = self._log.debug if quiet else self._log.info
        write(
            "request",
            method=scope["method"],
            route=_route(scope),
            status=status,
            duration_ms=round(seconds * 1000, 1),
            tenant=scope.get("state", {}).get("tenant"),
        )


class _AlreadyLoggedError(Exception):
    """A route failed after its response had begun."""


def _route(scope: Scope) -> str:
    """The route's template, or nothing for a path that no route has: what a client types there is its own business."""
    route = scope.get("route")
    return str(getattr(route, "path", "")) or "-"
