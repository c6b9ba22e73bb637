"""One streamed answer: its first item decides between a stream and an error, its client may leave at any time.

    who wins?               first item   client gone   silence        then
    first item is an error      ×                                     a plain error response, no stream
    client gone first                         ×                       nothing is sent; `gone` is called
    nothing for a while                                     ×         headers and keep-alives now, items when they come

Read `EventStream.__call__` first. The frames come rendered; sse-starlette sends them, keeps the connection alive
and bounds each send. A client that left, or that takes nothing any more, is reported through `gone` exactly once.
A stream that ends because the task ended, or because this replica stops, is not a client that left. `closed` is called
at the end whatever happened.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar, cast

from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from llorch_wire.errors import ApiError, LlorchError
from llorch_wire.events import encode_data
from llorch_wire.sse import HEADERS, KEEP_ALIVE, frame
from orchestratord.api.errors import ClientGoneError
from orchestratord.patience import end_tasks
from orchestratord.runtime import StreamItem
from orchestratord.settings import Settings

FIRST_ITEM_S = 1.0
"""How long a stream's start is held back for its first item, so that an error can still be an HTTP status."""

T = TypeVar("T")
Source = AsyncGenerator[bytes, None]
OpenSource = Callable[[asyncio.TaskGroup], Source]
"""Makes the source; helpers that it needs run in the stream's own task group and end with it."""


def render(items: list[StreamItem]) -> bytes:
    """Frames of everything that is ready, for one send."""
    return b"".join([frame(item.event.EVENT, encode_data(item.event), item.position) for item in items])


class EventStream(EventSourceResponse):
    """An SSE answer over a source of rendered frames. Empty chunks of the source are skipped."""

    def __init__(
        self,
        source: OpenSource,
        settings: Settings,
        *,
        gone: Callable[[], Awaitable[None]] | None = None,
        closed: Callable[[], Awaitable[None]] | None = None,
        late_error: Callable[[ApiError], bytes] = lambda error: b"",
        first_within_s: float = FIRST_ITEM_S,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            self._body(),
            headers={**HEADERS, **(headers or {})},
            ping=settings.keep_alive_ms / 1000,
            # The factory's type says ServerSentEvent, but bytes pass through as they are.
            ping_message_factory=lambda: cast(ServerSentEvent, KEEP_ALIVE),
            send_timeout=settings.send_timeout_ms / 1000,
            client_close_handler_callable=self._on_close,
        )
        self._open = source
        self._source: Source | None = None
        self._gone = gone
        self._closed = closed
        self._late_error = late_error
        self._first_within_s = first_within_s
        self._first: asyncio.Task[bytes | ApiError | None] | None = None
        self._client_left = False
        self._finished = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream. Raises the source's ApiError when it comes before the response has begun."""
        failure: ApiError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                self._source = self._open(group)
                left = group.create_task(_until_disconnect(receive))
                first = self._first = group.create_task(self._take_first(self._source))
                await asyncio.wait({left, first}, timeout=self._first_within_s, return_when=asyncio.FIRST_COMPLETED)
                early = first.result() if first.done() else None
                if isinstance(early, ApiError):
                    failure = early
                elif left.done() and not first.done():
                    self._client_left = True
                else:
                    await self._serve(scope, left, send)
                await end_tasks([left, first])
                await self._source.aclose()
        finally:
            with contextlib.suppress(LlorchError):  # Redis is away: the task's own deadline and bounds take over
                if self._client_left and self._gone is not None:
                    await self._gone()
                if self._closed is not None:
                    await self._closed()
        if failure is not None:
            raise failure

    async def _serve(self, scope: Scope, left: asyncio.Task[None], send: Send) -> None:
        async def receive() -> Message:
            await asyncio.wait({left})
            return {"type": "http.disconnect"}

        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            self._client_left = True
            abort = scope.get("extensions", {}).get("llorch.connection", {}).get("abort")
            if abort is not None:
                abort()  # closing would wait for the very bytes that this reader doesn't take

    async def _take_first(self, source: Source) -> bytes | ApiError | None:
        try:
            async for chunk in source:
                if chunk:
                    return chunk
        except ApiError as error:
            return error
        return None

    async def _body(self) -> AsyncGenerator[bytes, None]:
        assert self._first is not None and self._source is not None
        chunk = await self._first
        failure = chunk if isinstance(chunk, ApiError) else None
        if isinstance(chunk, bytes):
            yield chunk
            try:
                async for chunk in self._source:
                    if chunk:
                        yield chunk
            except ApiError as error:
                failure = error
        if failure is not None:
            yield self._late_error(failure)
        self._finished = True

    async def _on_close(self, _message: Message) -> None:
        # Also called for a stream that is just being finished: the server reports the end of a response like this.
        if not self._finished:
            self._client_left = True


async def answer_or_leave(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work` while watching the client. Raises ClientGoneError when it leaves first; `work` is cancelled then.

    The body must have been read: afterwards the only thing that can still arrive is the disconnect.
    """
    async with asyncio.TaskGroup() as group:
        left = group.create_task(_until_disconnect(request.receive))
        working = group.create_task(_outcome(work))
        await asyncio.wait({left, working}, return_when=asyncio.FIRST_COMPLETED)
        await end_tasks([left, working])  # one cancellation alone may get lost in it
    if working.cancelled():
        raise ClientGoneError
    outcome = working.result()
    if isinstance(outcome, ApiError):
        raise outcome
    return outcome


async def _outcome(work: Coroutine[Any, Any, T]) -> T | ApiError:
    """The result, or the refusal as a value: raised inside a task group it would come out wrapped."""
    try:
        return await work
    except ApiError as error:
        return error


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
