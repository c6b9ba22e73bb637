"""The command line for people on a pool machine. Each command builds one message and hands it to `_run`.

The same messages come in over `rpc`; nothing can be done here that can't be done from afar.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from functools import partial
from typing import Annotated

import typer
from typer.main import get_command

from llorch_pool.context import Context
from llorch_pool.errors import PoolError, refused_by_the_system, usage_error
from llorch_wire import pool as wire

_Output = Annotated[str, typer.Option("--output", "-o", help="table, tsv, json, jsonl or name.", show_default=False)]
_Json = Annotated[bool, typer.Option("--json", help="The same as -o json.")]


def _finite(value: float | None) -> float | None:
    """nan and inf are no seconds: no comparison with them holds, and JSON has neither."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number of seconds.")
    return value


_Timeout = Annotated[
    float, typer.Option("--timeout", help="Give up after this many seconds.", min=0.1, callback=_finite)
]
_Grace = Annotated[
    float, typer.Option("--grace", help="Seconds to finish what runs; 0 stops at once.", min=0, callback=_finite)
]
_Name = Annotated[str, typer.Argument(metavar="MODEL", help="A model's name, as `model list` shows it.")]
_FORMATS = ("table", "tsv", "json", "jsonl", "name")
_group = partial(
    typer.Typer,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app = _group(name="llorch-pool", help="Models, workers and devices of this machine.")
model = _group(help="Models on this machine.")
worker = _group(help="Workers on this machine.")
device = _group(help="Devices of this machine.")
app.add_typer(model, name="model")
app.add_typer(worker, name="worker")
app.add_typer(device, name="device")
app.add_typer(model, name="models", hidden=True)
app.add_typer(worker, name="workers", hidden=True)
app.add_typer(device, name="devices", hidden=True)


def run() -> None:
    """Entry point; exits with the command's code."""
    try:
        code = get_command(app).main(sys.argv[1:], prog_name="llorch-pool", standalone_mode=False)
    except typer.TyperException as error:
        path = getattr(getattr(error, "ctx", None), "command_path", "llorch-pool")
        message = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message, file=sys.stderr)
        else:
            _say_error(message[:1].lower() + message[1:].rstrip("."), f"{path} --help")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(wire.RC_INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _say_error(message: str, next_step: str, detail: str = "") -> None:
    """As `llorch` says it."""
    from llorch_pool.render import use_color

    mark = "\x1b[31merror:\x1b[0m" if use_color(sys.stderr) else "error:"
    print(f"{mark} {message}", file=sys.stderr)
    for line in detail.splitlines():
        print(f"  {line}", file=sys.stderr)
    if next_step:
        print(f"next:  {next_step}", file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"llorch-pool {wire.VERSION} (protocol {wire.POOL_PROTOCOL})")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Models, workers and devices of this machine."""


def _run(command: wire.AnyCommand, output: str, as_json: bool, timeout_s: float | None) -> None:
    from llorch_pool import render
    from llorch_pool.dispatch import execute

    form = "json" if as_json else output or ("table" if sys.stdout.isatty() else "tsv")
    reporter = render.Reporter()
    context = Context(reporter, timeout_s=timeout_s)

    def interrupted(number: int, _: object) -> None:
        context.abort("interrupted" if number == signal.SIGINT else "terminated")

    # A handler instead of KeyboardInterrupt: what is under way is ended and cleaned up, then the command ends.
    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, interrupted)
    rc = 0
    try:
        if form not in _FORMATS:
            raise usage_error(f"--output {form!r} is not one of {', '.join(_FORMATS)}", "Leave it out, or give --json.")
        value = execute(context, command)
        reporter.close()
        render.emit(value, form)
        if isinstance(command, wire.Doctor):
            rc = int(any(finding.level == "error" and not finding.fixed for finding in value))
        sys.stdout.flush()
    except BrokenPipeError:
        rc = wire.RC_FAILED  # nobody reads any more (`... | head`)
    except (PoolError, OSError) as error:
        reporter.close()
        said = error if isinstance(error, PoolError) else refused_by_the_system(error)
        rc = said.rc
        _say_error(said.message, said.next_step, said.detail)
    sys.stderr.flush()
    # Threads that still wait for a dead socket must not hold the process.
    os._exit(rc)


@model.command("download")
def model_download(
    ref: Annotated[
        str, typer.Argument(metavar="REF", help="hf:org/name[@revision], file:/abs/path, or an alias such as demo.")
    ],
    name: Annotated[str | None, typer.Option(help="Name to keep and serve it under.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Only use what is here.")] = False,
    output: _Output = "",
    json: _Json = False,
    timeout: _Timeout = 24 * 3600.0,
) -> None:
    """Bring a model here; goes on with an interrupted download. HF_ENDPOINT and HF_TOKEN are honoured."""
    _run(wire.ModelDownload(ref=ref, name=name, offline=offline), output, json, timeout)


@model.command("list")
def model_list(output: _Output = "", json: _Json = False) -> None:
    """Show the models on this machine."""
    _run(wire.ModelList(), output, json, 60)


@model.command("show")
def model_show(name: _Name, output: _Output = "json", json: _Json = False) -> None:
    """Show one model with its files and digests."""
    _run(wire.ModelShow(name=name), output, json, 60)


@model.command("verify")
def model_verify(name: _Name, output: _Output = "", json: _Json = False, timeout: _Timeout = 3600.0) -> None:
    """Read every byte of a model again and compare its digests."""
    _run(wire.ModelVerify(name=name), output, json, timeout)


@model.command("remove")
def model_remove(
    name: _Name,
    force: Annotated[bool, typer.Option("--force", help="Even if a worker uses it or it is damaged.")] = False,
    output: _Output = "name",
    json: _Json = False,
) -> None:
    """Delete a model from this machine."""
    _run(wire.ModelRemove(name=name, force=force), output, json, 300)


@worker.command("spawn")
def worker_spawn(
    model_ref: Annotated[str, typer.Argument(metavar="MODEL", help="Name of a model here, or a reference.")],
    orchestrator: Annotated[
        str | None, typer.Option(envvar="LLORCH_ORCHESTRATOR", help="URL of orchestratord, as seen from here.")
    ] = None,
    worker_id: Annotated[str | None, typer.Option("--id", help="Name of the worker; made up when left out.")] = None,
    pool: Annotated[str | None, typer.Option(help="Pool it belongs to; this machine's name when left out.")] = None,
    device_name: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:N or a GPU's UUID.")] = None,
    engine: Annotated[str, typer.Option(help="The engine.")] = "torch",
    slots: Annotated[int | None, typer.Option(help="Tasks at once.")] = None,
    idle_timeout: Annotated[
        float | None, typer.Option(help="End after this many seconds without work.", callback=_finite)
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind; the one facing the orchestrator.")] = None,
    port: Annotated[int, typer.Option(help="Port to bind; 0 takes a free one.")] = 0,
    advertise_url: Annotated[str | None, typer.Option(help="URL at which the orchestrator reaches it.")] = None,
    on_boot: Annotated[bool, typer.Option("--on-boot", help="Bring it back after a reboot.")] = False,
    ready_timeout: Annotated[
        float, typer.Option(help="Seconds until it must be ready.", min=1, callback=_finite)
    ] = 600.0,
    force: Annotated[bool, typer.Option("--force", help="Start it even if it does not seem to fit.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be started.")] = False,
    output: _Output = "",
    json: _Json = False,
    timeout: _Timeout = 24 * 3600.0,
) -> None:
    """Start a worker and wait until it is ready. It outlives this session. The key comes from LLORCH_WORKER_KEY."""
    command = wire.WorkerSpawn(
        model=model_ref,
        orchestrator=orchestrator,
        worker_key=os.environ.get("LLORCH_WORKER_KEY") or None,
        worker_id=worker_id,
        pool=pool,
        device=device_name,
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
    _run(command, output, json, timeout)


@worker.command("list")
def worker_list(output: _Output = "", json: _Json = False) -> None:
    """Show the workers of this machine as they really are."""
    _run(wire.WorkerList(), output, json, 60)


@worker.command("stop")
def worker_stop(
    worker_ids: Annotated[list[str], typer.Argument(metavar="WORKER...", help="Workers to stop.")],
    grace: _Grace = 30.0,
    force: Annotated[bool, typer.Option("--force", help="Also one that `llorch up` would start again.")] = False,
    output: _Output = "",
    json: _Json = False,
) -> None:
    """Stop workers: drain, then terminate, then kill."""
    _run(wire.WorkerStop(worker_ids=worker_ids, grace_s=grace, force=force), output, json, grace + 60)


@worker.command("stop-all")
def worker_stop_all(
    grace: _Grace = 30.0,
    force: Annotated[bool, typer.Option("--force", help="Also those that `llorch up` would start again.")] = False,
    output: _Output = "",
    json: _Json = False,
) -> None:
    """Stop every worker of this machine, but those of `llorch up`."""
    _run(wire.WorkerStop(all=True, grace_s=grace, force=force), output, json, grace + 60)


@worker.command("logs")
def worker_logs(
    worker_id: Annotated[str, typer.Argument(metavar="WORKER", help="A worker's id.")],
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many lines from the end.", min=0)] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is appended.")] = False,
) -> None:
    """Show a worker's log, also after it ended."""
    _run(wire.WorkerLogs(worker_id=worker_id, lines=lines, follow=follow), "", False, None if follow else 60)


@worker.command("cleanup")
def worker_cleanup(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    output: _Output = "json",
    json: _Json = False,
) -> None:
    """Remove what dead workers left: entries, keys, strays, logs."""
    _run(wire.WorkerCleanup(dry_run=dry_run), output, json, 120)


@worker.command("restore")
def worker_restore(output: _Output = "", json: _Json = False) -> None:
    """Start workers of --on-boot again that a reboot ended."""
    _run(wire.WorkerRestore(), output, json, None)


@device.command("list")
def device_list(output: _Output = "", json: _Json = False) -> None:
    """Show devices with free and promised memory."""
    _run(wire.DeviceList(), output, json, 60)


@app.command("status")
def status(output: _Output = "", json: _Json = False) -> None:
    """Show everything about this machine in one answer."""
    _run(wire.Status(), output, json, 60)


@app.command("doctor")
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Repair what can be repaired without harm.")] = False,
    output: _Output = "",
    json: _Json = False,
) -> None:
    """Check this machine: libraries, disk, devices, models, workers."""
    _run(wire.Doctor(fix=fix), output, json, 120)


@app.command("rpc", hidden=True)
def rpc() -> None:
    """Serve one request of `llorch` (`llorch_pool.rpc`); the entry point takes it before this is reached."""
    from llorch_pool.rpc import main as serve

    os._exit(serve())
