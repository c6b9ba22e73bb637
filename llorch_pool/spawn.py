"""Start a worker and wait until it can really be used. Read `spawn` first.

    resolve model ─▶ estimate ─▶ [spawn.lock: choose device, write entry] ─▶ start ─▶ port file ─▶ /health ready
                                                                    ─▶ orchestrator lists it as ready (`launch`)

A worker outlives the session that started it: own session, stdin from /dev/null, output to its log. Whatever ends the
wait early (failure, Ctrl-C, deadline) also ends the half-started worker and removes its entry; its log stays.
"""

from __future__ import annotations

import ipaddress
import math
import platform
import re
import secrets
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from llorch_pool import devices, ending, lifecycle, models
from llorch_pool.context import Context
from llorch_pool.errors import PoolError, usage_error
from llorch_pool.estimate import Need, estimate, gib
from llorch_pool.http_call import check_url
from llorch_pool.launch import start
from llorch_pool.paths import check_name
from llorch_pool.process import is_alive
from llorch_pool.registry import Registry, WorkerRecord
from llorch_wire.pool import DeviceInfo, ModelInfo, WorkerInfo, WorkerSpawn

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
    if not 1 <= request.ready_timeout_s < math.inf:
        raise usage_error(f"--ready-timeout {request.ready_timeout_s:g} is not 1 or more", "Give seconds.")
    if request.idle_timeout_s is not None and not 0 < request.idle_timeout_s < math.inf:
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
        for hidden in lifecycle.unlisted(registry):
            if hidden.worker_id == record.worker_id and hidden.pid:
                raise PoolError(hidden.text, next_step=f"Choose another --id, or {hidden.next_step}.", code="damaged")
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


def discard(context: Context, registry: Registry, worker_id: str) -> None:
    """End a half-started worker at once and forget it. Never raises; its log stays for the operator."""
    try:
        record = registry.load(worker_id)
        if record.identity is not None and is_alive(record.identity):
            ending.end_process(context, registry, record, record.identity, grace_s=0, term_wait_s=1.0)
    except (PoolError, OSError):
        pass
    ending.kill_marked(registry, worker_id)
    registry.remove(worker_id)
