"""The worker's HTTP API: parse, call, answer. What a generation is and how it ends lives in `generations`.

Read `execute` first.

    POST /execute   start, continue or re-attach; answers with the event stream
    POST /cancel /ack /drain /undrain /shutdown
    GET  /health /metrics
"""

from __future__ import annotations

import hmac
import re
from typing import Protocol, TypeVar

import orjson
import structlog
from pydantic import BaseModel, ValidationError
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llorch_wire.errors import ErrorCode
from llorch_wire.sse import HEADERS
from llorch_wire.worker import AckRequest, CancelRequest, DrainRequest, ExecuteRequest, WorkerHealth
from worker.generation import Generation
from worker.generations import Generations
from worker.http_limits import BodyTimeoutError, BodyTooLargeError, read_body
from worker.logs import stack_of
from worker.metrics import CONTENT_TYPE, WorkerMetrics
from worker.refusals import FieldError, Refused, invalid, invalid_body, refused
from worker.validation import parse_execute

SEND_TIMEOUT_S = 30.0
NO_PING_S = 24 * 3600  # generations send their own comments; 0 doesn't switch pings off in every release
_CORRELATION_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
BodyModel = TypeVar("BodyModel", bound=BaseModel)


class WorkerService(Protocol):
    """What the server needs of the worker behind it."""

    generations: Generations
    metrics: WorkerMetrics

    async def start(self, request: ExecuteRequest, correlation_id: str) -> Generation:
        """Start a new attempt, or find that it exists meanwhile. Raises Refused."""
        ...

    def health(self) -> WorkerHealth:
        """State of this worker, at once."""
        ...

    def drain(self, deadline_s: float | None) -> None:
        """Take no new work; let what still runs at the deadline yield."""
        ...

    def undrain(self) -> None:
        """Take work again."""
        ...

    def shut_down(self) -> None:
        """Drain, then end the process."""
        ...


class EventStream(EventSourceResponse):
    """An event stream of pre-rendered bytes. A reader that takes nothing for half a minute is cut off."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            # uvicorn closes the connection of an answer that ends unfinished.
            structlog.get_logger("worker.server").info("a reader took nothing and was cut off")


class WorkerApi:
    """The routes over one worker."""

    def __init__(self, service: WorkerService, *, max_body_bytes: int) -> None:
        self._service = service
        self._max_body_bytes = max_body_bytes

    def routes(self) -> list[Route]:
        """Every route."""
        return [
            Route("/execute", self.execute, methods=["POST"]),
            Route("/cancel", self.cancel, methods=["POST"]),
            Route("/ack", self.acknowledge, methods=["POST"]),
            Route("/drain", self.drain, methods=["POST"]),
            Route("/undrain", self.undrain, methods=["POST"]),
            Route("/shutdown", self.shut_down, methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]

    async def execute(self, request: Request) -> Response:
        """Attach where the attempt is known here, else start it; then stream."""
        after = _after(request.query_params.get("after"))
        body = parse_execute(await read_body(request, self._max_body_bytes))
        generation = self._known(body, after)
        if body.attach_instance_id is not None and (
            generation is None or generation.started.instance_id != body.attach_instance_id
        ):
            raise refused(ErrorCode.NOT_FOUND, "no such attempt in that instance; start a new attempt", field="attempt")
        if generation is None:
            _check_not_ahead(after, len(body.resume_token_ids))
            generation = await self._service.start(body, _correlation_id(request))
        else:
            _check_not_ahead(after, generation.next_index)
            self._service.metrics.reattached()
        if after is None:
            after = generation.first_index - 1
        reader = self._service.generations.read(generation, after)
        return EventStream(reader.chunks(), headers=HEADERS, ping=NO_PING_S, send_timeout=SEND_TIMEOUT_S)

    def _known(self, body: ExecuteRequest, after: int | None) -> Generation | None:
        """The generation that the request means. One of an undone history, which can't give what is wanted, is none."""
        generation = self._service.generations.find(body.task_id, body.attempt)
        if generation is None:
            return None
        if body.attach_instance_id is None:
            seed, wanted = body.seed, len(body.resume_token_ids)
        else:  # what it doesn't say is as it is here
            seed = body.seed if "seed" in body.model_fields_set else generation.seed
            wanted = generation.first_index if after is None else after + 1
        return generation if generation.is_history_of(seed, wanted) else None

    async def cancel(self, request: Request) -> Response:
        """Stop an attempt."""
        body = await self._parse(request, CancelRequest)
        reply = self._service.generations.cancel(body.task_id, body.attempt, body.reason)
        return _json(reply.model_dump())

    async def acknowledge(self, request: Request) -> Response:
        """Forget an ended attempt."""
        body = await self._parse(request, AckRequest)
        return _json({"found": self._service.generations.acknowledge(body.task_id, body.attempt)})

    async def drain(self, request: Request) -> Response:
        """Take no new work."""
        body = await self._parse(request, DrainRequest)
        self._service.drain(body.deadline_ms / 1000)
        return _json(self._service.health().model_dump())

    async def undrain(self, _request: Request) -> Response:
        """Take work again."""
        self._service.undrain()
        return _json(self._service.health().model_dump())

    async def shut_down(self, _request: Request) -> Response:
        """Drain and end."""
        self._service.shut_down()
        return _json(self._service.health().model_dump(), status=202)

    async def health(self, _request: Request) -> Response:
        """State, whatever it is."""
        return _json(self._service.health().model_dump())

    async def metrics(self, _request: Request) -> Response:
        """Prometheus text."""
        return Response(self._service.metrics.render(), media_type=CONTENT_TYPE)

    async def _parse(self, request: Request, model: type[BodyModel]) -> BodyModel:
        body = await read_body(request, self._max_body_bytes)
        try:
            return model.model_validate_json(body or b"{}")
        except ValidationError as error:
            raise invalid_body(error) from None


def build_app(service: WorkerService, *, key: str | None, max_body_bytes: int) -> ASGIApp:
    """The whole ASGI application. With a key every route asks for it."""
    answers = _Answers(service)
    app = Starlette(
        routes=WorkerApi(service, max_body_bytes=max_body_bytes).routes(),
        exception_handlers={
            Refused: answers.refused,
            BodyTooLargeError: answers.body,
            BodyTimeoutError: answers.body,
            ClientDisconnect: answers.gone,
            HTTPException: answers.http,
            Exception: answers.unexpected,
        },
    )
    return app if key is None else KeyCheck(app, key)


class KeyCheck:
    """Asks for `Authorization: Bearer KEY` before anything else; compares in constant time."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = b"Bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] == "http":
            given = Headers(scope=scope).get("authorization", "").encode()
            if not hmac.compare_digest(given, self._expected):
                message = "send the worker key as `Authorization: Bearer …` (LLORCH_WORKER_KEY)"
                answer = _refusal(refused(ErrorCode.UNAUTHORIZED, message))
                answer.headers["WWW-Authenticate"] = "Bearer"
                return await answer(scope, receive, send)
        await self._app(scope, receive, send)


class _Answers:
    """Exceptions as answers."""

    def __init__(self, service: WorkerService) -> None:
        self._service = service
        self._log = structlog.get_logger("worker.server")

    async def refused(self, _request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        self._service.metrics.refused(error.code)
        return _refusal(error)

    async def body(self, request: Request, error: Exception) -> Response:
        if isinstance(error, BodyTooLargeError):
            return await self.refused(request, refused(ErrorCode.PAYLOAD_TOO_LARGE, str(error)))
        return await self.refused(request, Refused(408, "TIMEOUT", FieldError(None, "timeout", str(error))))

    async def gone(self, _request: Request, _error: Exception) -> Response:
        return Response(status_code=400)  # nobody reads it: the client left in the middle of its request

    async def http(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: ErrorCode.NOT_FOUND, 405: ErrorCode.METHOD_NOT_ALLOWED}.get(error.status_code)
        message = "no such path or method here; see POST /execute, /cancel, /ack, /drain and GET /health, /metrics"
        found = FieldError(None, "route", message)
        return await self.refused(request, Refused(error.status_code, code or ErrorCode.INVALID_PARAMS, found))

    async def unexpected(self, _request: Request, error: Exception) -> Response:
        self._log.error("a request failed", **stack_of(error))
        return _refusal(
            Refused(500, ErrorCode.INTERNAL, FieldError(None, "internal", "unexpected failure; see the log"))
        )


def _correlation_id(request: Request) -> str:
    given = request.headers.get("x-correlation-id", "")
    return given if _CORRELATION_ID.fullmatch(given) else ""


def _after(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.removeprefix("-").isascii() and text.removeprefix("-").isdigit() and len(text) <= 10):
        raise invalid("after", "integer", "`after`: must be the index of the last token you have, -1 for none")
    return int(text)


def _check_not_ahead(after: int | None, tokens: int) -> None:
    """Before a new attempt is started: nobody would read what it computes."""
    if after is not None and after >= tokens:
        message = (
            f"`after`: {after} is ahead of this generation, which has {tokens} tokens; send the index of the last "
            f"token you have, at most {tokens - 1}"
        )
        raise refused(ErrorCode.CONFLICT, message, field="after")


def _refusal(error: Refused) -> Response:
    answer = _json(error.as_json(), status=error.status)
    if error.retry_after_s is not None:
        answer.headers["Retry-After"] = str(error.retry_after_s)
    return answer


def _json(content: object, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status_code=status, media_type="application/json")
