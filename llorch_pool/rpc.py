"""`llorch-pool rpc`: what `llorch` calls over ssh. One request line on stdin, events on stdout, stdin as a lifeline.

Starts for every call, so nothing here imports typer, asyncio or the Hub's client. Read `main` first.

    who ends a command        how                                             after
    it is done                `end` line                                      -
    the operator leaves       stdin EOF (ssh ends with its client)            at once
    the network is cut        no byte on stdin for `lifeline_s`               30 s
    it takes too long         `timeout_s`                                     as asked
    ... and if it doesn't stop within 1.5 s of that, the process exits; a half-started worker is killed first
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from typing import BinaryIO

import msgspec

from llorch_pool.context import Context
from llorch_pool.errors import PoolError, refused_by_the_system
from llorch_wire import pool as wire

HARD_EXIT_S = 1.5
_READ_REQUEST_S = 30.0


class Output:
    """Events to stdout, one whole line at a time. A caller that is gone aborts the command instead of crashing it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self.gone = False

    def send(self, event: wire.Event) -> None:
        """Write one event."""
        with self._lock:
            if self.gone:
                return
            try:
                self._stream.write(wire.encode_line(event))
                self._stream.flush()
            except OSError:
                self.gone = True


def main() -> int:
    """Serve one request. Returns the exit code, which also stands in the `end` line."""
    output = Output(sys.stdout.buffer)
    # Nothing but events may reach the caller: a print in a library would look like a banner, and stay unseen.
    sys.stdout = sys.stderr
    output.send(
        wire.Hello(version=wire.VERSION, protocol=wire.POOL_PROTOCOL, host=os.uname().nodename, pid=os.getpid())
    )
    try:
        request = read_request(0)
    except PoolError as error:
        output.send(wire.End(rc=error.rc, failure=error.failure()))
        return error.rc
    rc, end = run(request, output)
    output.send(end)
    return rc


def read_request(stdin: int) -> wire.Request:
    """The first line. Raises PoolError for anything else, naming the field, or the versions where they differ."""
    line = bytearray()
    end = time.monotonic() + _READ_REQUEST_S
    while b"\n" not in line:
        if len(line) > wire.MAX_REQUEST_BYTES:
            raise PoolError("the request is too large", code="usage", rc=wire.RC_USAGE)
        if not select.select([stdin], [], [], max(0.0, end - time.monotonic()))[0]:
            raise PoolError("no request came", code="usage", rc=wire.RC_USAGE)
        # Byte by byte from a pipe would be slow; what follows the line is only lifeline ticks.
        data = os.read(stdin, 1 << 16)
        if not data:
            break
        line += data
    text = bytes(line.partition(b"\n")[0])
    try:
        asked = msgspec.json.decode(text, type=_Versions)
    except msgspec.MsgspecError:
        raise PoolError(
            "stdin does not hold a request: this command is for `llorch`, not for people",
            next_step="`llorch-pool --help` shows the commands for people.",
            rc=wire.RC_USAGE,
            code="usage",
        ) from None
    if asked.protocol != wire.POOL_PROTOCOL:
        raise PoolError(
            f"llorch {asked.version} and llorch-pool {wire.VERSION} here don't speak the same protocol "
            f"({asked.protocol} and {wire.POOL_PROTOCOL})",
            next_step="Bring the same version to both: `llorch pool bootstrap NAME`.",
            code="version",
        )
    try:
        return wire.decode_request(text)
    except msgspec.MsgspecError as error:
        newer = asked.version != wire.VERSION
        raise PoolError(
            f"llorch-pool {wire.VERSION} does not understand this request of llorch {asked.version}: {error}",
            next_step="Bring the same version to both: `llorch pool bootstrap NAME`." if newer else "Correct it.",
            code="version" if newer else "usage",
            rc=wire.RC_FAILED if newer else wire.RC_USAGE,
        ) from None


class _Versions(msgspec.Struct):
    """What every version of a request has."""

    version: str
    protocol: int


def run(request: wire.Request, output: Output) -> tuple[int, wire.End]:
    """Execute a request under its deadline and lifeline."""
    from llorch_pool.dispatch import execute

    context = Context(output.send, timeout_s=request.timeout_s)
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(context, request, output, over), daemon=True)
    watcher.start()
    try:
        value = execute(context, request.command)
        output.send(wire.Result(value=value))
        return wire.RC_OK, wire.End(rc=wire.RC_OK)
    except PoolError as error:
        return error.rc, wire.End(rc=error.rc, failure=error.failure())
    except OSError as error:
        refused = refused_by_the_system(error)
        return refused.rc, wire.End(rc=refused.rc, failure=refused.failure())
    except Exception as error:  # whatever it is, the caller gets an end line
        import traceback

        where = "".join(traceback.format_tb(error.__traceback__)[-3:])
        failure = wire.Failure(
            code="internal",
            message=f"llorch-pool failed: {type(error).__name__}: {error}",
            next_step="This is a fault in llorch-pool: please report it with the lines above.",
            detail=where,
        )
        return wire.RC_FAILED, wire.End(rc=wire.RC_FAILED, failure=failure)
    finally:
        over.set()


def _watch(context: Context, request: wire.Request, output: Output, over: threading.Event) -> None:
    """Abort the command when the caller is gone or its time is over; end the process when it doesn't react."""
    heard = time.monotonic()
    end = heard + request.timeout_s
    watching = request.lifeline_s is not None
    while not over.is_set():
        now = time.monotonic()
        if now >= end:
            context.abort(f"not done within {request.timeout_s:g} s", deadline=True)
        elif output.gone:
            context.abort("the caller is gone")
        elif watching and request.lifeline_s is not None and now - heard > request.lifeline_s:
            context.abort(f"nothing heard from the caller for {request.lifeline_s:g} s")
        if context.aborted:
            break
        if not watching:
            over.wait(0.2)
        elif select.select([0], [], [], 0.2)[0]:
            if os.read(0, 4096):
                heard = now
            else:
                context.abort("the caller closed the connection")
    if not over.wait(HARD_EXIT_S):
        os._exit(wire.RC_TIMEOUT)


if __name__ == "__main__":
    sys.exit(main())
