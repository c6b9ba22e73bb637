"""How much Redis does for a request, counted instead of timed. Read `Work`.

MONITOR names every command, those inside of scripts too. Each one that reads is sent again, apart from its script, and
the elements of its answer are counted: a script that reads a whole index to return a page is caught, which a count of
commands alone wouldn't show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import redis

_READS = frozenset(
    "get hget hgetall hkeys hlen hmget hvals exists scan sismember smembers xrange xrevrange zcard zcount zrange "
    "zrangebyscore zrevrangebyscore zscore".split()
)


@dataclass
class Work:
    """What Redis did."""

    commands: int = 0
    elements: int = 0
    largest: tuple[int, str] = (0, "")
    """Elements of the largest answer, and the command and key that gave it."""
    names: list[str] = field(default_factory=list)


@contextlib.contextmanager
def counted(client: redis.Redis) -> Generator[Work]:
    """Counts what the server does while the body runs, whoever asks for it."""
    work = Work()
    with client.monitor() as monitor:
        connection: Any = monitor.connection
        yield work
        client.echo("the end of the body")
        seen: list[bytes] = []
        while b"the end of the body" not in (line := connection.read_response(disconnect_on_error=False)):
            seen.append(line)
    for line in seen:
        _count(client, work, line)


def _count(client: redis.Redis, work: Work, line: bytes) -> None:
    """`1700000000.0 [0 lua] "ZCARD" "{o}:done"`; arguments are quoted as redis-cli does."""
    words = _words(line[line.index(b"] ") + 2 :])
    name = words[0].decode().lower()
    work.commands += 1
    work.names.append(name)
    if name not in _READS:
        work.elements += 1
        return
    try:
        size = _size(client.execute_command(*words))
    except (redis.ResponseError, ValueError):  # of a type that has changed since
        size = 1
    work.elements += size
    work.largest = max(work.largest, (size, b" ".join(words[:2]).decode(errors="replace")))


def _words(text: bytes) -> list[bytes]:
    """The arguments of one command."""
    words: list[bytes] = []
    at = 0
    while (begin := text.find(b'"', at)) >= 0:
        end = begin + 1
        while text[end : end + 1] != b'"':
            end += 2 if text[end : end + 1] == b"\\" else 1
        quoted = text[begin + 1 : end]
        words.append(quoted.decode("unicode_escape").encode("latin-1"))
        at = end + 1
    return words


def _size(answer: Any) -> int:
    if isinstance(answer, dict):
        return 2 * len(answer)
    if isinstance(answer, list | set | tuple):
        return sum(_size(one) for one in answer) if answer else 1
    return 1
