"""The data folder of `llorch up`: one owner at a time, names and ports that stay, keys, and what ran before.

    up.lock      flock(2) held for life; the holder's pid stands in it
    up.json      {"prefix", "port", "worker_ports"}: chosen once, the same at every start
    running.json [{"pid", "start_time"}]: children, so that a new `up` can wait for the last one's to be gone
    api-key, worker-key   mode 0600, made when the stack is opened to the network and none is set
    redis/ logs/          the embedded Redis' data; children's output

Read `DataDir.open` first.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llorch.errors import CliError, UsageProblem
from llorch.up.ports import choose_port, port_is_free
from llorch.up.processes import is_alive, kill_if, start_time

LOCK_WAIT_S = 1.0
DYING_LOCK_WAIT_S = 10.0
LEFTOVER_WAIT_S = 10.0
PORT_WAIT_S = 1.0
POLL_S = 0.02


class DataDir:
    """A data folder that this process owns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self._state: dict[str, Any] = {}

    @contextmanager
    def open(self) -> Generator[DataDir]:
        """Own the folder while the context lasts.

        Raises CliError naming the pid of an `up` that owns it. One that was just killed is waited for, and so are its
        children.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self.path.chmod(0o700)
            lock = os.open(self.path / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageProblem(
                f"the data folder {self.path} can't be used: {error.strerror}", next_step="llorch up --data-dir DIR"
            ) from None
        try:
            self._acquire(lock)
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            self._await_leftovers()
            self._state = _read_json(self.path / "up.json", {})
            yield self
        finally:
            os.close(lock)

    def _acquire(self, lock: int) -> None:
        begun = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                text = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
                holder = int(text) if text.isdigit() else 0
                # A killed holder keeps the lock until the kernel has torn it down.
                patience_s = LOCK_WAIT_S if is_alive(holder) else DYING_LOCK_WAIT_S
                if time.monotonic() - begun > patience_s:
                    raise CliError(
                        f"another `llorch up` (pid {holder or 'unknown'}) uses the data folder {self.path}",
                        next_step=f"stop it (kill {holder}), or use another folder: llorch up --data-dir DIR",
                    ) from None
                time.sleep(POLL_S)

    def _await_leftovers(self) -> None:
        """Wait until the children of the last `up` are gone; they die with it, so this takes milliseconds."""
        recorded = _read_json(self.path / "running.json", [])
        left = [(entry["pid"], entry["start_time"]) for entry in recorded if _names_a_process(entry)]
        for patience_s, force in ((LEFTOVER_WAIT_S, False), (LEFTOVER_WAIT_S, True)):
            deadline = time.monotonic() + patience_s
            if force:
                for pid, started in left:
                    kill_if(pid, started)
            while left := [(pid, started) for pid, started in left if start_time(pid) == started]:
                if time.monotonic() > deadline:
                    break
                time.sleep(POLL_S)
        if left:
            pids = " ".join(str(pid) for pid, _ in left)
            raise CliError(f"processes of the last `llorch up` can't be ended: {pids}", next_step=f"kill -9 {pids}")

    def record_running(self, pids: Iterable[int]) -> None:
        """Remember the children."""
        entries = [{"pid": pid, "start_time": start_time(pid)} for pid in pids]
        write_json(self.path / "running.json", entries)

    def prefix(self) -> str:
        """What this folder's worker ids begin with; it keeps two folders apart that share one Redis."""
        prefix = self._state.get("prefix")
        if not isinstance(prefix, str):
            prefix = f"up-{secrets.token_hex(3)}-"
            self._keep("prefix", prefix)
        return prefix

    def worker_ids(self, count: int) -> list[str]:
        """The same ids at every start."""
        return [f"{self.prefix()}{number}" for number in range(1, count + 1)]

    def worker_ports(self, count: int) -> list[int]:
        """A port for each worker: those of the last start as far as they are free."""
        known = self._state.get("worker_ports")
        ports = [port for port in known if isinstance(port, int)] if isinstance(known, list) else []
        taken: set[int] = set(ports)
        for at in range(count):
            if at < len(ports) and port_is_free("127.0.0.1", ports[at]):
                continue
            port = choose_port(taken)
            taken.add(port)
            ports[at : at + 1] = [port]
        self._keep("worker_ports", ports)
        return ports[:count]

    def port(self, host: str, asked: int) -> int:
        """orchestratord's port; 0 chooses one and keeps to it. Raises CliError when the port asked for is taken."""
        if asked:
            deadline = time.monotonic() + PORT_WAIT_S
            while not port_is_free(host, asked):
                if time.monotonic() < deadline:
                    time.sleep(POLL_S)
                    continue
                raise CliError(
                    f"port {asked} on {host} is in use",
                    next_step=f"llorch up --port {choose_port(set(), asked + 1)}    (or --port 0: any free one)",
                )
            return asked
        known = self._state.get("port")
        port = known if isinstance(known, int) and port_is_free(host, known) else choose_port(set())
        self._keep("port", port)
        return port

    def key(self, name: str) -> tuple[str, Path]:
        """The key kept under this name, made now if there is none, and its file (mode 0600)."""
        path = self.path / name
        with contextlib.suppress(FileNotFoundError):
            path.chmod(0o600)
            if key := path.read_text(encoding="ascii").strip():
                return key, path
        key = secrets.token_hex(24)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(key + "\n")
        return key, path

    def _keep(self, name: str, value: object) -> None:
        if self._state.get(name) != value:
            self._state[name] = value
            write_json(self.path / "up.json", self._state)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _names_a_process(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("pid"), int) and isinstance(entry.get("start_time"), str)


def _read_json(path: Path, fallback: Any) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return fallback
    return value if isinstance(value, type(fallback)) else fallback


def keys_for(
    data: DataDir, *, open_to_network: bool, set_keys: Mapping[str, str | None]
) -> tuple[dict[str, str], Path | None]:
    """Keys for the children's environment, and the file of the client key if one was made here.

    On loopback nothing is needed. Where clients need keys, operators' calls need one too, so `up` needs the worker key.
    """
    api_keys, worker_key = set_keys.get("api_keys"), set_keys.get("worker_key")
    made: Path | None = None
    if open_to_network and not api_keys:
        key, made = data.key("api-key")
        api_keys = f"admin={key}"
    if (open_to_network or api_keys) and not worker_key:
        worker_key, _ = data.key("worker-key")
    found = {"LLORCH_API_KEYS": api_keys, "LLORCH_WORKER_KEY": worker_key}
    return {name: value for name, value in found.items() if value}, made
