"""Is this machine fit to run workers, and does its registry tell the truth? Read `check` first."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from llorch_pool import devices, estimate, leftovers, lifecycle, models, process
from llorch_pool.context import Context
from llorch_pool.errors import PoolError, refused_by_the_system
from llorch_pool.paths import make_private
from llorch_pool.registry import Registry
from llorch_wire.pool import Finding

LOW_DISK_BYTES = 5 << 30
PROBE_BYTES = 64 << 10
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub")


def check(context: Context, *, fix: bool) -> list[Finding]:
    """Every finding, good ones too. With `fix`, what can be repaired without harm is."""
    registry = Registry(context.paths.workers)
    sections: dict[str, Callable[[], list[Finding]]] = {
        "python": _python,
        "folders": lambda: _folders(context),
        "disk": lambda: _disk(context),
        "devices": _device,
        "workers": lambda: _worker_entries(context, registry, fix=fix),
        "models": lambda: _models(context),
    }
    found: list[Finding] = []
    for subject, section in sections.items():
        try:
            found += section()
        except OSError as error:  # what the system refuses here must not hide what else there is to say
            refused = refused_by_the_system(error)
            found.append(Finding(level="error", subject=subject, text=refused.message, repair=refused.next_step))
    return found


def _ok(subject: str, text: str) -> Finding:
    return Finding(level="ok", subject=subject, text=text)


def _python() -> list[Finding]:
    found = [_ok("python", f"{sys.version.split()[0]} at {sys.executable}")]
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        found.append(
            Finding(
                level="error",
                subject="libraries",
                text=f"{', '.join(missing)} not installed: workers can't start here",
                repair="llorch pool bootstrap NAME, or pip install 'llorch[worker]'",
            )
        )
    else:
        found.append(_ok("libraries", "all that workers need"))
    return found


def _folders(context: Context) -> list[Finding]:
    found: list[Finding] = []
    for what, folder in (("state folder", context.paths.state), ("models folder", context.paths.models)):
        try:
            if folder == context.paths.state:
                make_private(folder)
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:  # made on a full disk too: it must also take something
                probe.write(bytes(PROBE_BYTES))
                probe.flush()
                os.fsync(probe.fileno())
            found.append(_ok(what, str(folder)))
        except OSError as error:
            refused = refused_by_the_system(error)
            text = f"can't write to {folder}: {error.strerror}"
            found.append(Finding(level="error", subject=what, text=text, repair=refused.next_step))
    return found


def _disk(context: Context) -> list[Finding]:
    folder = context.paths.models
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{estimate.gib(free)} free in {context.paths.models}"
    if free < LOW_DISK_BYTES:
        return [Finding(level="warning", subject="disk", text=text, repair="llorch-pool model remove NAME")]
    return [_ok("disk", text)]


def _device() -> list[Finding]:
    try:
        gpus = [device for device in devices.list_devices() if device.kind == "cuda"]
    except PoolError as error:
        return [Finding(level="error", subject="devices", text=error.message, repair=error.next_step)]
    if gpus:
        return [
            _ok(f"cuda:{gpu.index}", f"{gpu.name}, {estimate.gib(gpu.memory_free_bytes)} free, driver {gpu.driver}")
            for gpu in gpus
        ]
    if Path("/proc/driver/nvidia").exists() and importlib.util.find_spec("pynvml") is None:
        text = "there is an NVIDIA driver, but nvidia-ml-py is not installed: GPUs stay unseen"
        return [Finding(level="error", subject="devices", text=text, repair="pip install nvidia-ml-py")]
    return [_ok("devices", "no GPU: workers run on the CPU")]


def _worker_entries(context: Context, registry: Registry, *, fix: bool) -> list[Finding]:
    found: list[Finding] = []
    dead = ("exited", "pid-reused")
    for info in lifecycle.list_workers(registry):
        subject = f"worker {info.worker_id}"
        if info.state in dead and info.supervisor_pid:
            found.append(Finding(level="warning", subject=subject, text=f"{info.state}: {info.detail}"))
        elif info.state in dead or (info.state == "rebooted" and not info.on_boot):
            found.append(
                Finding(
                    level="warning",
                    subject=subject,
                    text=f"on record, but {info.state}: {info.detail}",
                    repair="llorch-pool worker cleanup",
                    fixed=fix,
                )
            )
        elif info.state == "rebooted":
            text = "did not come back after the reboot"
            found.append(Finding(level="error", subject=subject, text=text, repair="llorch-pool worker restore"))
        elif info.state in ("unresponsive", "failed"):
            repair = f"llorch-pool worker logs {info.worker_id}"
            found.append(Finding(level="error", subject=subject, text=f"{info.state}: {info.detail}", repair=repair))
        else:
            found.append(_ok(subject, f"{info.state}, pid {info.pid}, {info.url}"))
    loose = lifecycle.strays(registry)
    serving: set[str] = set()
    for hidden in lifecycle.unlisted(registry, loose):
        if hidden.serves_at:
            serving.add(hidden.worker_id)
            subject = f"worker {hidden.worker_id}"
            found.append(Finding(level="error", subject=subject, text=hidden.text, repair=hidden.next_step))
        elif hidden.entry is not None:
            repair = "llorch-pool worker cleanup"
            found.append(
                Finding(level="warning", subject=hidden.entry.name, text=hidden.text, repair=repair, fixed=fix)
            )
    for stray in loose:
        if stray.worker_id in serving:
            continue
        text = f"pid {stray.pid} belongs to {stray.worker_id}, which is not on record as running: {stray.command}"
        found.append(
            Finding(level="error", subject="process", text=text, repair="llorch-pool worker cleanup", fixed=fix)
        )
    if fix and any(finding.fixed for finding in found):
        leftovers.cleanup(context, registry, dry_run=False)
    if process.start_time(os.getpid()) is None:
        found.append(Finding(level="error", subject="/proc", text="process start times can't be read here"))
    return found


def _models(context: Context) -> list[Finding]:
    whole, damaged = models.scan(context)
    found = [
        Finding(
            level="error",
            subject=f"model {name}",
            text=error.message,
            repair=f"llorch-pool model remove --force {name}, then download it again",
        )
        for name, error in damaged.items()
    ]
    for info in whole:
        wrong = [
            file.path
            for file in info.files
            if not (path := Path(info.path) / file.path).is_file() or path.stat().st_size != file.size
        ]
        if wrong:
            text = f"missing or of another size: {', '.join(wrong)}"
            found.append(
                Finding(
                    level="error",
                    subject=f"model {info.name}",
                    text=text,
                    repair=f"llorch-pool model remove {info.name}, then download it again",
                )
            )
        else:
            found.append(_ok(f"model {info.name}", f"{estimate.gib(info.bytes)}, {info.ref}"))
    return found
