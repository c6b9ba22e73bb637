"""Workers after their start: what they really are. (How they end: `ending`.)

Read `inspect` first: it asks the kernel, then the worker itself, and believes neither its own entry nor a bare pid.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from llorch_pool.errors import PoolError
from llorch_pool.http_call import NoReplyError, Reply, call
from llorch_pool.log_rotation import rotate
from llorch_pool.process import Marked, boot_id, is_alive, marked_processes, start_time
from llorch_pool.registry import MARKER, Registry, WorkerRecord
from llorch_wire.pool import Stray, WorkerInfo, WorkerState

HEALTH_TIMEOUT_S = 1.5

T = TypeVar("T")


def inspect(record: WorkerRecord, registry: Registry) -> WorkerInfo:
    """What this worker is right now."""
    state, detail = _process_state(record)
    reply: Reply | None = None
    if state is None:
        try:
            reply = health(record, registry)
            state, detail = _health_state(record, reply)
        except NoReplyError as error:
            state = "starting" if not registry.is_ready(record) else "unresponsive"
            detail = f"its process runs, but {record.url or 'it has no address yet'}: {error}"
    if record.stopping and state not in ("exited", "rebooted", "pid-reused"):
        state = "stopping"
    body = {} if reply is None else reply.body
    supervisor_pid = record.live_supervisor_pid
    if supervisor_pid:
        lives = state not in ("exited", "rebooted", "pid-reused")
        whose = f"`{record.supervisor}` (pid {supervisor_pid}) {'runs it' if lives else 'starts it again'}"
        detail = f"{detail}; {whose}" if detail else whose

    def number(key: str) -> int:
        return int(body[key]) if isinstance(body.get(key), int | float) else 0

    return WorkerInfo(
        worker_id=record.worker_id,
        state=state,
        detail=detail,
        pid=record.pid,
        start_time=record.start_time,
        boot_id=record.boot_id,
        url=record.advertise_url or record.url,
        model=record.model,
        model_ref=record.model_ref,
        model_digest=str(body.get("model_digest") or ""),
        device=record.device,
        engine=record.engine,
        instance_id=str(body.get("instance_id") or ""),
        orchestrator=record.orchestrator,
        pool=record.pool,
        slots_total=number("slots_total"),
        slots_free=number("slots_free"),
        need_bytes=record.need_bytes,
        vram_bytes=number("vram_bytes"),
        uptime_s=float(body.get("uptime_s") or 0.0),
        engine_restarts=number("engine_restarts"),
        idle_timeout_s=record.idle_timeout_s,
        on_boot=record.on_boot,
        started_at_ms=record.started_at_ms,
        log=record.log,
        version=str(body.get("version") or ""),
        supervisor=record.supervisor,
        supervisor_pid=supervisor_pid,
    )


def _process_state(record: WorkerRecord) -> tuple[WorkerState | None, str]:
    """State if the process is gone, None if it runs."""
    process = record.identity
    if process is None:
        return "exited", "it was never started: the command that wanted to was cut off"
    if process.boot_id != boot_id():
        back = "" if record.on_boot else " and it was not spawned with --on-boot"
        return "rebooted", f"the machine was restarted{back}"
    if is_alive(process):
        return None, ""
    if start_time(process.pid) is not None:
        return "pid-reused", f"it ended; pid {process.pid} is another process now"
    return "exited", last_words(Path(record.log))


def _health_state(record: WorkerRecord, reply: Reply) -> tuple[WorkerState, str]:
    if reply.body.get("worker_id") not in (None, record.worker_id):
        return "unresponsive", f"another worker answers at {record.url}"
    detail = str(reply.body.get("detail") or "")
    match reply.body.get("status"):
        case "ready":
            return "ready", detail
        case "draining":
            return "draining", detail
        case "failed":
            return "failed", detail
        case "starting":
            return "starting", detail
        case _:
            return "unresponsive", f"{record.url}/health answers HTTP {reply.status}"


def health(record: WorkerRecord, registry: Registry) -> Reply:
    """GET /health at the address it bound. Raises NoReplyError."""
    if not record.url:
        raise NoReplyError("not yet")
    key = registry.secrets(record.worker_id).get("LLORCH_WORKER_KEY")
    return call("GET", f"{record.url}/health", key=key, timeout_s=HEALTH_TIMEOUT_S)


def last_words(log: Path, limit: int = 200) -> str:
    """What is known of an end from the log's last line."""
    words = log_words(log)[:limit]
    return f"it ended; last in its log: {words}" if words else "it ended and left no log"


def log_words(log: Path) -> str:
    """What the newest log line says, without its time and level."""
    lines = tail(log, 1)
    if not lines:
        return ""
    try:
        line = msgspec.json.decode(lines[-1])
    except msgspec.DecodeError:
        return lines[-1][:160]
    if not isinstance(line, dict):
        return lines[-1][:160]
    rest = [f"{key}={value}" for key, value in line.items() if key not in ("event", "level", "timestamp")]
    return " ".join([str(line.get("event", "")), *rest])[:160]


def tail(log: Path, lines: int) -> list[str]:
    """The last lines of a file, reading at most 1 MiB of it."""
    try:
        with log.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - (1 << 20)))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-lines:] if lines > 0 else []


def list_workers(registry: Registry) -> list[WorkerInfo]:
    """Every worker on record, inspected at once; logs that have become too large are rotated on the way."""
    records = registry.all()
    for record in records:
        if not record.supervisor:  # a supervisor rotates what it writes itself
            rotate(Path(record.log))
    return side_by_side(lambda record: inspect(record, registry), records)


def side_by_side(work: Callable[[WorkerRecord], T], records: Sequence[WorkerRecord]) -> list[T]:
    """Each record's outcome, in order. Most machines have one or none, and then threads need not be imported."""
    if len(records) < 2:
        return [work(record) for record in records]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(16, len(records))) as threads:
        return list(threads.map(work, records))


class Unlisted(NamedTuple):
    """A worker without an entry, or with a damaged one. `pid` 0: nothing of it runs; `serves_at` "": no tasks."""

    worker_id: str
    entry: Path | None
    pid: int
    serves_at: str

    @property
    def text(self) -> str:
        """What is the matter, in words."""
        text = f"worker {self.worker_id} has no entry"
        if self.entry is not None:
            text = f"the entry of worker {self.worker_id} can't be read ({self.entry})"
        if not self.pid:
            return f"{text}; nothing of it runs"
        return f"{text}, but pid {self.pid} runs" + (f" and serves at {self.serves_at}" if self.serves_at else "")

    @property
    def next_step(self) -> str:
        """What to do about it. Tasks may run there: it is drained first."""
        if not self.serves_at:
            return "`worker cleanup` removes what is left of it"
        return (
            f"drain it (`llorch worker drain {self.worker_id}`, or where no orchestratord has it `kill {self.pid}`), "
            "then `worker cleanup`"
        )


def unlisted(registry: Registry, loose: Sequence[Stray] | None = None) -> list[Unlisted]:
    """Workers that `list_workers` can't show, because their entries are damaged; of `loose` processes, theirs too."""
    entries: dict[str, Path | None] = {path.stem: path for path in registry.damaged()}
    if not entries and not loose:
        return []  # which is nearly always so; the processes need not be looked through
    pids = {stray.worker_id: stray.pid for stray in reversed(loose if loose is not None else strays(registry))}
    entries = dict.fromkeys(pids if loose is not None else ()) | entries
    return [
        Unlisted(worker_id, entry, pids.get(worker_id, 0), _serves_at(registry, worker_id) if worker_id in pids else "")
        for worker_id, entry in entries.items()
    ]


def _serves_at(registry: Registry, worker_id: str) -> str:
    """URL at which a worker takes tasks right now, "" when it doesn't. Its port file is asked, not its entry."""
    try:
        written = msgspec.json.decode(registry.file(worker_id, "ready").read_bytes(), type=dict[str, Any])
        url = str(written.get("url", ""))
        key = registry.secrets(worker_id).get("LLORCH_WORKER_KEY")
        reply = call("GET", f"{url}/health", key=key, timeout_s=HEALTH_TIMEOUT_S)
    except (OSError, PoolError, msgspec.MsgspecError, NoReplyError):
        return ""
    ready = reply.body.get("worker_id") == worker_id and reply.body.get("status") == "ready"
    return url if ready else ""


def strays(registry: Registry) -> list[Stray]:
    """Processes that carry this registry's marker, but whose worker's entry is gone or names another process."""
    carrying = marked_here(registry)  # processes first: each has had its entry before it got its marker
    records = registry.all()
    alive = {record.worker_id for record in records if record.identity and is_alive(record.identity)}
    starting = {record.worker_id for record in records if not record.pid}
    found: list[Stray] = []
    for worker_id, marked in carrying:
        if worker_id not in alive and worker_id not in starting:
            found.append(Stray(pid=marked.process.pid, worker_id=worker_id, command=marked.command))
    return found


def marked_here(registry: Registry) -> list[tuple[str, Marked]]:
    """(worker id, process) of everything that carries this registry's marker."""
    prefix = f"{registry.folder}:"
    return [
        (marked.value[len(prefix) :], marked)
        for marked in marked_processes(MARKER)
        if marked.value.startswith(prefix) and marked.process.pid != os.getpid()
    ]
