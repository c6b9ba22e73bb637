"""Workers after their start: what they really are, how they end, what they leave behind.

Read `inspect` first: it asks the kernel, then the worker itself, and believes neither its own entry nor a bare pid.

    stop:  POST /drain, /shutdown ─ it ends, or the grace is over ─▶ SIGTERM ─ 5 s ─▶ SIGKILL to the group and to
           every process that carries the worker's marker
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from llorch_pool.context import Context
from llorch_pool.errors import PoolError, usage_error
from llorch_pool.http_call import NoReplyError, Reply, call
from llorch_pool.log_rotation import rotate
from llorch_pool.process import Identity, Marked, boot_id, is_alive, marked_processes, send, start_time
from llorch_pool.registry import MARKER, Registry, WorkerRecord
from llorch_wire.pool import CleanupReport, Progress, StopOutcome, Stray, WorkerInfo, WorkerState

HEALTH_TIMEOUT_S = 1.5
TERM_WAIT_S = 5.0
YIELD_S = 5.0

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
    return _side_by_side(lambda record: inspect(record, registry), records)


def _side_by_side(work: Callable[[WorkerRecord], T], records: Sequence[WorkerRecord]) -> list[T]:
    """Each record's outcome, in order. Most machines have one or none, and then threads need not be imported."""
    if len(records) < 2:
        return [work(record) for record in records]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(16, len(records))) as threads:
        return list(threads.map(work, records))


def strays(registry: Registry) -> list[Stray]:
    """Processes that carry this registry's marker, but whose worker's entry is gone or names another process."""
    carrying = _marked(registry)  # processes first: each has had its entry before it got its marker
    records = registry.all()
    alive = {record.worker_id for record in records if record.identity and is_alive(record.identity)}
    starting = {record.worker_id for record in records if not record.pid}
    found: list[Stray] = []
    for worker_id, marked in carrying:
        if worker_id not in alive and worker_id not in starting:
            found.append(Stray(pid=marked.process.pid, worker_id=worker_id, command=marked.command))
    return found


def _marked(registry: Registry) -> list[tuple[str, Marked]]:
    prefix = f"{registry.folder}:"
    return [
        (marked.value[len(prefix) :], marked)
        for marked in marked_processes(MARKER)
        if marked.value.startswith(prefix) and marked.process.pid != os.getpid()
    ]


def stop_workers(
    context: Context, registry: Registry, worker_ids: list[str], grace_s: float, *, force: bool = False
) -> list[StopOutcome]:
    """Stop the named workers side by side.

    Raises PoolError for an unknown id, and without `force` for a supervised worker, before anything is stopped.
    """
    records = [registry.load(worker_id) for worker_id in dict.fromkeys(worker_ids)]
    if grace_s < 0:
        raise usage_error("--grace must not be negative", "Give seconds, 0 to stop without draining.")
    for record in records:
        if not force and (pid := record.live_supervisor_pid):
            raise PoolError(
                f"{record.worker_id} is run by `{record.supervisor}` (pid {pid}), which would start it again",
                next_step=f"Stop that one (Ctrl-C where it runs, or `kill {pid}`), or give the worker no more tasks: "
                f"`llorch worker drain {record.worker_id}`. With --force it is stopped all the same.",
                code="supervised",
            )
    return _side_by_side(lambda record: _stop(context, registry, record.worker_id, grace_s), records)


def _stop(context: Context, registry: Registry, worker_id: str, grace_s: float) -> StopOutcome:
    started = time.monotonic()
    record = registry.load(worker_id)
    if record.identity is not None and not record.ready and not record.supervisor:
        # Its spawning command holds the lock and waits for it: end the process, and that command cleans up.
        end_process(context, registry, record, record.identity, grace_s=0)
    with registry.held(worker_id, context):
        try:
            record = registry.load(worker_id)
        except PoolError:  # another command stopped it and removed the entry while this one waited for the lock
            return StopOutcome(worker_id=worker_id, how="was-dead", took_ms=_since(started))
        process = record.identity
        how: str = "was-dead"
        if process is not None and is_alive(process):
            registry.save(msgspec.structs.replace(record, stopping=True))
            how = end_process(context, registry, record, process, grace_s)
        kill_marked(registry, worker_id)
        registry.remove(worker_id)
    return msgspec.convert({"worker_id": worker_id, "how": how, "took_ms": _since(started)}, StopOutcome)


def _since(started: float) -> int:
    return round((time.monotonic() - started) * 1000)


def end_process(
    context: Context,
    registry: Registry,
    record: WorkerRecord,
    process: Identity,
    grace_s: float,
    term_wait_s: float = TERM_WAIT_S,
) -> str:
    """Drain, terminate, kill. Returns how it ended; afterwards the process is gone."""
    if grace_s > 0 and _drain(context, registry, record, process, grace_s):
        return "drained"
    # The first asks it to finish, the second not to wait for that: it has had its grace. (Sent at once, both would be
    # delivered as one.)
    for patience_s in (0.2, term_wait_s - 0.2):
        send(process, signal.SIGTERM)
        if _gone_within(context, process, patience_s):
            return "terminated"
    send(process, signal.SIGKILL, group=True)
    _gone_within(context, process, TERM_WAIT_S)
    return "killed"


def _drain(context: Context, registry: Registry, record: WorkerRecord, process: Identity, grace_s: float) -> bool:
    """Ask it to finish what it has and to leave. True once it is gone; False when it can't, or the grace is over.

    What still runs shortly before the end of the grace yields, so that it goes on elsewhere instead of being cut.
    """
    if not record.url:
        return False
    key = registry.secrets(record.worker_id).get("LLORCH_WORKER_KEY")
    end = time.monotonic() + grace_s
    try:
        body = {"deadline_ms": round(max(0.0, grace_s - YIELD_S) * 1000)}
        if call("POST", f"{record.url}/drain", key=key, body=body).status >= 400:
            return False
        call("POST", f"{record.url}/shutdown", key=key, body={})
    except NoReplyError:
        return not is_alive(process)
    while is_alive(process):
        left = end - time.monotonic()
        if left <= 0:
            return False
        context.progress(Progress(phase="draining", text=record.worker_id, eta_s=round(left, 1)))
        context.wait(0.05)
    return True


def _gone_within(context: Context, process: Identity, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while is_alive(process):
        if time.monotonic() >= end:
            return False
        if context.aborted:  # the signal has been sent: only the confirmation is given up
            time.sleep(0.02)
        else:
            context.wait(0.02)
    return True


def kill_marked(registry: Registry, worker_id: str) -> int:
    """SIGKILL to whatever still carries this worker's marker: an engine whose supervisor is gone."""
    killed = 0
    for marked_id, marked in _marked(registry):
        if marked_id == worker_id:
            killed += send(marked.process, signal.SIGKILL)
    return killed


def cleanup(context: Context, registry: Registry, *, dry_run: bool) -> CleanupReport:
    """Remove entries of dead workers, stray processes, and files that belong to no worker.

    A worker that died with a reboot and was spawned with --on-boot keeps its entry: `worker restore` needs it.
    """
    entries = [
        info.worker_id
        for info in list_workers(registry)
        if info.state in ("exited", "pid-reused") or (info.state == "rebooted" and not info.on_boot)
    ]
    loose = strays(registry)
    for path in registry.damaged():
        if not dry_run:
            path.unlink(missing_ok=True)
    removed: list[str] = []
    for worker_id in entries:
        if dry_run:
            removed.append(worker_id)
            continue
        with registry.held(worker_id, context):
            with contextlib.suppress(PoolError):
                record = registry.load(worker_id)
                if record.identity is not None and is_alive(record.identity):
                    continue  # another command started it again meanwhile
            registry.remove(worker_id)
            removed.append(worker_id)
    if not dry_run:
        for worker_id in {stray.worker_id for stray in loose}:
            _end_strays(context, registry, worker_id)
    files = _left_files(registry, set(removed) if dry_run else set())
    if not dry_run:
        for path in files:
            path.unlink(missing_ok=True)
    return CleanupReport(entries=removed, strays=loose, files=[path.name for path in files], dry_run=dry_run)


def _end_strays(context: Context, registry: Registry, worker_id: str) -> None:
    """End what carries a dead worker's marker; nothing if the worker was started again meanwhile."""
    with registry.held(worker_id, context):
        record = next((record for record in registry.all() if record.worker_id == worker_id), None)
        if record is None or record.identity is None or not is_alive(record.identity):
            kill_marked(registry, worker_id)


def _left_files(registry: Registry, going: set[str]) -> list[Path]:
    """Logs, key and port files without an entry. Lock files stay: deleting one that is held would split the lock."""
    if not registry.folder.is_dir():
        return []
    # Files first, entries second: a worker that starts in between has its entry before its files.
    paths = sorted(registry.folder.iterdir())
    known = {record.worker_id for record in registry.all()} - going
    found: list[Path] = []
    for path in paths:
        name = path.name
        for suffix in (".log", ".env", ".ready"):
            stem, middle, rest = name.rpartition(suffix)
            if middle and (not rest or rest[1:].isdigit()) and stem not in known:
                found.append(path)
                break
    return found
