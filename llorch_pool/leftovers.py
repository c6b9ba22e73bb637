"""What dead workers leave behind, and what of it can go. Read `cleanup` first."""

from __future__ import annotations

import contextlib
from pathlib import Path

from llorch_pool.context import Context
from llorch_pool.ending import kill_marked
from llorch_pool.errors import PoolError
from llorch_pool.files import drop_free_lock
from llorch_pool.lifecycle import list_workers, strays, unlisted
from llorch_pool.process import is_alive
from llorch_pool.registry import Registry
from llorch_wire.pool import CleanupReport


def cleanup(context: Context, registry: Registry, *, dry_run: bool) -> CleanupReport:
    """Remove entries of dead workers, stray processes, and files that belong to no worker.

    A worker that died with a reboot and was spawned with --on-boot keeps its entry: `worker restore` needs it. One that
    serves although its entry is damaged or gone is left alone, with a warning, until it is drained: it may have tasks.
    """
    entries = [
        info.worker_id
        for info in list_workers(registry)
        if info.state in ("exited", "pid-reused") or (info.state == "rebooted" and not info.on_boot)
    ]
    loose = strays(registry)
    spared: set[str] = set()
    for found in unlisted(registry, loose):
        if found.serves_at:
            spared.add(found.worker_id)
            context.log(f"left alone: {found.text}; next: {found.next_step}", "warning")
        elif found.entry is not None and dry_run:
            context.log(f"would go: {found.text}")
        elif found.entry is not None:
            _drop_entry(context, found.entry)
    loose = [stray for stray in loose if stray.worker_id not in spared]
    removed = entries if dry_run else [worker_id for worker_id in entries if _forget(context, registry, worker_id)]
    if not dry_run:
        for worker_id in {stray.worker_id for stray in loose}:
            _end_strays(context, registry, worker_id)
    files = _left_files(registry, going=set(removed) if dry_run else set(), spared=spared)
    if not dry_run:
        for path in files:
            path.unlink(missing_ok=True)
    locks = _free_locks(context, registry, dry_run=dry_run)
    return CleanupReport(entries=removed, strays=loose, files=[path.name for path in files + locks], dry_run=dry_run)


def _drop_entry(context: Context, path: Path) -> None:
    """Remove a damaged entry. A folder in its place was not made here: it goes only if it is empty."""
    try:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    except OSError as error:
        context.log(f"{path} can't be removed ({error.strerror}): look what it is, and move it away", "warning")


def _forget(context: Context, registry: Registry, worker_id: str) -> bool:
    """Remove a dead worker's entry. False when another command started it again meanwhile."""
    with registry.held(worker_id, context):
        with contextlib.suppress(PoolError):
            record = registry.load(worker_id)
            if record.identity is not None and is_alive(record.identity):
                return False
        registry.remove(worker_id)
    return True


def _end_strays(context: Context, registry: Registry, worker_id: str) -> None:
    """End what carries a dead worker's marker; nothing if the worker was started again meanwhile."""
    with registry.held(worker_id, context):
        record = next((record for record in registry.all() if record.worker_id == worker_id), None)
        if record is None or record.identity is None or not is_alive(record.identity):
            kill_marked(registry, worker_id)


def _left_files(registry: Registry, *, going: set[str], spared: set[str]) -> list[Path]:
    """Logs, key and port files without an entry."""
    if not registry.folder.is_dir():
        return []
    # Files first, entries second: a worker that starts in between has its entry before its files.
    paths = sorted(registry.folder.iterdir())
    known = {record.worker_id for record in registry.all()} - going | spared
    found: list[Path] = []
    for path in paths:
        name = path.name
        for suffix in (".log", ".env", ".ready"):
            stem, middle, rest = name.rpartition(suffix)
            if middle and (not rest or rest[1:].isdigit()) and stem not in known:
                found.append(path)
                break
    return found


def _free_locks(context: Context, registry: Registry, *, dry_run: bool) -> list[Path]:
    """Remove lock files of workers that have no entry and of models that nobody brings; one that is held stays."""
    names = registry.folder.glob("*.lock") if registry.folder.is_dir() else ()
    workers = [path for path in names if path.name != "spawn.lock" and not path.with_suffix(".json").exists()]
    models = context.paths.partial.glob("*.lock") if context.paths.partial.is_dir() else ()
    return [path for path in sorted([*workers, *models]) if drop_free_lock(path, dry_run=dry_run)]
