"""What supervisors such as `llorch up` use: they start workers themselves, and the registry is to know of them.

    llorch-pool worker spawn MODEL --foreground --supervisor NAME --id ID --port N … [-- flags of the worker]
        resolve model ─▶ estimate ─▶ [ID.lock, spawn.lock: choose device, write entry with our own pid] ─▶ exec
    llorch-pool worker release --supervisor NAME --prefix P     a clean stop: forget those of one's workers that ended
    llorch-pool model resolve REF                               where a model is, as JSON; brought here if it isn't

The process that the supervisor started becomes the worker: its pid, parent, death signal, output and environment stay
what the supervisor made them. Nobody waits for it here, nor ends it: that is the supervisor's. The key comes from
LLORCH_WORKER_KEY. One of these runs before every start of a worker, so nothing here imports typer.

Read `spawn` first.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from llorch_pool import devices
from llorch_pool.context import Context
from llorch_pool.ending import kill_marked
from llorch_pool.errors import PoolError, usage_error
from llorch_pool.process import identify, is_alive
from llorch_pool.registry import MARKER, Registry, WorkerRecord
from llorch_pool.render import Reporter
from llorch_wire.pool import DeviceInfo, Log, ModelInfo, WorkerSpawn

LOCKS_S = 120.0
"""How long another command may hold a lock that is needed here; `worker stop` holds one while it drains."""
RELEASE_S = 8.0
KEY = "LLORCH_WORKER_KEY"
VISIBLE = "CUDA_VISIBLE_DEVICES"


def is_meant(words: Sequence[str]) -> bool:
    """Whether a command line of llorch-pool is one of those served here."""
    options = words[: words.index("--")] if "--" in words else words
    start = tuple(words[:2])
    spawning = start == ("worker", "spawn") and "--foreground" in options
    return spawning or start in (("worker", "release"), ("model", "resolve"))


def main(words: Sequence[str]) -> int:
    """Serve one command line, the program's name left out. Returns the exit code; a started worker never returns."""
    command = {"spawn": spawn, "release": release, "resolve": resolve}[words[1]]
    reporter = Reporter()
    try:
        command(words[2:], reporter)
    except PoolError as error:
        reporter.close()
        lines = [*(f"  {line}" for line in error.detail.splitlines()), f"llorch-pool: {error.message}", error.next_step]
        print("\n".join(line for line in lines if line), file=sys.stderr, flush=True)
        return error.rc
    return 0


def spawn(arguments: Sequence[str], reporter: Reporter) -> NoReturn:
    """Claim an entry and become the worker. Raises PoolError."""
    from llorch_pool.launch import worker_command
    from llorch_pool.spawn import checked, new_record

    cut = list(arguments).index("--") if "--" in arguments else len(arguments)
    given = _parser().parse_args(arguments[:cut])
    context = Context(reporter)
    device = given.device or context.environ.get("LLORCH_WORKER_DEVICE") or None
    request = checked(
        WorkerSpawn(
            model=given.model,
            orchestrator=given.orchestrator,
            worker_key=context.environ.get(KEY) or None,
            worker_id=given.id,
            device=device,
            slots=given.slots,
            host=given.host,
            port=given.port,
            force=given.force,
            extra_args=list(arguments[cut + 1 :]),
        )
    )
    if not request.port:
        raise usage_error("--foreground needs a --port above 0", "A worker that is started again keeps its address.")
    model = find_model(context, request.model)
    # Pool and name may be settings of the worker: a flag would hide them from it.
    name = context.environ.get("LLORCH_WORKER_MODEL_NAME") or model.name
    record = msgspec.structs.replace(new_record(request, model), pool=given.pool or "", model=name, log=given.log or "")
    registry = Registry(context.paths.workers)
    record, recorded = claim_for_ourselves(reporter, registry, as_ourselves(record, given.supervisor), request)
    command = worker_command(record, registry.file(record.worker_id, "ready"))
    if not recorded:
        command = without(command, "--ready-file")
    if device in (None, "mps"):
        # Nothing asked for: torch may see no GPU where the driver shows one, or another kind of device.
        command = without(command, "--device") + (["--device", device] if device else [])
    reporter.close()
    sys.stderr.flush()
    try:
        os.execve(command[0], command, worker_environment(context.environ, registry, record, recorded=recorded))
    except OSError as error:
        raise PoolError(f"the worker can't be started: {error.strerror}", next_step="Install llorch again.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llorch-pool worker spawn --foreground",
        description="Become a worker that stands in `llorch-pool worker list`. For supervisors: whoever starts this "
        "starts it again and ends it. What follows `--` are flags of llorch-worker; the key is LLORCH_WORKER_KEY.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="name of a model here, a reference, or an absolute folder")
    parser.add_argument("--foreground", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--supervisor", default="a supervisor", help="what `worker list` calls the starting program")
    parser.add_argument("--id", required=True, help="name of the worker, the same at every start")
    parser.add_argument("--port", type=int, required=True, help="port to bind, the same at every start")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind")
    parser.add_argument("--orchestrator", help="URL of orchestratord")
    parser.add_argument("--pool", help="pool it belongs to; what the worker's settings say when left out")
    parser.add_argument("--device", help="cpu, cuda, cuda:N, a GPU's UUID, or mps")
    parser.add_argument("--slots", type=int, help="tasks at once")
    parser.add_argument("--log", help="file that its output goes to, for `worker logs`")
    parser.add_argument("--force", action="store_true", help="start it even if it does not seem to fit")
    return parser


def find_model(context: Context, text: str) -> ModelInfo:
    """The model that a name, a reference or a folder means; a reference is downloaded if need be. Raises PoolError."""
    from llorch_pool import models

    path = Path(text)
    if path.is_absolute():
        kept = path.parent == context.paths.models and (path / "model.json").is_file()
        text = path.name if kept else f"file:{path}"
    return models.resolve(context, text)


def as_ourselves(record: WorkerRecord, supervisor: str) -> WorkerRecord:
    """The entry with this process as its worker and this process' parent as its supervisor."""
    from llorch_pool.launch import bound_url

    me, parent = identify(os.getpid()), identify(os.getppid())
    if me is None or parent is None:
        raise PoolError("this process' start time can't be read", next_step="/proc must be mounted.")
    return msgspec.structs.replace(
        record,
        pid=me.pid,
        start_time=me.start_time,
        boot_id=me.boot_id,
        url=bound_url(record),
        supervisor=supervisor,
        supervisor_pid=parent.pid,
        supervisor_start_time=parent.start_time,
    )


def claim_for_ourselves(
    reporter: Reporter, registry: Registry, record: WorkerRecord, request: WorkerSpawn
) -> tuple[WorkerRecord, bool]:
    """The entry with its device, and whether it could be written. Raises PoolError.

    An earlier life's entry is replaced, and what is left of its processes ended. Where the registry can't be written
    (a full or read-only home) the worker starts all the same: it serves, only `worker list` does not have it.
    """
    from llorch_pool.estimate import estimate
    from llorch_pool.spawn import claim, list_devices, placed

    context = Context(reporter, timeout_s=LOCKS_S)
    need = estimate(Path(record.model_path), request.slots)

    def wanted(found: list[DeviceInfo]) -> str | None:
        return device_for(request.device, context.environ.get(VISIBLE), found)

    try:
        try:
            with registry.held(record.worker_id, context):
                before = registry.file(record.worker_id, "json").exists()
                request = msgspec.structs.replace(request, device=wanted(list_devices(registry)))
                record = claim(context, registry, record, request, need)
                if before:
                    kill_marked(registry, record.worker_id)
                if request.worker_key:
                    registry.write_secrets(record.worker_id, {KEY: request.worker_key})
                else:
                    registry.file(record.worker_id, "env").unlink(missing_ok=True)
                return record, True
        except (OSError, PoolError) as error:
            reason = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(reason, OSError):
                raise
            text = f"{record.worker_id} starts, but can't be put on record in {registry.folder}: {reason.strerror}"
            reporter(Log(text=f"{text}; `llorch-pool worker list` will not show it", level="warning"))
            found = devices.list_devices()
            return placed(record, devices.choose(found, need, wanted(found), force=request.force), need), False
    except PoolError as error:
        if error.code == "no_memory":
            error.next_step = (
                "Stop a worker (`llorch-pool worker list` shows them), or choose a smaller model, fewer workers, fewer "
                "--slots or another --device."
            )
        raise


def device_for(asked: str | None, visible: str | None, found: list[DeviceInfo]) -> str | None:
    """What `devices.choose` is to look for, so that `visible` (CUDA_VISIBLE_DEVICES) counts as it does for CUDA.

    `asked`: None, cpu, mps, cuda, cuda:N (the Nth of the visible ones) or a UUID. Raises a usage error.
    """
    if asked == "mps":  # its memory is the machine's
        return devices.CPU
    if asked == devices.CPU or visible is None or not any(device.kind == "cuda" for device in found):
        return asked
    names: list[str] = []
    for name in visible.split(","):
        if not name.strip() or name.strip().startswith("-"):
            break  # CUDA leaves out everything behind the first that isn't a device
        names.append(name.strip())
    number = re.fullmatch(r"(?:(?:cuda|gpu):)?(\d{1,3})", asked or "")
    if number is None and asked not in (None, "auto", "cuda", "gpu"):
        return asked
    names = names[int(number[1]) : int(number[1]) + 1] if number else names
    if not names:
        if asked is None:
            return devices.CPU
        raise usage_error(f"{VISIBLE}={visible} leaves no {asked}", f"Change {VISIBLE}, or use --device cpu.")
    seen = [devices.find(found, name) for name in names]
    return max(seen, key=lambda device: device.memory_free_bytes - device.promised_bytes).device


def worker_environment(
    environ: Mapping[str, str], registry: Registry, record: WorkerRecord, *, recorded: bool
) -> dict[str, str]:
    """The supervisor's environment, the marker of a recorded worker, and its GPU as the only one."""
    result = {name: value for name, value in environ.items() if name != MARKER}
    if recorded:
        result[MARKER] = f"{registry.folder}:{record.worker_id}"
    if record.device != devices.CPU:
        result[VISIBLE] = record.device
    return result


def without(command: Sequence[str], flag: str) -> list[str]:
    """A command line without a flag and its value."""
    at = command.index(flag)
    return [*command[:at], *command[at + 2 :]]


def release(arguments: Sequence[str], reporter: Reporter) -> None:
    """Remove the entries of a supervisor's workers that have ended. Their logs are the supervisor's and stay."""
    parser = argparse.ArgumentParser(prog="llorch-pool worker release", allow_abbrev=False)
    parser.add_argument("--supervisor", required=True, help="as it was given to `worker spawn --foreground`")
    parser.add_argument("--prefix", required=True, help="what the worker ids begin with")
    given = parser.parse_args(arguments)
    context = Context(reporter, timeout_s=RELEASE_S)
    registry = Registry(context.paths.workers)
    for found in registry.all():
        if found.supervisor != given.supervisor or not found.worker_id.startswith(given.prefix):
            continue
        with registry.held(found.worker_id, context), contextlib.suppress(PoolError):
            record = registry.load(found.worker_id)
            if record.identity is None or not is_alive(record.identity):
                registry.remove(record.worker_id)


def resolve(arguments: Sequence[str], reporter: Reporter) -> None:
    """Print where a model is. Raises PoolError."""
    parser = argparse.ArgumentParser(prog="llorch-pool model resolve", allow_abbrev=False)
    parser.add_argument("ref", metavar="REF", help="name of a model here, a reference, or an absolute folder")
    given = parser.parse_args(arguments)
    context = Context(reporter)

    def interrupted(number: int, _: object) -> None:
        context.abort("interrupted" if number == signal.SIGINT else "terminated")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    info = find_model(context, given.ref)
    reporter.close()
    print(msgspec.json.encode(msgspec.structs.replace(info, files=[])).decode(), flush=True)
