"""How the store reaches Redis: what a URL means, and how a command fails.

Read `connect` for the first and `Connection.call` for the second: every command goes through it, with one deadline, one
bound on how many are in flight, and one meaning of failure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeVar
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import msgspec
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel

from orchestratord.store.cluster import SlotPool
from orchestratord.store.errors import StoreUnavailableError, StoreUrlError
from orchestratord.store.keys import ANCHOR
from orchestratord.store.scripts import load

FORMS = (
    "redis://host:6379/0, rediss://host:6380/0, unix:///path/to/redis.sock, "
    "redis+sentinel://host:26379,host:26379/service/0 or redis+cluster://host:6379,host:6379"
)
MAX_IN_FLIGHT = 32
SLOW_S = 1.0
"""A command that takes longer than this means that Redis, or the way to it, stood still."""

# A refusal to write, as redis-py names it (it cuts the first word off then) or as Redis does.
_REFUSALS = (
    exceptions.ReadOnlyError,
    exceptions.ClusterDownError,
    exceptions.MasterDownError,
    exceptions.TryAgainError,
    exceptions.AskError,
    exceptions.MovedError,
)
_REFUSING_WORDS = ("MISCONF", "NOREPLICAS", "BUSY", "LOADING", "UNKILLABLE")
T = TypeVar("T")


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed Redis URL. `nodes` are Sentinels or cluster nodes; empty for a single server, whose `url` is used."""

    kind: Literal["single", "sentinel", "cluster"]
    url: str
    shown: str
    """For messages: without user and password."""
    nodes: tuple[tuple[str, int], ...] = ()
    service: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = None
    sentinel_password: str | None = None


def parse_url(url: str) -> Target:
    """What a Redis URL names. Raises StoreUrlError; its message never holds a password."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("redis", "rediss"):
            if not parts.hostname:
                raise ValueError("it names no host")
            shown = f"{parts.scheme}://{parts.hostname}:{_port(parts) or 6379}{parts.path}"
            return Target(kind="single", url=url, shown=shown)
        if parts.scheme == "unix":
            if not parts.path:
                raise ValueError("it names no path")
            return Target(kind="single", url=url, shown=f"unix://{parts.path}")
        if parts.scheme == "redis+sentinel":
            return _sentinel(url, parts)
        if parts.scheme == "redis+cluster":
            user, password, nodes = _nodes(parts, 6379)
            shown = "redis+cluster://" + ",".join(f"{host}:{port}" for host, port in nodes)
            return Target(kind="cluster", url=url, shown=shown, nodes=nodes, username=user, password=password)
    except ValueError as error:
        raise StoreUrlError(f"the Redis URL can't be understood: {error}; use {FORMS}") from None
    raise StoreUrlError(f"the Redis URL can't be understood: unknown scheme {parts.scheme[:32]!r}; use {FORMS}")


def _sentinel(url: str, parts: SplitResult) -> Target:
    user, password, nodes = _nodes(parts, 26379)
    service, _, db = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("it names no Sentinel service")
    if db and not db.isdigit():
        raise ValueError("the database is not a number")
    shown = "redis+sentinel://" + ",".join(f"{host}:{port}" for host, port in nodes) + f"/{service}"
    return Target(
        kind="sentinel",
        url=url,
        shown=shown,
        nodes=nodes,
        service=unquote(service),
        db=int(db or 0),
        username=user,
        password=password,
        sentinel_password=parse_qs(parts.query).get("sentinel_password", [None])[0],
    )


def _nodes(parts: SplitResult, default_port: int) -> tuple[str | None, str | None, tuple[tuple[str, int], ...]]:
    credentials, separator, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    nodes: list[tuple[str, int]] = []
    for item in hosts.split(","):
        one = urlsplit(f"//{item}")
        if not one.hostname:
            raise ValueError("a host is empty")
        nodes.append((one.hostname, _port(one) or default_port))
    return unquote(user) or None, (unquote(password) if separator else None) or None, tuple(nodes)


def _port(parts: SplitResult) -> int | None:
    try:
        return parts.port
    except ValueError:  # its message quotes what stands there, which may be a password
        raise ValueError("a port is not a number below 65536") from None


def make_client(target: Target, timeout_s: float) -> Any:
    """A redis-py client for the target; it connects when it is used."""
    options: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    bound = MAX_IN_FLIGHT + 32  # the semaphore is the real bound; hints hold connections of their own
    if target.kind == "single":
        return Redis.from_url(target.url, max_connections=bound, **options)
    options |= {"username": target.username, "password": target.password}
    if target.kind == "cluster":
        return Redis.from_pool(SlotPool(target.nodes, max_connections=bound, **options))
    sentinel = Sentinel(
        list(target.nodes),
        sentinel_kwargs={"password": target.sentinel_password, "socket_timeout": 1.0, "socket_connect_timeout": 1.0},
    )
    return sentinel.master_for(target.service, db=target.db, max_connections=bound, **options)


class Connection:
    """Commands to one Redis, however it is deployed. `client` is redis-py's, or fakeredis' with the same methods."""

    def __init__(self, client: Any, shown: str, timeout_s: float) -> None:
        self.client = client
        self.shown = shown
        self.timeout_s = timeout_s
        self._slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._deadlines: set[asyncio.Timeout] = set()
        """Of the commands in flight."""
        self._trouble_at = time.monotonic()

    def healthy_for_s(self) -> float:
        """Seconds since the last command that failed or was slow, or since this was made."""
        return time.monotonic() - self._trouble_at

    def trouble(self) -> None:
        """Redis, or the way to it, was seen to fail or to stand still."""
        self._trouble_at = time.monotonic()

    def hurry(self, timeout_s: float) -> None:
        """From now on no command, nor one in flight, waits longer than this: whoever waits for it is about to end."""
        self.timeout_s = min(self.timeout_s, timeout_s)
        latest = asyncio.get_running_loop().time() + timeout_s
        for deadline in self._deadlines:
            due = deadline.when()
            if not deadline.expired() and (due is None or due > latest):
                deadline.reschedule(latest)

    async def run(self, script: str, *args: str | bytes | int | float) -> Any:
        """Runs a script by its name. Safe to repeat: each one recognises its own second call."""
        code = load(script)

        async def once() -> Any:
            try:
                return await self.client.evalsha(code.sha, 1, ANCHOR, *args)
            except exceptions.NoScriptError:
                return await self.client.eval(code.text, 1, ANCHOR, *args)

        return await self.call(once)

    async def call(self, command: Callable[[], Awaitable[T]]) -> T:
        """One command, tried again once when its connection breaks. Raises StoreUnavailableError."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout_s) as deadline:
                self._deadlines.add(deadline)
                try:
                    async with self._slots:
                        started = time.monotonic()
                        result = await self._tried(command)
                finally:
                    self._deadlines.discard(deadline)
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            raise self._unavailable(error) from error
        if time.monotonic() - started > SLOW_S:
            self.trouble()
        return result

    async def _tried(self, command: Callable[[], Awaitable[T]]) -> T:
        try:
            return await _attempt(command)
        except exceptions.ConnectionError:
            self.trouble()
            return await _attempt(command)

    def _unavailable(self, error: Exception) -> Exception:
        if isinstance(error, TimeoutError | exceptions.TimeoutError):
            self.trouble()
            return StoreUnavailableError(f"Redis at {self.shown} did not answer within {self.timeout_s:g} s")
        if isinstance(error, exceptions.ResponseError):
            word = str(error).split(" ", 1)[0].removeprefix("-")
            if isinstance(error, exceptions.OutOfMemoryError):
                return StoreUnavailableError(f"Redis at {self.shown} is full (maxmemory): finished tasks must go first")
            if not isinstance(error, _REFUSALS) and word not in _REFUSING_WORDS:
                return error  # a mistake of ours: a script's error must not pass for an outage
            self.trouble()
            return StoreUnavailableError(f"Redis at {self.shown} refuses: {str(error)[:200]}")
        self.trouble()
        return StoreUnavailableError(f"Redis at {self.shown} can't be reached: {type(error).__name__}")

    async def aclose(self) -> None:
        """Closes every connection."""
        await self.client.aclose()
        sentinel = getattr(self.client.connection_pool, "sentinel_manager", None)
        for client in [] if sentinel is None else sentinel.sentinels:
            await client.aclose()


async def _attempt(command: Callable[[], Awaitable[T]]) -> T:
    """One command, on a connection that may be closed in this very moment: uvloop (RuntimeError: "the handler is
    closed") and redis-py (AttributeError: its writer is None) don't call that a broken connection."""
    try:
        return await command()
    except (RuntimeError, AttributeError) as error:
        if "closed" not in str(error) and "NoneType" not in str(error):
            raise
        raise exceptions.ConnectionError("the connection was closed under the command") from error


async def connect(url: str, timeout_s: float) -> Connection:
    """A connection that has answered once. Raises StoreUrlError and StoreUnavailableError."""
    target = parse_url(url)
    try:
        client = make_client(target, timeout_s)
    except ValueError as error:
        raise StoreUrlError(f"the Redis URL can't be understood: {error}; use {FORMS}") from None
    connection = Connection(client, target.shown, timeout_s)
    try:
        await connection.call(client.ping)
    except BaseException:
        await connection.aclose()
        raise
    return connection
