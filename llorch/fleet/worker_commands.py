"""`llorch worker ...` as pools tell and do it. `worker list` without a pool is what orchestratord knows (HTTP)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from llorch.errors import UsageProblem
from llorch.fleet.owners import owners_of, pools_with_log
from llorch.fleet.targets import (
    AllOption,
    Asked,
    DryRun,
    PoolsOption,
    TimeoutOption,
    answer,
    app,
    ask,
    open_registry,
    show,
)
from llorch.options import UrlOption, finite
from llorch.output import Column, JsonOption, OutputOption, chosen, say, size
from llorch_wire import pool as wire

if TYPE_CHECKING:
    import threading

    from llorch.fleet.fanout import Outcome
    from llorch.fleet.live import Live
    from llorch.fleet.pools import Pool

worker_app = app("Workers on pools.")

COLUMNS = (
    Column("POOL", "pool"),
    Column("WORKER", "worker_id"),
    Column("STATE", "state"),
    Column("MODEL", "model"),
    Column("DEVICE", "device"),
    Column("FREE", "slots_free", right=True),
    Column("SLOTS", "slots_total", right=True),
    Column("NEEDS", "need_bytes", size, right=True),
    Column("URL", "url"),
    Column("DETAIL", "detail"),
)
STOP_COLUMNS = (
    Column("POOL", "pool"),
    Column("WORKER", "worker_id"),
    Column("HOW", "how"),
    Column("TOOK", "took_ms", right=True),
)


def _pids(strays: list[dict[str, Any]]) -> str:
    return ",".join(str(stray["pid"]) for stray in strays)


def _count(items: list[Any]) -> str:
    return str(len(items))


CLEANUP_COLUMNS = (
    Column("POOL", "pool"),
    Column("ENTRIES", "entries", ",".join),
    Column("STRAYS", "strays", _pids),
    Column("FILES", "files", _count, right=True),
)
WorkerIds = Annotated[list[str], typer.Argument(metavar="WORKER...", help="Worker ids, as `llorch worker list` shows.")]
StopForce = Annotated[bool, typer.Option("--force", help="Also what a `llorch up` there would start again.")]
Grace = Annotated[
    float,
    typer.Option("--grace", min=0, max=3600, callback=finite, help="Seconds to finish what runs; 0: at once."),
]


@worker_app.command("spawn")
def spawn(  # one parameter for each option
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Name of a model on the pool, or a reference (it is downloaded first)."),
    ],
    pool: PoolsOption = None,
    everywhere: AllOption = False,
    orchestrator: Annotated[
        str | None, typer.Option("--orchestrator", help="URL of orchestratord, as the pools reach it.")
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Serve by itself, without an orchestrator.")] = False,
    worker_id: Annotated[str | None, typer.Option("--id", help="Name of the worker; made up when left out.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:N or a GPU's UUID.")] = None,
    engine: Annotated[str, typer.Option("--engine", help="The engine.")] = "torch",
    slots: Annotated[int | None, typer.Option("--slots", min=1, help="Tasks at once.")] = None,
    idle_timeout: Annotated[
        float | None, typer.Option("--idle-timeout", callback=finite, help="End after this many seconds without work.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address that it binds on the pool.")] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port that it binds; 0: a free one.")] = 0,
    advertise_url: Annotated[
        str | None, typer.Option("--advertise-url", help="URL at which orchestratord reaches it.")
    ] = None,
    on_boot: Annotated[bool, typer.Option("--on-boot", help="Bring it back after a reboot.")] = False,
    ready_timeout: Annotated[
        float, typer.Option("--ready-timeout", min=1, callback=finite, help="Seconds until it must be ready.")
    ] = 600.0,
    force: Annotated[bool, typer.Option("--force", help="Start it even if it does not seem to fit.")] = False,
    dry_run: DryRun = False,
    timeout: Annotated[float, TimeoutOption()] = 24 * 3600.0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start a worker on pools and wait until it is ready. It goes on when this command and the connection end."""
    form = chosen(output, as_json)
    registry = open_registry()
    pools = registry.chosen(pool or [], everywhere)
    if worker_id is not None and len(pools) > 1:
        raise UsageProblem("--id names one worker, but several pools are meant", next_step="leave --id out")
    if alone and orchestrator:
        raise UsageProblem("--alone and --orchestrator exclude each other", next_step="leave one of them out")
    urls = {item.name: None if alone else _orchestrator_for(item, orchestrator) for item in pools}
    key = _worker_key()

    def command(item: Pool) -> wire.WorkerSpawn:
        return wire.WorkerSpawn(
            model=model,
            orchestrator=urls[item.name],
            worker_key=key,
            worker_id=worker_id,
            pool=item.name,
            device=device,
            engine=engine,
            slots=slots,
            idle_timeout_s=idle_timeout,
            host=host,
            port=port,
            advertise_url=advertise_url,
            on_boot=on_boot,
            ready_timeout_s=ready_timeout,
            force=force,
            dry_run=dry_run,
        )

    show(ask(pools, registry, command, timeout_s=timeout), COLUMNS, form)


def _worker_key() -> str | None:
    from llorch.config import Settings

    return Settings().get("worker_key").value


def _orchestrator_for(pool: Pool, flag: str | None) -> str:
    """orchestratord's URL as the pool sees it: the flag, the pool's own, or the setting `url` if others reach it."""
    from llorch.config import Settings

    found = flag or pool.orchestrator or Settings().value("url")
    host = found.partition("://")[2].partition("/")[0].rpartition(":")[0].strip("[]")
    if not flag and not pool.orchestrator and (host in ("localhost", "::1") or host.startswith("127.")):
        raise UsageProblem(
            f"{pool.name}: which orchestratord? {found} means this machine alone",
            next_step="give --orchestrator http://HOST:8080 as the pool reaches it "
            "(`llorch pool add --replace --orchestrator` remembers it), or --alone",
        )
    return found


@worker_app.command("list")
def list_workers(
    pool: PoolsOption = None,
    everywhere: AllOption = False,
    state: Annotated[str | None, typer.Option("--state", help="Only workers in this state.")] = None,
    url: UrlOption = None,
    timeout: Annotated[float, TimeoutOption()] = 30.0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """List workers as orchestratord knows them; with -p, as pools do.

    What a pool says (-p, --all) is what runs there now; orchestratord says who can be given tasks.
    """
    if not pool and not everywhere:
        from llorch.workers_http import list_workers as over_http

        over_http(state=state, url=url, output=output, as_json=as_json)
        return
    if state is not None and state not in (states := get_args(wire.WorkerState)):
        raise UsageProblem(f"no state {state!r} on pools", next_step=f"one of: {', '.join(sorted(states))}")
    asked = Asked(pool, everywhere, timeout, output, as_json)
    answer(wire.WorkerList(), COLUMNS, asked, lambda worker: state in (None, worker.state))


@worker_app.command("stop")
def stop(
    workers: WorkerIds,
    pool: PoolsOption = None,
    everywhere: AllOption = False,
    grace: Grace = 30.0,
    force: StopForce = False,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stop workers: drain, then terminate, then kill. Without -p every pool is asked whether it has them."""
    form = chosen(output, as_json)
    registry = open_registry()
    owners = owners_of(registry, workers, pool or [], everywhere or not pool)
    pools = [registry.get(name) for name in owners]

    def command(item: Pool) -> wire.WorkerStop:
        return wire.WorkerStop(worker_ids=owners[item.name], grace_s=grace, force=force)

    show(ask(pools, registry, command, timeout_s=grace + 60), STOP_COLUMNS, form)


@worker_app.command("stop-all")
def stop_all(
    pool: PoolsOption = None,
    everywhere: AllOption = False,
    grace: Grace = 30.0,
    force: StopForce = False,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stop every worker on pools, but those of a `llorch up` there."""
    command = wire.WorkerStop(all=True, grace_s=grace, force=force)
    answer(command, STOP_COLUMNS, Asked(pool, everywhere, grace + 60, output, as_json))


@worker_app.command("logs")
def logs(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="A worker's id.")],
    pool: PoolsOption = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=100_000, help="How many from the end.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay, and show what is appended.")] = False,
) -> None:
    """Show a worker's log, also after it ended."""
    from llorch.fleet import ssh
    from llorch.fleet.fanout import run, settle
    from llorch.fleet.head_start import current
    from llorch.output import clean

    registry = open_registry()
    owners = pools_with_log(registry, worker, pool or [])
    command = wire.WorkerLogs(worker_id=worker, lines=lines, follow=follow)

    def line(event: wire.Progress | wire.Log) -> None:
        if isinstance(event, wire.Log):
            print(clean(event.text), flush=True)

    timeout_s = 7 * 24 * 3600.0 if follow else 60.0
    started = current()

    def follow_one(item: Pool, _: Live, cancel: threading.Event) -> None:
        ssh.call(item, registry, command, timeout_s=timeout_s, on_event=line, cancel=cancel, head_start=started)

    # Followed side by side; otherwise one after the other, so that two pools' lines stay apart.
    outcomes: list[Outcome[None]] = []
    for some in [owners] if follow else [[item] for item in owners]:
        if len(owners) > 1:
            say(f"on {', '.join(item.name for item in some)}:")
        outcomes += run(some, follow_one, quiet=True)
    settle(outcomes)


@worker_app.command("cleanup")
def cleanup(
    pool: PoolsOption = None,
    everywhere: AllOption = False,
    dry_run: DryRun = False,
    timeout: Annotated[float, TimeoutOption()] = 120.0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what dead workers left: entries, keys, strays, logs."""
    answer(wire.WorkerCleanup(dry_run=dry_run), CLEANUP_COLUMNS, Asked(pool, everywhere, timeout, output, as_json))


@worker_app.command("restore")
def restore(
    pool: PoolsOption = None,
    everywhere: AllOption = False,
    timeout: Annotated[float, TimeoutOption()] = 1800.0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start workers of --on-boot again that a reboot ended."""
    answer(wire.WorkerRestore(), COLUMNS, Asked(pool, everywhere, timeout, output, as_json))
