"""`llorch-pool stream`: a model's bytes out of one pool and into another, through the operator's machine.

Only what the receiver lacks is sent: it said before (`model.partial`) what it has, and goes on inside a file. The
receiver checks every file against the digests that the sender's model.json holds. Read `send` and `receive` first.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Generator
from pathlib import Path, PurePosixPath

import msgspec

from llorch_pool import models
from llorch_pool.context import Context
from llorch_pool.errors import PoolError
from llorch_pool.model_source import CHUNK_BYTES, Reading, SourceFile, TransientError
from llorch_pool.paths import check_name
from llorch_pool.rpc import Output
from llorch_wire import pool as wire

SILENCE_S = 30.0
"""A receiver that gets no byte for this long gives up: the network was cut."""


def main() -> int:
    """Serve one stream. Returns the exit code."""
    # Bytes follow the request line on stdin: nothing of them may be buffered away.
    request = msgspec.json.decode(_read_line(0), type=wire.StreamRequest)
    output = Output(sys.stdout.buffer)
    sys.stdout = sys.stderr
    output.send(
        wire.Hello(version=wire.VERSION, protocol=wire.POOL_PROTOCOL, host=os.uname().nodename, pid=os.getpid())
    )
    context = Context(output.send, timeout_s=request.timeout_s)
    try:
        if request.protocol != wire.POOL_PROTOCOL:
            raise PoolError(
                f"llorch {request.version} and llorch-pool {wire.VERSION} don't speak the same protocol",
                next_step="Bring the same version to both: `llorch pool bootstrap NAME`.",
                code="version",
            )
        if request.op == "send":
            send(context, request)
            return wire.RC_OK
        output.send(wire.Result(value=receive(context, request)))
        output.send(wire.End(rc=wire.RC_OK))
        return wire.RC_OK
    except PoolError as error:
        if request.op == "send":
            print(f"{error.message}. {error.next_step}", file=sys.stderr)
        else:
            output.send(wire.End(rc=error.rc, failure=error.failure()))
        return error.rc
    except BrokenPipeError:
        return wire.RC_INTERRUPTED


def _read_line(handle: int, limit: int = wire.MAX_REQUEST_BYTES * 8) -> bytes:
    """One line, byte by byte: what follows belongs to somebody else."""
    line = bytearray()
    while len(line) < limit:
        if not select.select([handle], [], [], SILENCE_S)[0]:
            raise TransientError(f"no byte for {SILENCE_S:g} s")
        byte = os.read(handle, 1)
        if not byte or byte == b"\n":
            return bytes(line)
        line += byte
    raise TransientError("a line is too long")


def send(context: Context, request: wire.StreamRequest) -> None:
    """Write what the receiver lacks to stdout. Raises PoolError, BrokenPipeError when it left."""
    info = models.show(context, request.name)
    have = {file.path: file.have_bytes for file in request.have}
    out = sys.__stdout__.buffer if sys.__stdout__ is not None else sys.stdout.buffer
    for file in info.files:
        offset = have.get(file.path, 0)
        if offset >= file.size:
            continue  # it has it; and of an empty file there is nothing to send
        out.write(wire.encode_line(wire.StreamFile(path=file.path, size=file.size, offset=offset)))
        with (Path(info.path) / file.path).open("rb") as stream:
            stream.seek(offset)
            left = file.size - offset
            while left:
                context.check()
                chunk = stream.read(min(CHUNK_BYTES, left))
                if not chunk:
                    raise PoolError(f"{file.path} became shorter while it was read", code="damaged")
                out.write(chunk)
                left -= len(chunk)
    out.write(b"\n")
    out.flush()


class _StreamSource:
    """Files as they come in, in the order in which they come; each can be read once."""

    def __init__(self, model: wire.ModelInfo, handle: int) -> None:
        self.ref = model.ref
        self.revision = model.revision
        self.identity = model.digest
        self._handle = handle
        for file in model.files:
            parts = PurePosixPath(file.path).parts
            if not parts or ".." in parts or file.path.startswith("/") or file.path == "model.json":
                raise PoolError(f"{file.path!r} is not the path of a model's file", code="usage")
        self.files = [SourceFile(file.path, file.size, sha256=file.sha256) for file in model.files]

    def next_file(self) -> wire.StreamFile | None:
        """Header of the next file, None at the end of the stream."""
        line = _read_line(self._handle)
        return msgspec.json.decode(line, type=wire.StreamFile) if line else None

    @contextlib.contextmanager
    def open(self, file: SourceFile, offset: int, validator: str) -> Generator[Reading]:
        """The file that the stream is at; it must be this one."""
        del validator
        header = self.next_file()
        if header is None or header.path != file.path or header.offset not in (0, offset):
            raise PoolError(f"{file.path}: the sending pool left it out", next_step="Run it again.", code="stream")
        yield Reading(header.offset, self.identity, _Limited(self._handle, file.size - header.offset))


class _Limited:
    """Reads of one file's bytes from the stream."""

    def __init__(self, handle: int, left: int) -> None:
        self._handle, self._left = handle, left

    def read(self, size: int, /) -> bytes:
        """What has come, at most `size` bytes. Raises PoolError when the sender is gone."""
        if not self._left:
            return b""
        if not select.select([self._handle], [], [], SILENCE_S)[0]:
            raise PoolError(f"no byte for {SILENCE_S:g} s", next_step="Run it again: it goes on.", code="stream")
        data = os.read(self._handle, min(size, self._left))
        if not data:
            raise PoolError("the sender is gone", next_step="Run it again: it goes on.", code="stream")
        self._left -= len(data)
        return data


def receive(context: Context, request: wire.StreamRequest) -> wire.ModelInfo:
    """Read a model from stdin and put it in place. Raises PoolError."""
    if request.model is None:
        raise PoolError("the request has no model", code="usage", rc=wire.RC_USAGE)
    name = check_name(request.name, "model", "the model")
    started = time.monotonic()
    info = models.take_in(context, _StreamSource(request.model, 0), name, request.model.digest)
    context.log(f"{name}: here after {time.monotonic() - started:.1f} s")
    return info
