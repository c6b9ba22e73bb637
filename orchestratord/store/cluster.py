"""Redis Cluster as this store needs it: its keys share one slot, so everything goes to the one node that holds it.

redis-py's own cluster client routes every command by itself, which buys nothing here, and doesn't survive trouble: it
closes all connections under the commands that use them when one fails, and forgets the nodes it was given, the last one
included. Here a connection asks for the slot's holder when it connects, as redis-py's Sentinel connections ask for the
master. Read `SlotConnection.connect`.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from typing import Any

from redis import exceptions
from redis.asyncio.connection import Connection, ConnectionPool
from redis.crc import key_slot

from orchestratord.store.keys import ANCHOR

Address = tuple[str, int]

ASK_TIMEOUT_S = 1.0
MAX_KNOWN = 64
_ELSEWHERE = ("MOVED", "ASK", "CLUSTERDOWN", "MASTERDOWN", "READONLY")
"""Words by which a node says that it doesn't serve the slot, or not now."""


class SlotConnection(Connection):
    """A connection to the node that holds the store's slot when it connects."""

    def __init__(self, *, connection_pool: SlotPool, **options: Any) -> None:
        self._pool = connection_pool
        super().__init__(**options)

    async def connect(self) -> None:
        """Ask for the holder, then connect to it. Raises ConnectionError and TimeoutError (redis-py's)."""
        if self.is_connected:
            return
        self.host, self.port = await self._pool.holder()
        try:
            await super().connect()
        except (exceptions.ConnectionError, exceptions.TimeoutError):
            self._pool.forget((self.host, self.port))
            raise

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """As its base; a node that serves the slot no longer is a broken connection, so that the next one asks anew."""
        try:
            return await super().read_response(*args, **options)
        except exceptions.ResponseError as error:
            word = str(error).split(" ", 1)[0]
            if word not in _ELSEWHERE and not isinstance(error, exceptions.ReadOnlyError):
                raise
            self._pool.forget((self.host, self.port))
            await self.disconnect(nowait=True)
            raise exceptions.ConnectionError(f"this node doesn't serve the slot now: {word}") from error


class SlotPool(ConnectionPool):
    """Connections to whichever node holds the store's slot. `nodes` are asked which; so are those that they name."""

    def __init__(self, nodes: Sequence[Address], **options: Any) -> None:
        super().__init__(connection_class=SlotConnection, **options)
        self._asking = {
            name: options[name] for name in ("username", "password") if options.get(name) is not None
        }  # fmt: skip
        self.connection_kwargs["connection_pool"] = weakref.proxy(self)
        self._seeds = tuple(nodes)
        self._learned: tuple[Address, ...] = ()
        self._holder: Address | None = None
        self._finding = asyncio.Lock()

    def forget(self, address: Address) -> None:
        """This one didn't answer, or doesn't hold the slot: ask again before the next connection."""
        if self._holder == address:
            self._holder = None

    async def holder(self) -> Address:
        """The node to connect to. Raises redis-py's ConnectionError when no node names one."""
        async with self._finding:
            if self._holder is None:
                self._holder = await self._find()
            return self._holder

    async def _find(self) -> Address:
        for address in dict.fromkeys((*self._learned, *self._seeds)):
            try:
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    rows = await self._ask(address)
            except (exceptions.RedisError, OSError, TimeoutError):
                continue
            holder = _holder_of(rows, address)
            if holder is not None:
                self._learned = tuple(dict.fromkeys(_nodes_of(rows, address)))[:MAX_KNOWN]
                return holder
        raise exceptions.ConnectionError("no node of the cluster names one that holds the slot")

    async def _ask(self, address: Address) -> list[Any]:
        connection = Connection(
            host=address[0], port=address[1], socket_timeout=ASK_TIMEOUT_S, socket_connect_timeout=ASK_TIMEOUT_S,
            **self._asking,
        )  # fmt: skip
        try:
            await connection.connect()
            await connection.send_command("CLUSTER", "SLOTS")
            return await connection.read_response() or []
        finally:
            await connection.disconnect(nowait=True)


def _holder_of(rows: list[Any], asked: Address) -> Address | None:
    """The master of the store's slot in an answer to CLUSTER SLOTS: rows of first slot, last slot, master, replicas."""
    slot = key_slot(ANCHOR.encode())
    for first, last, master, *_ in rows:
        if first <= slot <= last:
            return _address(master, asked)
    return None


def _nodes_of(rows: list[Any], asked: Address) -> list[Address]:
    return [_address(node, asked) for row in rows for node in row[2:]]


def _address(node: list[Any], asked: Address) -> Address:
    """A node that doesn't know its own address is the one that was asked."""
    host = node[0].decode() if node[0] else ""
    return host if host not in ("", "?") else asked[0], int(node[1])
