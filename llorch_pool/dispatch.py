"""One command in, its result out: what the command line and `rpc` have in common. Read `execute` first.

Each branch imports what it needs: `worker list` must not pay for the Hub's client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llorch_pool.context import Context
from llorch_pool.errors import PoolError, usage_error
from llorch_wire import pool as wire

if TYPE_CHECKING:
    from llorch_pool.registry import Registry


def execute(context: Context, command: wire.AnyCommand) -> Any:
    """Run a command. Returns what `RESULTS` promises for it. Raises PoolError."""
    match command:
        case (
            wire.ModelDownload()
            | wire.ModelList()
            | wire.ModelShow()
            | wire.ModelVerify()
            | wire.ModelRemove()
            | wire.ModelPartial()
        ):
            return _model(context, command)
        case wire.WorkerSpawn():
            return _spawn(context, command)
        case wire.DeviceList():
            return _devices(context)
        case wire.Status():
            return status(context)
        case wire.Doctor():
            from llorch_pool.doctor import check

            return check(context, fix=command.fix)
        case _:
            return _worker(context, command)


def _model(context: Context, command: wire.AnyCommand) -> Any:
    from llorch_pool import models

    match command:
        case wire.ModelDownload():
            return models.download(context, command)
        case wire.ModelList():
            return models.list_models(context)
        case wire.ModelShow():
            return models.show(context, command.name)
        case wire.ModelVerify():
            report = models.verify(context, command.name)
            if not report.ok:
                raise PoolError(
                    f"{command.name} is damaged",
                    detail="\n".join(report.problems),
                    next_step=f"`llorch-pool model remove --force {command.name}`, then download it again.",
                    code="damaged",
                )
            return report
        case wire.ModelRemove():
            return models.remove(context, command.name, force=command.force)
        case wire.ModelPartial():
            return models.partial(context, command.name, command.digest)
        case _:
            raise AssertionError(command)


def _spawn(context: Context, command: wire.WorkerSpawn) -> wire.WorkerInfo:
    from llorch_pool import on_boot, spawn

    info = spawn.spawn(context, command)
    if command.on_boot and not command.dry_run:
        obstacle = on_boot.enable(context)
        if obstacle:
            context.log(f"--on-boot: the worker runs, but will not come back by itself: {obstacle}", "warning")
    return info


def _worker(context: Context, command: wire.AnyCommand) -> Any:
    from llorch_pool.registry import Registry

    registry = Registry(context.paths.workers)
    match command:
        case wire.WorkerList():
            return _workers(context, registry)
        case wire.WorkerStop():
            ids = _all_to_stop(context, registry, command) if command.all else command.worker_ids
            if not ids and not command.all:
                raise usage_error("which worker?", "Name workers, or use --all.")
            from llorch_pool.ending import stop_workers

            return stop_workers(context, registry, ids, command.grace_s, force=command.force)
        case wire.WorkerLogs():
            from llorch_pool.logs import show

            return show(context, registry, command)
        case wire.WorkerCleanup():
            from llorch_pool.leftovers import cleanup

            return cleanup(context, registry, dry_run=command.dry_run)
        case wire.WorkerRestore():
            from llorch_pool.on_boot import restore

            return restore(context)
        case _:
            raise AssertionError(command)


def _workers(context: Context, registry: Registry) -> list[wire.WorkerInfo]:
    """Every worker here; one that can't be shown, because its entry is damaged, is said."""
    from llorch_pool.lifecycle import list_workers, unlisted

    for found in unlisted(registry):
        context.log(f"not shown: {found.text}; next: {found.next_step}", "warning")
    return list_workers(registry)


def _all_to_stop(context: Context, registry: Registry, command: wire.WorkerStop) -> list[str]:
    """Every worker here but those that their supervisor would start again; these are said."""
    ids: list[str] = []
    for record in registry.all():
        if not command.force and (pid := record.live_supervisor_pid):
            text = f"{record.worker_id} stays: `{record.supervisor}` (pid {pid}) runs it and would start it again"
            context.log(text, "warning")
        else:
            ids.append(record.worker_id)
    from llorch_pool.lifecycle import unlisted

    for found in unlisted(registry):
        context.log(f"not stopped: {found.text}; next: {found.next_step}", "warning")
    return ids


def _devices(context: Context) -> list[wire.DeviceInfo]:
    from llorch_pool.registry import Registry
    from llorch_pool.spawn import list_devices

    return list_devices(Registry(context.paths.workers))


def status(context: Context) -> wire.PoolStatus:
    """Everything about this machine in one answer."""
    import platform
    import shutil

    from llorch_pool import lifecycle, models
    from llorch_pool.registry import Registry

    registry = Registry(context.paths.workers)
    folder = context.paths.models
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    return wire.PoolStatus(
        host=platform.node(),
        version=wire.VERSION,
        python=platform.python_version(),
        devices=_devices(context),
        models=models.list_models(context),
        workers=_workers(context, registry),
        strays=lifecycle.strays(registry),
        models_dir=str(context.paths.models),
        state_dir=str(context.paths.state),
        disk_free_bytes=disk.free,
        disk_total_bytes=disk.total,
    )
