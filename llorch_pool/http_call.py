"""Small HTTP calls to workers and to orchestratord: JSON in, JSON out, a deadline on each. No redirects, no proxy.

Control traffic stays between our own programs; a proxy from the environment would see the worker key. The HTTP modules
are imported by the first call: most commands on a pool make none, and every one of them starts anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from llorch_pool.errors import usage_error

_MAX_BODY_BYTES = 4 << 20


class Reply(NamedTuple):
    """Status and decoded body ({} when it isn't a JSON object)."""

    status: int
    body: dict[str, Any]

    @property
    def message(self) -> str:
        """The error's words, as orchestratord and workers put them."""
        error = self.body.get("error")
        return str(error.get("message", "")) if isinstance(error, dict) else ""


class NoReplyError(Exception):
    """Nothing answered in time; `str()` says why in words."""


def check_url(url: str, flag: str) -> str:
    """`url` without its trailing slash. Raises a usage error that names the flag."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        good = good and not parts.username and not parts.query and not parts.fragment
        good = good and url.isascii() and url.isprintable() and " " not in url
    except ValueError:
        good = False
    if not good:
        raise usage_error(f"{flag} {url!r} is not a URL like http://host:8080", f"Correct {flag} and run it again.")
    return url.rstrip("/")


def call(
    method: str, url: str, *, key: str | None = None, body: dict[str, Any] | None = None, timeout_s: float = 2.0
) -> Reply:
    """One request. Raises NoReplyError; any HTTP status is a reply."""
    import http.client
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    host = parts.hostname or ""
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        import ssl

        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(host, parts.port, timeout=timeout_s, context=context)
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
    headers = {"Accept": "application/json", "Connection": "close"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    payload = None
    if body is not None:
        payload = msgspec.json.encode(body)
        headers["Content-Type"] = "application/json"
    try:
        connection.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), payload, headers)
        response = connection.getresponse()
        data = response.read(_MAX_BODY_BYTES)
    except TimeoutError:
        raise NoReplyError(f"no answer within {timeout_s:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise NoReplyError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
    finally:
        connection.close()
    try:
        decoded = msgspec.json.decode(data) if data else {}
    except msgspec.DecodeError:
        decoded = {}
    return Reply(response.status, decoded if isinstance(decoded, dict) else {})
