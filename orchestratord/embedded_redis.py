"""A Redis of one's own: a supervised child on a unix socket, durable, one for each data folder.

Read `EmbeddedRedis.start` and `_supervise`. Who wins when processes die:

    the server dies               it is started again at once; from the third death within 60 s after 1, 2, 4 … 30 s
    this process is killed        the kernel kills the server (PDEATHSIG); both hold the lock, so that a successor waits
                                  until the old server has really gone
    a second start, same folder   refused, naming the process that holds it
    SIGTERM                       the server writes all it has and ends

The folder holds `redis.lock`, `redis.log` and the append-only file. `appendfsync always`: what was acknowledged
survives SIGKILL and power loss. Its memory has a bound, at which it refuses rather than forgets. See
docs/redis-state.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import json
import os
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import structlog

from orchestratord.redis_folder import EmbeddedRedisError as EmbeddedRedisError
from orchestratord.redis_folder import lock_folder
from orchestratord.redis_memory import default_bound
from orchestratord.redis_server import find_server

SOCKET_PATH_BYTES = 100
"""A unix socket's path must be under 108 bytes on Linux and 104 on macOS."""
READY_S = 60.0
STOP_S = 10.0
RAPID_S = 60.0
BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
LOG_BYTES = 2**20
_PR_SET_PDEATHSIG = 1


def socket_path(data_dir: Path) -> Path:
    """Where the server for a data folder listens: in the folder, or, where that path would be too long for a socket, in
    a short folder of its own that is named by a hash of it."""
    folder = data_dir.expanduser().resolve()
    inside = folder / "run" / "redis.sock"
    if len(os.fsencode(inside)) <= SOCKET_PATH_BYTES:
        return inside
    short = f"llorch-{os.getuid()}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}"
    for base in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):  # noqa: S108
        path = Path(base or "/") / short / "redis.sock"
        if base and Path(base).is_dir() and len(os.fsencode(path)) <= SOCKET_PATH_BYTES:
            return path
    raise EmbeddedRedisError(f"no folder is short enough for the Redis socket of {folder}: set XDG_RUNTIME_DIR")


def server_url(data_dir: Path) -> str:
    """Redis URL of the embedded server for a data folder, running or not."""
    return f"unix://{socket_path(data_dir)}"


class EmbeddedRedis:
    """`async with EmbeddedRedis(folder) as redis:` — `redis.url` answers inside, and the server is gone after.

    Must be entered on the main thread: PDEATHSIG fires when the thread that spawned the server ends.
    """

    def __init__(self, data_dir: Path, *, server: str | None = None, max_memory: int | None = None) -> None:
        """`max_memory` in bytes; None takes `default_bound`."""
        self._folder = data_dir.expanduser().resolve()
        self._max_memory = max_memory
        self._server = server
        self._socket = socket_path(data_dir)
        self._lock: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._deaths: list[float] = []
        self._log = structlog.get_logger("embedded_redis")
        self.on_restart: Callable[[], None] | None = None
        """Called after every restart of the server, when it answers."""

    @property
    def url(self) -> str:
        """Redis URL; the same over restarts."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int | None:
        """Process id of the server, None while it is down."""
        return None if self._process is None else self._process.pid

    async def __aenter__(self) -> EmbeddedRedis:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="embedded redis")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Takes the folder, starts the server and waits until it answers. Raises EmbeddedRedisError."""
        if threading.current_thread() is not threading.main_thread():
            raise EmbeddedRedisError("the embedded Redis must be started on the main thread")
        self._server = find_server(self._server)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _private_folder(self._socket.parent)
        except OSError as error:
            raise EmbeddedRedisError(
                f"the data folder {self._folder} can't be used: {error.strerror}; choose another with --data-dir"
            ) from error
        self._lock = await lock_folder(self._folder, self.url)
        await self._spawn()

    async def stop(self) -> None:
        """Ends the server cleanly (all data written), by force after 10 s, and gives the folder back."""
        self._stopping.set()
        if self._supervisor is not None:
            supervisor, self._supervisor = self._supervisor, None
            supervisor.cancel()
            await asyncio.wait({supervisor})
        await self._end_server()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _end_server(self) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()  # to Redis the same as SHUTDOWN, and it works when no client can connect
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _arguments(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "appendonly": "yes",
            "appendfsync": "always",
            "aof-load-truncated": "yes",
            "save": "",
            "maxmemory": str(default_bound() if self._max_memory is None else self._max_memory),
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "logfile": "redis.log",
        }
        return [part for name, value in options.items() for part in (f"--{name}", value)]

    async def _spawn(self) -> None:
        log_file = self._folder / "redis.log"
        if log_file.exists() and log_file.stat().st_size > LOG_BYTES:
            log_file.replace(self._folder / "redis.log.1")
        logged = log_file.stat().st_size if log_file.exists() else 0
        parent = os.getpid()
        set_death_signal = _death_signal_setter()
        descriptor = self._lock
        assert self._server is not None and descriptor is not None

        def in_child() -> None:
            set_death_signal()
            if os.getppid() != parent:  # it died before the signal was set
                os._exit(1)

        self._process = await asyncio.create_subprocess_exec(
            self._server,
            *self._arguments(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            pass_fds=(descriptor,),
            preexec_fn=in_child,
            start_new_session=True,  # Ctrl-C in a terminal is for us: the server ends after the last write
        )
        await self._ready(self._process, log_file, logged)

    async def _ready(self, process: asyncio.subprocess.Process, log_file: Path, logged: int) -> None:
        deadline = time.monotonic() + READY_S
        while not await _answers(self._socket):
            if process.returncode is not None:
                words = _last_words(log_file, logged)
                raise EmbeddedRedisError(
                    f"{self._server} ended with {_ending(process.returncode)} at its start: {words}"
                )
            if time.monotonic() > deadline:
                await self._end_server()
                raise EmbeddedRedisError(f"{self._server} did not answer within {READY_S:g} s: see {log_file}")
            await asyncio.sleep(0.02)

    async def _supervise(self) -> None:
        """Keeps the server up until `stop`."""
        while True:
            process = self._process
            if process is not None:
                code = await process.wait()
                self._log.warning("Redis ended and is started again", pid=process.pid, ended_with=_ending(code))
            await asyncio.sleep(self._pause())
            try:
                await self._spawn()
            except (EmbeddedRedisError, OSError) as error:
                self._log.error("Redis can't be started; trying on", reason=str(error))
                await self._end_server()
                continue
            self._log.info("Redis is back", url=self.url, pid=self.pid)
            if self.on_restart is not None:
                self.on_restart()

    def _pause(self) -> float:
        now = time.monotonic()
        self._deaths = [moment for moment in self._deaths if now - moment < RAPID_S] + [now]
        surplus = len(self._deaths) - 3
        return 0.0 if surplus < 0 else BACKOFF_S[min(surplus, len(BACKOFF_S) - 1)]


def run_foreground(
    data_dir: Path, *, server: str | None = None, ready_file: Path | None = None, max_memory: int | None = None
) -> int:
    """`orchestratord redis`: the server until SIGTERM or SIGINT. Writes `{"url", "pid"}` (the server's pid) to
    `ready_file` whenever it has come up. Returns the exit status; raises EmbeddedRedisError."""
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)
    try:
        return asyncio.run(_foreground(EmbeddedRedis(data_dir, server=server, max_memory=max_memory), ready_file))
    finally:
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)


async def _foreground(redis: EmbeddedRedis, ready_file: Path | None) -> int:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    redis.on_restart = lambda: _announce(redis, ready_file)
    # A signal during a long start (a large append-only file) must end it too.
    starting = asyncio.create_task(redis.__aenter__(), name="start of redis")
    stop_asked = asyncio.create_task(stopping.wait(), name="wait for a signal")
    try:
        await asyncio.wait({starting, stop_asked}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            _announce(redis, ready_file)
            structlog.get_logger("embedded_redis").info("Redis is ready", url=redis.url, pid=redis.pid)
            await stop_asked
        return 0
    finally:
        for task in (starting, stop_asked):
            task.cancel()
        await asyncio.wait({starting, stop_asked})
        await redis.stop()


def _announce(redis: EmbeddedRedis, ready_file: Path | None) -> None:
    if ready_file is not None:
        temporary = ready_file.with_name(f".{ready_file.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"url": redis.url, "pid": redis.pid}) + "\n", "utf-8")
        temporary.replace(ready_file)


def _private_folder(folder: Path) -> None:
    """Makes a folder that only this user can enter, or checks that an existing one is such."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise EmbeddedRedisError(f"{folder} belongs to somebody else: remove it or set XDG_RUNTIME_DIR")
    if stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)


def _death_signal_setter() -> Callable[[], None]:
    """A function for the child, between fork and exec: everything that allocates is done before."""
    if sys.platform != "linux":
        return lambda: None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


async def _answers(path: Path) -> bool:
    """Whether a Redis behind the socket takes commands (not while it loads its data)."""
    try:
        async with asyncio.timeout(1.0):
            reader, writer = await asyncio.open_unix_connection(str(path))
            try:
                writer.write(b"PING\r\n")
                return (await reader.readline()).startswith(b"+PONG")
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError):
        return False


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _last_words(log_file: Path, logged: int) -> str:
    try:
        with log_file.open("rb") as stream:
            stream.seek(logged)
            lines = stream.read(64 * 2**10).decode("utf-8", "replace").splitlines()
    except OSError:
        return "it logged nothing"
    telling = [line for line in lines if "#" in line] or lines
    return " | ".join(line.strip() for line in telling[-3:]) or "it logged nothing"
