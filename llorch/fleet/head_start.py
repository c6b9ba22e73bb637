"""A pool's llorch-pool starts while this program still loads: what both import takes place side by side.

Only where the connection is up already, and only for commands that ask a named pool one thing. What was started and
isn't used (what was typed turns out to be wrong) hears nothing, does nothing and ends with its stdin. Read `begun`.

    llorch   start │ ssh … │ msgspec, typer, the command │ request ▶  ◀ answer │
    pool           │ sshd │ llorch-pool, its imports │ wait │ answer │
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise

from llorch.fleet import connection
from llorch.fleet.pools import Pool, Pools

COMMANDS = {
    "worker": {"list", "stop", "stop-all", "logs", "cleanup"},
    "model": {"list", "show"},
    "pool": {"devices", "doctor"},
}
MAX_POOLS = 4
LEAVE_S = 1.0
"""How long those that nobody took have to end, all of them together."""


class HeadStart:
    """Remote sides that were started and wait for their request."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Pool, subprocess.Popen[bytes]]] = []

    def start(self, pool: Pool, pools: Pools) -> None:
        """Start the remote side for a pool."""
        self._waiting.append((pool, connection.open_rpc_early(pool, pools)))

    def take(self, pool: Pool) -> subprocess.Popen[bytes] | None:
        """The process for a pool, if one waits."""
        for item in list(self._waiting):
            if item[0] == pool:
                self._waiting.remove(item)
                return item[1]
        return None

    def close(self) -> None:
        """End what nobody took."""
        for _, process in self._waiting:
            connection.close_quietly(process.stdin)
        end = time.monotonic() + LEAVE_S
        while self._waiting:
            connection.finish(self._waiting.pop()[1], max(0.0, end - time.monotonic()))


_current: ContextVar[HeadStart | None] = ContextVar("head_start", default=None)


def current() -> HeadStart | None:
    """What was started for the command that runs now."""
    return _current.get()


@contextmanager
def begun(arguments: Sequence[str]) -> Generator[None]:
    """Start what these arguments will need, for the commands within."""
    started = HeadStart()
    token = _current.set(started)
    try:
        _start(started, named_pools(arguments))
        yield
    finally:
        _current.reset(token)
        started.close()


def named_pools(arguments: Sequence[str]) -> list[str]:
    """Names behind -p and --pool; none for a command that isn't listed here, and none for its help."""
    noun, verb, *rest = arguments
    if verb not in COMMANDS.get(noun.removesuffix("s"), ()) or not {"-h", "--help", "--"}.isdisjoint(rest):
        return []
    names = [value for flag, value in pairwise(rest) if flag in ("-p", "--pool")]
    return names if len(names) <= MAX_POOLS and "--all" not in rest else []


def _start(started: HeadStart, names: Sequence[str]) -> None:
    try:
        pools = Pools.open()
        known = pools.all() if names else {}
        for name in dict.fromkeys(names):
            if name in known and connection.is_connected(known[name]):
                started.start(known[name], pools)
    except Exception:
        return  # whatever it is, the command itself will meet it, and say it
