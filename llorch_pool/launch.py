"""From an entry in the registry to a worker that serves. Read `start` first.

    process in a session of its own ─▶ port file or first log line ─▶ /health ready ─▶ the orchestrator lists it

stdin from /dev/null, output to its log: the worker outlives the session that started it. Who calls `start` ends it when
the wait fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec

from llorch_pool import devices, lifecycle, likely_cause
from llorch_pool.context import Context
from llorch_pool.errors import PoolError
from llorch_pool.http_call import NoReplyError, call
from llorch_pool.paths import python
from llorch_pool.process import Identity, identify, is_alive
from llorch_pool.registry import MARKER, Registry, WorkerRecord
from llorch_pool.user_manager import lingering, user_manager_answers
from llorch_wire.pool import Progress, WorkerInfo

DRAIN_TIMEOUT_S = 120
POLL_S = 0.1
REGISTER_S = 30.0


def start(
    context: Context, registry: Registry, record: WorkerRecord, ready_timeout_s: float, *, registered: bool = True
) -> WorkerInfo:
    """Start the process of a claimed entry and wait until it serves. Raises PoolError with the log's tail.

    `registered` False: don't wait for the orchestrator, which after a power cut may come up later than this machine.
    """
    ready_file = registry.file(record.worker_id, "ready")
    ready_file.unlink(missing_ok=True)
    record = _launch(registry, record, ready_file)
    deadline = time.monotonic() + ready_timeout_s
    process = record.identity
    if process is None:
        raise failed(record, "the worker ended at once")
    record = _await_address(context, registry, record, process, ready_file, deadline)
    info = _await_ready(context, registry, record, process, deadline)
    if registered and record.orchestrator:
        _await_registered(context, registry, record, process, deadline)
    registry.save(msgspec.structs.replace(record, ready=True))
    return info


def _launch(registry: Registry, record: WorkerRecord, ready_file: Path) -> WorkerRecord:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    environ.update(registry.secrets(record.worker_id))
    environ[MARKER] = f"{registry.folder}:{record.worker_id}"
    if record.device != devices.CPU:
        environ["CUDA_VISIBLE_DEVICES"] = record.device
    log = Path(record.log)
    if log.exists() and log.stat().st_size:
        log.replace(f"{log}.1")  # one life, one log: what an earlier one said must not be read as this one's words
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        child = subprocess.Popen(
            [*_surviving_logout(record), *worker_command(record, ready_file)],
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=handle,
            env=environ,
            cwd="/",
            start_new_session=True,
            close_fds=True,
        )
    finally:
        os.close(handle)
    process = identify(child.pid)
    if process is None:
        child.wait(5)
        raise failed(record, f"the worker ended at once with status {child.returncode}")
    # It is to outlive this process: nobody here waits for it, the kernel hands it to init.
    child.returncode = 0
    record = msgspec.structs.replace(
        record, pid=process.pid, start_time=process.start_time, boot_id=process.boot_id, url="", stopping=False
    )
    registry.save(record)
    return record


def worker_command(record: WorkerRecord, ready_file: Path) -> list[str]:
    """How the worker is started. Keys are never in it: command lines can be read by every user of the machine."""
    command = [python(), "-P", "-m", "worker", "--model", record.model_path, "--worker-id", record.worker_id]
    command += ["--host", record.host or "127.0.0.1", "--port", str(record.port), "--ready-file", str(ready_file)]
    command += ["--device", "cpu" if record.device == devices.CPU else "cuda"]
    options = {
        "--model-name": record.model,
        "--orchestrator": record.orchestrator,
        "--advertise-url": record.advertise_url,
        "--pool": record.pool,
        "--slots": record.slots,
        "--idle-timeout": record.idle_timeout_s,
        # `worker stop` says how long running work may take; this is only the bound where nobody does.
        "--drain-timeout": DRAIN_TIMEOUT_S,
    }
    for flag, value in options.items():
        if value not in (None, ""):
            command += [flag, str(value)]
    return command + record.extra_args


def _surviving_logout(record: WorkerRecord) -> list[str]:
    """A prefix that moves the worker out of the login session's cgroup where logind would end it with the session."""
    runner = shutil.which("systemd-run")
    if runner is None or not lingering() or not user_manager_answers():
        return []
    return [runner, "--user", "--scope", "--quiet", f"--unit=llorch-worker-{record.worker_id}", "--"]


def _await_address(
    context: Context, registry: Registry, record: WorkerRecord, process: Identity, ready_file: Path, deadline: float
) -> WorkerRecord:
    said = ""
    while True:
        url = read_ready_file(ready_file) or announced_url(Path(record.log), record.worker_id)
        if url:
            # An advertised address may not work from here (NAT, a proxy): ask at the one that was bound.
            record = msgspec.structs.replace(record, url=bound_url(record) if record.advertise_url else url)
            registry.save(record)
            return record
        words = lifecycle.log_words(Path(record.log))
        if words != said or not said:
            said = words
            context.progress(
                Progress(phase="loading", text=f"{record.worker_id}: {said or 'starting'}"), force=bool(said)
            )
        _still_coming(context, record, process, deadline, "it did not bind its port")


def read_ready_file(path: Path) -> str:
    """URL in the file that a worker writes once it takes work, empty while it isn't there. Raises PoolError."""
    try:
        return str(msgspec.json.decode(path.read_bytes(), type=dict[str, Any])["url"]).rstrip("/")
    except FileNotFoundError:
        return ""
    except (msgspec.MsgspecError, KeyError) as error:
        raise PoolError(f"{path} is not what a worker writes: {error}", next_step="Report this.") from error


def bound_url(record: WorkerRecord) -> str:
    """URL at which this machine reaches a worker whose port is known."""
    host = record.host or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{host}]:{record.port}" if ":" in host else f"http://{host}:{record.port}"


def announced_url(log: Path, worker_id: str) -> str:
    """URL in the first line that a worker logs, long before it is ready: /health there tells how the loading goes."""
    pattern = re.compile(rf"^llorch-worker {re.escape(worker_id)}: .* at (https?://\S+), loading$")
    for line in reversed(lifecycle.tail(log, 50)):
        found = pattern.match(line)
        if found:
            return found.group(1)
    return ""


def _await_ready(
    context: Context, registry: Registry, record: WorkerRecord, process: Identity, deadline: float
) -> WorkerInfo:
    said = ""
    while True:
        info = lifecycle.inspect(record, registry)
        if info.state == "ready":
            return info
        if info.state == "failed":
            raise failed(record, info.detail or "the engine could not be started")
        if info.detail and info.detail != said:
            said = info.detail
            context.progress(Progress(phase="loading", text=f"{record.worker_id}: {said}"), force=True)
        _still_coming(context, record, process, deadline, "it was not ready")


def _await_registered(
    context: Context, registry: Registry, record: WorkerRecord, process: Identity, deadline: float
) -> None:
    """Wait until the orchestrator has tried the worker's address and lists it as ready."""
    key = registry.secrets(record.worker_id).get("LLORCH_WORKER_KEY")
    url = f"{record.orchestrator}/v2/workers/{record.worker_id}"
    problem = "it has not answered yet"
    patience = time.monotonic() + REGISTER_S
    while True:
        try:
            reply = call("GET", url, key=key)
            if reply.status == 200 and reply.body.get("state", reply.body.get("status")) == "ready":
                # Registering only shows that the worker reaches the orchestrator; tasks go the other way.
                back = call("GET", f"{url}/health", key=key)
                if back.status != 200 or back.body.get("reachable") is not False:
                    return
                problem = f"it can't reach {record.advertise_url or record.url} from where it runs"
            else:
                problem = _orchestrator_says(reply.status, reply.message)
            if reply.status in (401, 403):
                patience = 0.0  # waiting changes nothing
        except NoReplyError as error:
            problem = f"it can't be reached from here: {error}"
        context.progress(Progress(phase="registering", text=f"{record.worker_id}: {record.orchestrator}: {problem}"))
        if time.monotonic() > min(deadline, patience):
            raise failed(
                record,
                f"the worker runs, but the orchestrator at {record.orchestrator} does not have it: {problem}",
                next_step="Check --orchestrator, LLORCH_WORKER_KEY on both sides, and that the orchestrator can reach "
                f"{record.advertise_url or record.url} (--host or --advertise-url change it).",
                code="not_registered",
            )
        _still_coming(context, record, process, deadline, problem)


def _orchestrator_says(status: int, message: str) -> str:
    if status in (401, 403):
        return "it refuses the worker key"
    if status == 404:
        return "it does not know this worker yet"
    return f"HTTP {status} {message}".strip() if status != 200 else "it lists the worker, but not as ready"


def _still_coming(context: Context, record: WorkerRecord, process: Identity, deadline: float, problem: str) -> None:
    """One turn of a wait. Raises when the worker ended or the time is over."""
    if not is_alive(process):
        raise failed(record, "the worker ended while it was starting")
    if time.monotonic() >= deadline:
        error = failed(record, f"{problem} in time", code="not_ready")
        error.next_step = "Give it more time with --ready-timeout. " + error.next_step
        raise error
    context.wait(POLL_S)


def failed(record: WorkerRecord, what: str, *, next_step: str = "", code: str = "spawn_failed") -> PoolError:
    """A failed start with the log's tail and the likely cause."""
    lines = lifecycle.tail(Path(record.log), 20)
    cause = likely_cause.explain("\n".join([*lines, what]))
    return PoolError(
        f"{record.worker_id}: {what}" + (f". Likely cause: {cause.text}" if cause else ""),
        next_step=next_step or (cause.next_step if cause else f"The whole log is {record.log} on that machine."),
        detail="\n".join(lines),
        code=code,
    )
