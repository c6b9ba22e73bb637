"""Start a worker and wait until it can really be used. Read `spawn` first.

    resolve model ─▶ estimate ─▶ [spawn.lock: choose device, write entry] ─▶ start ─▶ port file ─▶ /health ready
                                                                    ─▶ orchestrator lists it as ready ─▶ done

A worker outlives the session that started it: own session, stdin from /dev/null, output to its log. Whatever ends the
wait early (failure, Ctrl-C, deadline) also ends the half-started worker and removes its entry; its log stays.
"""

from __future__ import annotations

import ipaddress
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from llorch_pool import devices, lifecycle, likely_cause, models
from llorch_pool.context import Context
from llorch_pool.errors import PoolError, usage_error
from llorch_pool.estimate import Need, estimate, gib
from llorch_pool.http_call import NoReplyError, call, check_url
from llorch_pool.paths import check_name
from llorch_pool.process import Identity, identify, is_alive
from llorch_pool.registry import MARKER, Registry, WorkerRecord
from llorch_wire.pool import DeviceInfo, ModelInfo, Progress, WorkerInfo, WorkerSpawn

DRAIN_TIMEOUT_S = 120
POLL_S = 0.1
REGISTER_S = 30.0
_KEY = re.compile(r"[!-+\--~]{8,512}")  # printable ASCII without space and comma, as orchestratord and workers want it


def spawn(context: Context, request: WorkerSpawn) -> WorkerInfo:
    """Start one worker; returns when it serves (or, with `dry_run`, what would be started). Raises PoolError."""
    request = checked(request)
    registry = Registry(context.paths.workers)
    model = models.resolve(context, request.model)
    need = estimate(Path(model.path), request.slots)
    record = new_record(request, model)
    if request.dry_run:
        device = devices.choose(list_devices(registry), need, request.device, force=request.force)
        plan = lifecycle.inspect(placed(record, device, need), registry)
        return msgspec.structs.replace(plan, state="planned", detail=" ".join(need.lines(device.kind)))
    with registry.held(record.worker_id, context):
        record = claim(context, registry, record, request, need)
        try:
            if request.worker_key:
                registry.write_secrets(record.worker_id, {"LLORCH_WORKER_KEY": request.worker_key})
            return start(context, registry, record, request.ready_timeout_s)
        except BaseException:
            discard(context, registry, record.worker_id)
            raise


def checked(request: WorkerSpawn) -> WorkerSpawn:
    """The request with its URLs and names checked. Raises a usage error that names the option."""
    if request.engine != "torch":
        raise usage_error(f"no engine {request.engine!r}", "--engine takes: torch.")
    if request.slots is not None and not 1 <= request.slots <= 65536:
        raise usage_error(f"--slots {request.slots} is not between 1 and 65536", "Give a number of tasks at once.")
    if request.idle_timeout_s is not None and request.idle_timeout_s <= 0:
        raise usage_error("--idle-timeout must be above 0", "Give seconds, or leave it out to stay for good.")
    if not 0 <= request.port <= 65535:
        raise usage_error(f"--port {request.port} is not a port", "Leave it out: a free one is taken.")
    if request.worker_key is not None and not _KEY.fullmatch(request.worker_key):
        raise usage_error(
            "the worker key must be 8 to 512 printable characters without spaces and commas",
            "Correct LLORCH_WORKER_KEY (a new one: `openssl rand -hex 24`).",
        )
    if request.worker_id is not None:
        check_name(request.worker_id, "worker", "--id")
    changes: dict[str, str] = {}
    if request.orchestrator:
        changes["orchestrator"] = check_url(request.orchestrator, "--orchestrator")
    if request.advertise_url:
        changes["advertise_url"] = check_url(request.advertise_url, "--advertise-url")
        if not request.port:
            raise usage_error("--advertise-url needs --port", "Give the port that the address leads to.")
    return msgspec.structs.replace(request, **changes)


def new_record(request: WorkerSpawn, model: ModelInfo) -> WorkerRecord:
    """The entry of a worker that is to be started, without a device yet. Raises a usage error."""
    worker_id = request.worker_id or f"{model.name}-{secrets.token_hex(4)}"
    host = request.host or (local_address(request.orchestrator) if request.orchestrator else "127.0.0.1")
    if not request.worker_key and not _is_loopback(host):
        raise usage_error(
            f"a worker that listens at {host} needs a key, or anybody on the network could use it",
            "Set LLORCH_WORKER_KEY to the value that orchestratord has (a new one: `openssl rand -hex 24`).",
        )
    return WorkerRecord(
        worker_id=check_name(worker_id, "worker", "--id"),
        model=model.name,
        model_ref=model.ref,
        model_path=model.path,
        engine=request.engine,
        orchestrator=request.orchestrator or "",
        pool=request.pool or platform.node(),
        slots=request.slots,
        idle_timeout_s=request.idle_timeout_s,
        host=host,
        port=request.port,
        advertise_url=request.advertise_url,
        on_boot=request.on_boot,
        extra_args=request.extra_args,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def local_address(orchestrator: str) -> str:
    """This machine's address on the way to the orchestrator: the one that it can most likely reach back.

    Connecting a datagram socket sends nothing; it only asks the routing table. Raises PoolError.
    """
    parts = urlsplit(orchestrator)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        family, kind, _, _, address = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0]).split("%")[0]
    except OSError as error:
        raise PoolError(
            f"this machine has no way to {orchestrator}: {error.strerror or error}",
            next_step="Give --orchestrator a name or address that works from the pool machine, not only from yours.",
            code="orchestrator_unreachable",
        ) from error


def list_devices(registry: Registry) -> list[DeviceInfo]:
    """Devices with what is promised to workers that are still starting, and the names of those that run there."""
    promised, workers = dict[str, int](), dict[str, list[str]]()
    for record in registry.all():
        process = record.identity
        claimed = process is None or is_alive(process)
        if not claimed:
            continue
        workers.setdefault(record.device, []).append(record.worker_id)
        if not registry.is_ready(record):
            promised[record.device] = promised.get(record.device, 0) + record.need_bytes
    return devices.with_promises(devices.list_devices(), promised, workers)


def placed(record: WorkerRecord, device: DeviceInfo, need: Need) -> WorkerRecord:
    """The entry with a device and what it promises there."""
    return msgspec.structs.replace(record, device=device.device, need_bytes=need.total(device.kind))


def claim(context: Context, registry: Registry, record: WorkerRecord, request: WorkerSpawn, need: Need) -> WorkerRecord:
    """Choose the device and write the entry that promises its memory, in one locked step.

    Raises a usage error where a worker of that name runs, PoolError where none of the devices has room.
    """
    with registry.choosing(context):
        for other in registry.all():
            process = other.identity
            if process is not None and not is_alive(process):
                continue
            if other.worker_id == record.worker_id:
                which = f" (pid {other.pid})" if other.pid else ""
                raise usage_error(
                    f"worker {record.worker_id} runs already{which}",
                    f"Choose another --id, or stop it first: `llorch-pool worker stop {record.worker_id}`.",
                )
        _drop_unstarted(registry)
        device = devices.choose(list_devices(registry), need, request.device, force=request.force)
        now = round(time.time() * 1000)
        log = record.log or str(registry.file(record.worker_id, "log"))
        record = msgspec.structs.replace(placed(record, device, need), started_at_ms=now, log=log)
        registry.save(record)
    shown = device.name if device.kind == "cpu" else f"cuda:{device.index} ({device.name})"
    context.log(f"{record.worker_id}: {record.model} on {shown}, about {gib(record.need_bytes)}")
    return record


def _drop_unstarted(registry: Registry) -> None:
    """Entries without a process whose spawning command is gone would promise memory for ever."""
    for record in registry.all():
        if record.pid or time.time() * 1000 - record.started_at_ms < 15_000:
            continue
        registry.remove(record.worker_id)


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
    command = [sys.executable, "-P", "-m", "worker", "--model", record.model_path, "--worker-id", record.worker_id]
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


def lingering() -> bool:
    """Whether this user's service manager outlives logins (`loginctl enable-linger`)."""
    import pwd

    return (Path("/var/lib/systemd/linger") / pwd.getpwuid(os.getuid()).pw_name).exists()


def user_manager_answers() -> bool:
    """Whether `systemctl --user` works here: not in containers, nor without a user bus."""
    systemctl = shutil.which("systemctl")
    if systemctl is None:
        return False
    try:
        done = subprocess.run([systemctl, "--user", "show", "--property=Version"], capture_output=True, timeout=3)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


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


def discard(context: Context, registry: Registry, worker_id: str) -> None:
    """End a half-started worker at once and forget it. Never raises; its log stays for the operator."""
    try:
        record = registry.load(worker_id)
        if record.identity is not None and is_alive(record.identity):
            lifecycle.end_process(context, registry, record, record.identity, grace_s=0, term_wait_s=1.0)
    except (PoolError, OSError):
        pass
    lifecycle.kill_marked(registry, worker_id)
    registry.remove(worker_id)
