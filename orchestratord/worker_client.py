"""HTTP to the workers: execute a generation, cancel, acknowledge, ask for health, drain.

Read `WorkerClient.execute` first. Streams and control calls have connections of their own, so that no number of open
streams can hold up a cancel. Nothing here decides what a failure means; the relay does.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from types import TracebackType

import aiohttp
import msgspec

from llorch_wire.errors import LlorchError
from llorch_wire.worker import WorkerHealth

CONTROL_TIMEOUT_S = 2.0
MAX_REPLY_BYTES = 256 * 1024
LARGE_BODY_BYTES = 2**19
"""From here on a body is sent piece by piece, so that the loop goes on in between."""
READ_BUFFER_BYTES = 64 * 1024
"""What a paused stream holds here before TCP holds the worker back."""


class WorkerUnreachableError(LlorchError):
    """The worker could not be connected to, or its connection broke. `sent`: the request may have arrived."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class WorkerStalledError(LlorchError):
    """An open stream gave no byte for too long."""


class StreamLostError(LlorchError):
    """An open stream broke off."""


class WorkerFault(msgspec.Struct, frozen=True):
    """One entry of a worker's 400."""

    field: str | None = None
    constraint: str = ""
    message: str = ""


class WorkerRefusal(msgspec.Struct, frozen=True):
    """Body of any non-200 answer, as far as it is understood."""

    errors: tuple[WorkerFault, ...] = ()
    code: str | None = None
    message: str = ""
    retry_after_ms: int | None = None


class WorkerStream:
    """An answered `/execute`: its status and, for 200, its bytes."""

    def __init__(self, response: aiohttp.ClientResponse, stall_s: float) -> None:
        self._response = response
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()
        self._reading_since: float | None = None
        self._bytes_then = 0
        self._timer: asyncio.TimerHandle | None = None
        self.status = response.status

    async def read(self) -> bytes:
        """What has come since the last call, b"" at the end. Raises WorkerStalledError, StreamLostError.

        Silence counts only while somebody reads: a stream that is paused for Redis' sake doesn't stall.
        """
        self._reading_since = self._loop.time()
        self._bytes_then = self._response.content.total_bytes
        if self._timer is None:  # one lazy timer a stream instead of one a read
            self._timer = self._loop.call_later(self._stall_s, self._check)
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise StreamLostError(f"the stream broke off: {type(error).__name__}") from error
        finally:
            self._reading_since = None

    async def refusal(self) -> WorkerRefusal:
        """The body of an answer that isn't 200; empty when it can't be read."""
        try:
            async with asyncio.timeout(CONTROL_TIMEOUT_S):
                body = await _read_all(self._response)
            return msgspec.json.decode(body, type=WorkerRefusal)
        except (TimeoutError, aiohttp.ClientError, msgspec.DecodeError):
            return WorkerRefusal()

    def close(self) -> None:
        """Drop the connection, whatever is in it."""
        if self._timer is not None:
            self._timer.cancel()
        self._response.close()

    def _check(self) -> None:
        since = self._reading_since
        # After a pause of this whole process the timer is due before the reader has seen what had come meanwhile.
        silent = since is not None and self._response.content.total_bytes == self._bytes_then
        waited = self._loop.time() - since if silent and since is not None else 0.0
        if waited >= self._stall_s:
            self._timer = None
            self._response.content.set_exception(WorkerStalledError(f"no byte for {waited:.1f} s"))
            return
        self._timer = self._loop.call_later(self._stall_s - waited, self._check)


class WorkerClient:
    """Both connection pools. Use as an async context manager."""

    def __init__(
        self,
        worker_key: str | None = None,
        *,
        connect_s: float = 2.0,
        stall_s: float = 2.5,
        probe_s: float = 1.0,
    ) -> None:
        self._headers = {"Authorization": f"Bearer {worker_key}"} if worker_key else {}
        self._connect_s = connect_s
        self._stall_s = stall_s
        self._probe_s = probe_s
        self._streams: aiohttp.ClientSession | None = None
        self._control: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> WorkerClient:
        self._streams = self._session(limit_per_host=0, total=None)
        self._control = self._session(limit_per_host=32, total=CONTROL_TIMEOUT_S)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for session in (self._streams, self._control):
            if session is not None:
                await session.close()

    def _session(self, *, limit_per_host: int, total: float | None) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, limit_per_host=limit_per_host, keepalive_timeout=15),
            timeout=aiohttp.ClientTimeout(total=total, connect=self._connect_s, sock_connect=self._connect_s),
            headers=self._headers,
            read_bufsize=READ_BUFFER_BYTES,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )

    @asynccontextmanager
    async def execute(self, url: str, body: bytes, *, after: int, correlation_id: str) -> AsyncGenerator[WorkerStream]:
        """Start, continue or re-attach to one attempt. `after` skips tokens up to that index, -1 for none.

        Raises WorkerUnreachableError. The connection is dropped on leaving: what runs at the worker goes on.
        """
        assert self._streams is not None
        target = f"{url}/execute?after={after}"
        headers = _headers(correlation_id) | {"Content-Type": "application/json", "Accept": "text/event-stream"}
        try:
            # The answer's head comes as soon as the worker has taken the request, long before the first token.
            async with asyncio.timeout(max(self._connect_s, self._stall_s)):
                data = body if len(body) < LARGE_BODY_BYTES else io.BytesIO(body)
                response = await self._streams.post(target, data=data, headers=headers, allow_redirects=False)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, ValueError) as error:  # or no URL at all
            raise WorkerUnreachableError(f"can't connect: {type(error).__name__}", sent=False) from error
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise WorkerUnreachableError(f"no answer: {type(error).__name__}", sent=True) from error
        stream = WorkerStream(response, self._stall_s)
        try:
            yield stream
        finally:
            stream.close()

    async def health(self, url: str) -> WorkerHealth | None:
        """The worker's own word, None when it gives none in time."""
        assert self._control is not None
        try:
            async with asyncio.timeout(self._probe_s), self._control.get(f"{url}/health") as response:
                return WorkerHealth.model_validate_json(await _read_all(response))
        except (aiohttp.ClientError, ConnectionError, TimeoutError, ValueError):  # or no URL, or no health
            return None

    async def cancel(self, url: str, task_id: str, attempt: int, reason: str, correlation_id: str = "") -> bool:
        """Stop an attempt; it is idempotent there. False when the worker didn't confirm."""
        return await self._post(
            f"{url}/cancel", {"task_id": task_id, "attempt": attempt, "reason": reason}, correlation_id, ok=(200, 404)
        )

    async def acknowledge(self, url: str, task_id: str, attempt: int, correlation_id: str = "") -> bool:
        """The attempt's terminal event is in the log: the worker may forget it."""
        return await self._post(
            f"{url}/ack", {"task_id": task_id, "attempt": attempt}, correlation_id, ok=(200, 204, 404)
        )

    async def drain(self, url: str, deadline_ms: int) -> bool:
        """Take nothing new."""
        return await self._post(f"{url}/drain", {"deadline_ms": deadline_ms}, "", ok=(200, 202, 204))

    async def _post(self, url: str, body: dict[str, object], correlation_id: str, ok: Iterable[int]) -> bool:
        assert self._control is not None
        headers = _headers(correlation_id) | {"Content-Type": "application/json"}
        data = msgspec.json.encode(body)
        for fresh in (False, True):  # all of these may be repeated: a kept connection may have died meanwhile
            try:
                async with self._control.post(url, data=data, headers=headers, allow_redirects=False) as response:
                    await _read_all(response)
                    return response.status in ok
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError):
                if fresh:
                    return False
            except (aiohttp.ClientError, TimeoutError, ValueError):
                return False
        return False


async def _read_all(response: aiohttp.ClientResponse) -> bytes:
    """The whole body, cut at MAX_REPLY_BYTES."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_REPLY_BYTES:
            response.close()
            break
    return bytes(body[:MAX_REPLY_BYTES])


def _headers(correlation_id: str) -> dict[str, str]:
    return {"X-Correlation-Id": correlation_id} if correlation_id else {}
