"""Commands on pools over ssh (which `connection` starts). Read `call` first.

No argument is ever spliced into a remote command line: the command is constant, what it is to do goes in as JSON on
stdin, events come back as lines. stdin stays open as a lifeline; closing it ends the remote command (not its workers).
ssh runs in a session of its own, so that Ctrl-C reaches llorch alone, which then closes the lifeline in order.

    who wins?   answer / deadline      whichever is seen first; both close the connection in the same way
                Ctrl-C / answer        Ctrl-C, but what the remote still says within 1.5 s is read
"""

from __future__ import annotations

import shlex
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from llorch.errors import CliError
from llorch.fleet import connection, failures
from llorch.fleet.pipes import Pipes
from llorch.fleet.pools import Pool, Pools
from llorch_wire import pool as wire

if TYPE_CHECKING:
    from llorch.fleet.head_start import HeadStart

LEAVE_S = 1.5
"""How long an aborted remote command has to clean up before its connection is cut."""
GRACE_S = 5.0
"""Beyond the remote's own deadline, once it is there: it says itself that it was too slow, if it can."""
MAX_LINE_BYTES = 16 << 20
DROPPED_RETRIES = 3

OnEvent: TypeAlias = Callable[[wire.Progress | wire.Log], None]


class Interrupted(Exception):  # noqa: N818 - not an error: the operator left
    """The command was cancelled."""


def call(
    pool: Pool,
    pools: Pools,
    command: wire.AnyCommand,
    *,
    timeout_s: float,
    on_event: OnEvent | None = None,
    cancel: threading.Event | None = None,
    head_start: HeadStart | None = None,
) -> Any:
    """Run one command on a pool and return its result. Raises CliError (classified), or Interrupted.

    `head_start` may have started the remote side already.
    """
    for attempt in range(DROPPED_RETRIES + 1):
        started = head_start.take(pool) if head_start and not attempt else None
        session = Session(pool, pools, cancel or threading.Event(), started)
        try:
            return session.run(command, timeout_s, on_event or (lambda _: None))
        except CliError as error:
            # sshd drops connections beyond MaxStartups before anything was said: harmless to try again.
            if failures.kind_of(error) != "dropped" or session.hello is not None or attempt == DROPPED_RETRIES:
                raise
            from random import random

            time.sleep(0.2 * 2**attempt * (0.5 + random()))
    raise AssertionError("unreachable")


class Session:
    """One ssh process around one request; `started`: that process, if it runs already."""

    def __init__(
        self, pool: Pool, pools: Pools, cancel: threading.Event, started: subprocess.Popen[bytes] | None = None
    ) -> None:
        self._pool, self._pools, self._cancel, self._started = pool, pools, cancel, started
        self.hello: wire.Hello | None = None
        self._stderr = bytearray()
        self._result: Any = None
        self._end: wire.End | None = None

    def run(self, command: wire.AnyCommand, timeout_s: float, on_event: OnEvent) -> Any:
        """Send the request, read events until the end line, a failure, the deadline or Ctrl-C."""
        request = wire.Request(command=command, version=wire.VERSION, timeout_s=timeout_s)
        process = self._started or connection.open_rpc(self._pool, self._pools)
        try:
            with Pipes(process, wire.encode_line(request)) as pipes:
                self._stderr = pipes.stderr
                gave_up = self._read(pipes, time.monotonic() + timeout_s, on_event)
        finally:
            status = connection.finish(process)
        return self._answer(command, timeout_s, status, gave_up=gave_up)

    def _answer(self, command: wire.AnyCommand, timeout_s: float, status: int | None, *, gave_up: bool) -> Any:
        if self._cancel.is_set():
            raise Interrupted
        if self._end is not None and self._end.rc == wire.RC_OK:
            return wire.decode_result(command, self._result)
        if self._end is not None:
            raise failures.remote(self._pool, self._end.rc, self._end.failure)
        answered = self.hello is not None
        if gave_up and not answered:
            raise failures.silent(self._pool, timeout_s)
        # llorch-pool ends with that status when a command doesn't react to its deadline.
        if gave_up or (answered and status == wire.RC_TIMEOUT):
            raise failures.too_slow(self._pool, timeout_s)
        raise failures.transport(self._pool, status, self._stderr.decode("utf-8", "replace"), answered=answered)

    def _read(self, pipes: Pipes, end: float, on_event: OnEvent) -> bool:
        """Read until the process has nothing more to say. True when the deadline passed or the caller left."""
        buffer = bytearray()
        ticked = time.monotonic()
        leaving: float | None = None
        while pipes.open and self._end is None:
            now = time.monotonic()
            late = now > (end if self.hello is None else end + GRACE_S)
            if leaving is None and (self._cancel.is_set() or late):
                leaving = now
                if self.hello is None:
                    return True  # nothing runs there yet that could clean up
                pipes.hang_up()
            if leaving is not None and now - leaving > LEAVE_S:
                return True
            if leaving is None and now - ticked > wire.LIFELINE_INTERVAL_S:
                ticked = now
                pipes.tick()
            if data := pipes.step():
                buffer += data
                self._lines(buffer, on_event)
        return leaving is not None

    def _lines(self, buffer: bytearray, on_event: OnEvent) -> None:
        *lines, rest = buffer.split(b"\n")
        buffer[:] = rest if len(rest) <= MAX_LINE_BYTES else b""
        for line in lines:
            match wire.decode_event(bytes(line)):
                case wire.Hello() as hello:
                    self.hello = hello
                    _compare_versions(self._pool, hello, on_event)
                case wire.Progress() | wire.Log() as event:
                    on_event(event)
                case wire.Result(value=value):
                    self._result = value
                case wire.End() as end:
                    self._end = end
                case None:
                    pass  # a banner, or what a noisy .bashrc prints


def _compare_versions(pool: Pool, hello: wire.Hello, on_event: OnEvent) -> None:
    """Said at every contact; a different protocol is refused by the other side, in words."""
    if hello.version != wire.VERSION and hello.protocol == wire.POOL_PROTOCOL:
        text = f"has llorch-pool {hello.version}, this is llorch {wire.VERSION}: `llorch pool bootstrap {pool.name}`"
        on_event(wire.Log(text=text, level="warning"))


def run_script(
    pool: Pool,
    pools: Pools,
    script: str,
    payload: Path | None = None,
    *,
    timeout_s: float,
    on_line: Callable[[str], None],
    cancel: threading.Event,
) -> tuple[int, str]:
    """Run a constant POSIX script with the file `payload` on its stdin, then keep stdin open as its lifeline.

    Returns (status, stderr). Raises CliError for a failed connection, Interrupted.
    """
    arguments = [*connection.options(pool, pools), "--", pool.host, f"exec /bin/sh -c {shlex.quote(script)}"]
    process = connection.popen(arguments)
    buffer = bytearray()
    end = time.monotonic() + timeout_s
    ticked = time.monotonic()
    late = False
    try:
        with payload.open("rb") if payload else nullcontext() as source, Pipes(process, source=source) as pipes:
            while pipes.open:
                now = time.monotonic()
                if cancel.is_set() or now > end:
                    late = now > end
                    break
                if now - ticked > wire.LIFELINE_INTERVAL_S:
                    ticked = now
                    pipes.tick()
                buffer += pipes.step()
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    on_line(line.decode("utf-8", "replace"))
    finally:
        status = connection.finish(process, LEAVE_S)
    if cancel.is_set():
        raise Interrupted
    if late:
        raise failures.too_slow(pool, timeout_s)
    text = pipes.stderr.decode("utf-8", "replace")
    if status == 255 or status is None:
        raise failures.transport(pool, status, text)
    return status, text


def close_master(pool: Pool, pools: Pools) -> None:
    """End the shared connection to a pool, if there is one."""
    process = connection.popen([*connection.options(pool, pools), "-O", "exit", "--", pool.host])
    connection.finish(process, 5)
