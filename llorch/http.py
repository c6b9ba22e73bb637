"""The one file that reaches orchestratord (and workers on this machine) over HTTP. Read `Api` first.

Standard library only, one connection per request: a command's start costs more than its connections. Nothing here
retries; who calls decides that. Every wait is bounded, and so is every answer.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, quote, urlencode, urlsplit

from llorch.config import Settings
from llorch.errors import AccessProblem, ApiFailure, CliError, TimedOut, Unreachable, UsageProblem
from llorch_wire.sse import MEDIA_TYPE, SseFrame, SseOverflowError, SseParser

if TYPE_CHECKING:  # with ssl it is a third of a command's start, and no --help needs it
    import http.client

CONNECT_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 64 * 2**20
READ_BYTES = 64 * 2**10

Query = Mapping[str, str | int | None]


class Api:
    """orchestratord at one address, with one key.

    Failures: Unreachable (no connection, or it broke), TimedOut (silence), ApiFailure (an error object came back).
    """

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        self.url = url.rstrip("/")
        self._parts = _checked(self.url)
        self._key = _checked_key(key)
        self._timeout_s = timeout_s

    def get(self, path: str, query: Query | None = None, *, timeout_s: float | None = None) -> Any:
        """The JSON answer to a GET."""
        return self.request("GET", path, query=query, timeout_s=timeout_s)

    def post(self, path: str, body: Any = None, *, timeout_s: float | None = None) -> Any:
        """The JSON answer to a POST."""
        return self.request("POST", path, body={} if body is None else body, timeout_s=timeout_s)

    def request(
        self, method: str, path: str, *, query: Query | None = None, body: Any = None, timeout_s: float | None = None
    ) -> Any:
        """The JSON answer, None for an empty one."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        connection, response = self._send(method, path, query, body, {"Accept": "application/json"}, timeout_s)
        try:
            return self._json(response)
        finally:
            connection.close()

    def stream(self, path: str, *, after: str | None = None, silence_s: float = 30.0) -> EventStream:
        """Open a stream of server-sent events after the position `after`; `silence_s` without a byte breaks it."""
        headers = {"Accept": MEDIA_TYPE, "Cache-Control": "no-cache"}
        if after is not None:
            headers["Last-Event-ID"] = after
        connection, response = self._send("GET", path, None, None, headers, silence_s)
        kind = response.headers.get_content_type()
        if response.status != 200 or kind != MEDIA_TYPE:
            try:
                self._json(response)
            finally:
                connection.close()
            raise self._not_orchestratord(f"{path} answered {response.status} {kind}")
        return EventStream(connection, response, self.url)

    def _send(
        self, method: str, path: str, query: Query | None, body: Any, headers: dict[str, str], timeout_s: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        import http.client

        target = self._parts.path + path
        if query and (given := {name: value for name, value in query.items() if value is not None}):
            target += "?" + urlencode(given)
        payload = None
        if body is not None:
            payload = json.dumps(body, ensure_ascii=False).encode()
            headers["Content-Type"] = "application/json"
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        connection = self._connect(timeout_s)
        try:
            connection.request(method, target, body=payload, headers=headers)
            return connection, connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._broken(error, timeout_s, connected=True) from error
        except BaseException:
            connection.close()
            raise

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        import http.client

        host, port = self._parts.hostname or "", self._parts.port
        connect_s = min(CONNECT_TIMEOUT_S, timeout_s)
        if self._parts.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(host, port, timeout=connect_s)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=connect_s)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise self._broken(error, connect_s, connected=False) from error
        connection.sock.settimeout(timeout_s)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return connection

    def _json(self, response: http.client.HTTPResponse) -> Any:
        import http.client

        try:
            raw = response.read(MAX_ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error, self._timeout_s, connected=True) from error
        if len(raw) > MAX_ANSWER_BYTES:
            raise CliError(
                f"the answer of {self.url} is larger than {MAX_ANSWER_BYTES >> 20} MiB",
                next_step="ask for less, for example with --limit",
            )
        if 200 <= response.status < 300:
            if not raw:
                return None
            try:
                return json.loads(raw)
            except ValueError:
                raise self._not_orchestratord("the answer is not JSON") from None
        raise self._failure(response, raw)

    def _failure(self, response: http.client.HTTPResponse, raw: bytes) -> CliError:
        status = response.status
        try:
            document = json.loads(raw)
        except ValueError:
            document = None
        error = document.get("error") if isinstance(document, dict) else None
        if not isinstance(error, dict) or not isinstance(error.get("message"), str):
            return self._not_orchestratord(f"it answered {status} {response.reason}")
        code = str(error.get("code") or "")
        return ApiFailure(
            status,
            code,
            error["message"],
            next_step=_next_step(status, code, self.url),
            param=error.get("param"),
            retriable=bool(error.get("retriable")),
            retry_after_ms=_retry_after_ms(error.get("retry_after_ms"), response.headers.get("Retry-After")),
        )

    def _broken(self, error: Exception, timeout_s: float, *, connected: bool) -> CliError:
        if isinstance(error, TimeoutError) and connected:
            return TimedOut(
                f"{self.url} did not answer within {timeout_s:g} s", next_step=f"curl -m 5 {self.url}/health"
            )
        if type(error).__name__ == "SSLCertVerificationError":
            return AccessProblem(
                f"the certificate of {self.url} is not trusted: {error}",
                next_step="export SSL_CERT_FILE=CA.pem",
            )
        return Unreachable(
            f"orchestratord can't be reached at {self.url}: {_reason(error)}",
            next_step="llorch up    (or name another address with --url or LLORCH_URL)",
            connected=connected,
        )

    def _not_orchestratord(self, what: str) -> Unreachable:
        return Unreachable(
            f"something that is not orchestratord is at {self.url}: {what}", next_step="llorch config show --origin"
        )


class EventStream:
    """An open stream. Iterating gives the events of one network read at a time, [] for a keep-alive.

    Ends when the peer closes it; raises Unreachable when the connection breaks and TimedOut in silence.
    """

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, url: str) -> None:
        self._connection = connection
        self._response = response
        self._url = url
        self._parser = SseParser()

    def __iter__(self) -> Iterator[list[SseFrame]]:
        while chunk := self._read():
            try:
                yield self._parser.feed(chunk)
            except SseOverflowError as error:
                raise Unreachable(f"{self._url}: {error}", next_step="llorch status", connected=True) from None

    def _read(self) -> bytes:
        import http.client

        try:
            return self._response.read1(READ_BYTES)
        except TimeoutError:
            raise TimedOut(f"{self._url} fell silent", next_step=f"curl -m 5 {self._url}/health") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise Unreachable(
                f"the stream from {self._url} broke: {_reason(error)}", next_step="llorch status", connected=True
            ) from None

    def close(self) -> None:
        """Hang up."""
        self._response.close()
        self._connection.close()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(url_flag: str | None = None, *, timeout_s: float = REQUEST_TIMEOUT_S) -> Api:
    """The orchestratord that settings and `--url` name."""
    settings = Settings()
    return Api(settings.value("url", url_flag), settings.get("api_key").value, timeout_s=timeout_s)


def rows(document: Any, key: str) -> list[dict[str, Any]]:
    """The objects of a listing, which stand under `key`."""
    found = document.get(key) if isinstance(document, dict) else None
    if not isinstance(found, list):
        raise CliError(f"orchestratord's answer has no `{key}`", next_step="llorch status    (compares versions)")
    return [row for row in found if isinstance(row, dict)]


def segment(text: str) -> str:
    """An id as one segment of a path, whatever it holds."""
    return quote(text, safe="")


def _checked(url: str) -> SplitResult:
    advice = "give it as http://HOST:PORT (flag --url, or LLORCH_URL)"
    try:
        parts = urlsplit(url)
        bad = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:
        raise UsageProblem("the orchestratord URL is not a valid URL", next_step=advice) from None
    if parts.username is not None or parts.password is not None:
        raise UsageProblem("the orchestratord URL must not hold a password", next_step="export LLORCH_API_KEY")
    if bad or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise UsageProblem(f"{url!r} is not a URL that orchestratord can be at", next_step=advice)
    return parts


def _checked_key(key: str | None) -> str | None:
    if key is None:
        return None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UsageProblem("LLORCH_API_KEY must be printable ASCII", next_step="llorch config show --origin")
    return key


def _next_step(status: int, code: str, url: str) -> str:
    if status == 401:
        return "export LLORCH_API_KEY=...    (`llorch up` says where its key is)"
    if status == 403:
        return "use a key of tenant `admin`, or the worker key, in LLORCH_API_KEY"
    known = {
        "MODEL_NOT_FOUND": "llorch worker list    (shows what is served)",
        "NO_WORKERS": "llorch worker list",
        "QUEUE_FULL": "llorch queue show",
        "NOT_FOUND": "llorch task list",
        "GONE": "llorch task show TASK_ID",
        "CONTEXT_LENGTH_EXCEEDED": "shorten the prompt",
        "STORE_UNAVAILABLE": "llorch status",
    }
    if code in known:
        return known[code]
    return "correct what the message names" if status < 500 else f"curl -m 5 {url}/ready"


def _retry_after_ms(field: Any, header: str | None) -> int | None:
    if isinstance(field, int) and field >= 0:
        return field
    return int(header) * 1000 if header and header.isascii() and header.isdigit() else None


def _reason(error: Exception) -> str:
    import http.client

    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there (connection refused)"
    if isinstance(error, TimeoutError):
        return f"no connection within {CONNECT_TIMEOUT_S:g} s"
    if isinstance(error, socket.gaierror):
        return "the host name is not known"
    if isinstance(error, http.client.IncompleteRead | http.client.RemoteDisconnected | ConnectionResetError):
        return "the connection was cut"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
