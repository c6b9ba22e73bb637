"""Copy a model from one pool to others through this machine: ssh out of one, ssh into the other, nothing stored here.

The receiver says what it has already, the sender leaves that out, and the receiver checks every digest. Read
`copy_model` first.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from llorch.errors import CliError, UsageProblem
from llorch.fleet import connection, failures, fanout, ssh
from llorch.fleet.fanout import Outcome
from llorch.fleet.live import Live
from llorch.fleet.pipes import MAX_STDERR_BYTES
from llorch.fleet.pools import Pool, Pools
from llorch_wire import pool as wire

if TYPE_CHECKING:
    import io

CHUNK_BYTES = 1 << 20
ASK_S = 60.0


def copy_model(
    registry: Pools, source: Pool, targets: Sequence[Pool], name: str, *, timeout_s: float
) -> list[Outcome[Any]]:
    """Copy `name` to every target, side by side. Raises UsageProblem when source and target are one."""
    if any(target.name == source.name for target in targets):
        raise UsageProblem("a pool can't be copied to itself", next_step="give another pool with --to")
    model: wire.ModelInfo = ssh.call(source, registry, wire.ModelShow(name=name), timeout_s=ASK_S)

    def work(target: Pool, live: Live, cancel: threading.Event) -> wire.ModelInfo:
        return _Copy(registry, source, target, model, live, cancel).run(timeout_s)

    return fanout.run(targets, work)


class _Copy:
    """One model on its way to one pool."""

    def __init__(
        self, registry: Pools, source: Pool, target: Pool, model: wire.ModelInfo, live: Live, cancel: threading.Event
    ) -> None:
        self._registry, self._source, self._target = registry, source, target
        self._model, self._live, self._cancel = model, live, cancel
        self._stderr = {"source": bytearray(), "target": bytearray()}
        self._result: Any = None
        self._end: wire.End | None = None

    def run(self, timeout_s: float) -> wire.ModelInfo:
        """Raises CliError (classified), Interrupted."""
        have: list[wire.PartialFile] = ssh.call(
            self._target,
            self._registry,
            wire.ModelPartial(name=self._model.name, digest=self._model.digest),
            timeout_s=ASK_S,
            cancel=self._cancel,
        )
        request = wire.StreamRequest(
            op="send", name=self._model.name, version=wire.VERSION, have=have, timeout_s=timeout_s
        )
        sender = self._open(self._source, request)
        receiver: subprocess.Popen[bytes] | None = None
        try:
            taking = wire.StreamRequest(
                op="receive",
                name=self._model.name,
                version=wire.VERSION,
                model=self._model,
                timeout_s=timeout_s,
            )
            receiver = self._open(self._target, taking)
            pump = threading.Thread(target=self._pump, args=(sender, receiver), daemon=True)
            pump.start()
            late = self._read(sender, receiver, time.monotonic() + timeout_s + ssh.GRACE_S)
        finally:
            statuses = [None if process is None else connection.finish(process) for process in (sender, receiver)]
        return self._answer(statuses, timeout_s, late=late)

    def _open(self, pool: Pool, request: wire.StreamRequest) -> subprocess.Popen[bytes]:
        command = connection.remote_command(pool, "stream")
        process = connection.popen([*connection.options(pool, self._registry), "--", pool.host, command])
        with contextlib.suppress(OSError):
            assert process.stdin is not None
            process.stdin.write(wire.encode_line(request))
            process.stdin.flush()
        return process

    def _pump(self, sender: subprocess.Popen[bytes], receiver: subprocess.Popen[bytes]) -> None:
        """Bytes from one to the other, behind the sender's hello line."""
        assert sender.stdout is not None and receiver.stdin is not None
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            for line in iter(sender.stdout.readline, b""):
                if isinstance(wire.decode_event(line), wire.Hello):
                    break  # before it: banners
            buffered = cast("io.BufferedReader", sender.stdout)  # what Popen makes of a pipe by default
            while chunk := buffered.read1(CHUNK_BYTES):
                receiver.stdin.write(chunk)
                receiver.stdin.flush()
            if sender.wait(5):
                receiver.kill()

    def _read(self, sender: subprocess.Popen[bytes], receiver: subprocess.Popen[bytes], end: float) -> bool:
        """Events of the receiver until its end line. True when the deadline passed."""
        buffer = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(_stream(receiver.stdout), selectors.EVENT_READ, "events")
            selector.register(_stream(receiver.stderr), selectors.EVENT_READ, "target")
            selector.register(_stream(sender.stderr), selectors.EVENT_READ, "source")
            while self._end is None and any(key.data == "events" for key in selector.get_map().values()):
                if self._cancel.is_set() or time.monotonic() > end:
                    return not self._cancel.is_set()
                for key, _ in selector.select(0.1):
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.data == "events":
                        buffer += data
                        self._events(buffer)
                    else:
                        self._stderr[key.data] += data
                        del self._stderr[key.data][:-MAX_STDERR_BYTES]
        return False

    def _events(self, buffer: bytearray) -> None:
        *lines, rest = buffer.split(b"\n")
        buffer[:] = rest
        for line in lines:
            match wire.decode_event(bytes(line)):
                case wire.Progress() | wire.Log() as event:
                    self._live.event(self._target.name, event)
                case wire.Result(value=value):
                    self._result = value
                case wire.End() as end:
                    self._end = end
                case _:
                    pass

    def _answer(self, statuses: list[int | None], timeout_s: float, *, late: bool) -> wire.ModelInfo:
        if self._cancel.is_set():
            raise ssh.Interrupted
        if late:
            raise failures.too_slow(self._target, timeout_s)
        sent, received = statuses
        words = {side: text.decode("utf-8", "replace") for side, text in self._stderr.items()}
        if self._end is not None and self._end.rc == wire.RC_OK:
            return wire.decode_result(wire.ModelShow(name=""), self._result)
        if sent:
            lines = [line for line in words["source"].splitlines() if line.strip()]
            if sent == 255 or not lines:
                raise failures.transport(self._source, sent, words["source"])
            raise CliError(f"{self._source.name}: {lines[-1]}", next_step="run it again: it goes on")
        if self._end is not None:
            raise failures.remote(self._target, self._end.rc, self._end.failure)
        raise failures.transport(self._target, received, words["target"])


def _stream(stream: Any) -> Any:
    assert stream is not None
    return stream
