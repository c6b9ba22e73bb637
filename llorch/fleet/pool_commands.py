"""`llorch pool ...`: which machines there are, what is on them, and how llorch-pool comes to them."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from llorch.errors import AccessProblem, CliError, UsageProblem
from llorch.fleet.targets import (
    AllOption,
    Asked,
    DryRun,
    PoolsOption,
    TimeoutOption,
    Yes,
    answer,
    app,
    confirm,
    open_registry,
    show,
)
from llorch.output import Column, JsonOption, OutputOption, chosen, emit, say, size, yes_if
from llorch_wire import pool as wire

if TYPE_CHECKING:
    from llorch.fleet.pools import Pool

pool_app = app("Machines that run workers.")

PoolNames = Annotated[list[str] | None, typer.Argument(metavar="[POOL...]", help="Pools, as with -p.")]
COLUMNS = (
    Column("POOL", "name"),
    Column("ADDRESS", "address"),
    Column("VERSION", "version"),
    Column("ORCHESTRATOR", "orchestrator"),
    Column("HOST KEY", "host_key"),
    Column("COMMAND", "command"),
)
DEVICE_COLUMNS = (
    Column("POOL", "pool"),
    Column("DEVICE", "device"),
    Column("NAME", "name"),
    Column("FREE", "memory_free_bytes", size, right=True),
    Column("PROMISED", "promised_bytes", size, right=True),
    Column("TOTAL", "memory_total_bytes", size, right=True),
    Column("DRIVER", "driver"),
    Column("WORKERS", "workers", ",".join),
)
FINDING_COLUMNS = (
    Column("POOL", "pool"),
    Column("LEVEL", "level"),
    Column("WHAT", "subject"),
    Column("FOUND", "text"),
    Column("REPAIR", "repair"),
    Column("FIXED", "fixed", yes_if),
)


@pool_app.command("add")
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the pool is to be called.")],
    address: Annotated[
        str, typer.Argument(metavar="ADDRESS", help="[user@]host[:port]; a name from ~/.ssh/config works.")
    ],
    identity: Annotated[
        str | None, typer.Option("--identity", "-i", help="Private key file for ssh; '' leaves it to ssh.")
    ] = None,
    command: Annotated[
        str | None, typer.Option("--command", help="How llorch-pool is started there [llorch-pool].")
    ] = None,
    orchestrator: Annotated[
        str | None, typer.Option("--orchestrator", help="orchestratord's URL as it sees it; '' forgets it.")
    ] = None,
    fingerprint: Annotated[str, typer.Option("--fingerprint", help="Expect this host key (SHA256:...).")] = "",
    use_known_hosts: Annotated[
        bool, typer.Option("--use-known-hosts", help="Don't pin: your own known_hosts decides.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Change a pool that is known, or its host key.")] = False,
    yes: Yes = False,
) -> None:
    """Add a machine: show and pin its host key, try the connection.

    Once the key is pinned the pool is kept, also when the try fails. --replace keeps what isn't given anew.
    """
    from llorch.fleet.pool_options import absolute, again, checked_url
    from llorch.fleet.pools import Pool, check_pool_name, parse_address

    registry = open_registry()
    old = registry.all().get(check_pool_name(name))
    user, host, port = parse_address(address)
    url = orchestrator and checked_url(orchestrator)
    given = {"-i": identity, "--command": command, "--orchestrator": url}
    typed = [word for flag, value in given.items() if value is not None for word in (flag, value)] + [name, address]
    if old is not None and not replace:
        raise UsageProblem(f"there is a pool {name} already", next_step=again("--replace", *typed))
    if use_known_hosts and fingerprint:
        raise UsageProblem("--use-known-hosts and --fingerprint exclude each other", next_step="leave one of them out")
    old = old or Pool(name=name, host=host)
    pool = Pool(
        name=name,
        host=host,
        user=user,
        port=port,
        identity_file=old.identity_file if identity is None else absolute(identity),
        command=old.command if command is None else command or "llorch-pool",
        orchestrator=old.orchestrator if url is None else url,
        added_at_ms=round(time.time() * 1000),
    )
    if not use_known_hosts:
        pool = _pin(pool, fingerprint, ["--replace", *typed] if replace else typed, yes=yes)
    registry.put(pool)
    _try(pool.name)


def _pin(pool: Pool, fingerprint: str, typed: list[str], *, yes: bool) -> Pool:
    """The pool with its host key pinned, after it was shown and agreed to. Raises AccessProblem."""
    import sys

    from llorch.fleet.host_keys import offered
    from llorch.fleet.pool_options import again

    registry = open_registry()
    key = offered(pool)
    say(f"{pool.address} shows the {key.kind} key {key.fingerprint}")
    if fingerprint and fingerprint != key.fingerprint:
        raise AccessProblem(
            f"{pool.name}: its host key is {key.fingerprint}, not {fingerprint}",
            next_step="compare on its console: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub",
        )
    if not fingerprint and not yes:
        if not sys.stdin.isatty():
            raise AccessProblem(
                f"{pool.name}: its host key {key.fingerprint} has to be agreed to, and nobody is there to ask",
                next_step=again("--fingerprint", key.fingerprint, *typed),
            )
        confirm("Is that the machine's key?", yes=False)
    registry.pin(pool.key_alias, [key.key])
    return pool._replace(host_key=key.fingerprint)


def _try(name: str) -> None:
    """Say whether llorch-pool answers there. A bare machine is no failure: bootstrap comes next."""
    from llorch.fleet import failures, ssh

    registry = open_registry()
    pool = registry.get(name)
    try:
        status: wire.PoolStatus = ssh.call(pool, registry, wire.Status(), timeout_s=30)
    except CliError as error:
        if failures.kind_of(error) != "missing":
            # It is kept because most of these are repaired on the machine, by bootstrap, or in the user's ssh.
            error.next_step += f"; {name} is kept: correct it with --replace, or llorch pool remove {name}"
            raise
        say(f"{name}: added; there is no llorch-pool on it yet")
        say(f"next:  llorch pool bootstrap {name}")
        return
    registry.update(name, version=status.version)
    gpus = [device for device in status.devices if device.kind == "cuda"]
    what = f"{len(gpus)} GPUs" if gpus else "no GPU"
    say(f"{name}: added; {status.host}, llorch-pool {status.version}, {what}, {len(status.models)} models")


@pool_app.command("list")
def list_pools(output: OutputOption = None, as_json: JsonOption = False) -> None:
    """List the pools that are known here. Nothing is connected to."""
    form = chosen(output, as_json)
    rows = [{**pool._asdict(), "address": pool.address} for _, pool in sorted(open_registry().all().items())]
    emit(rows, COLUMNS, form)


@pool_app.command("remove")
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The pool to forget.")],
    yes: Yes = False,
) -> None:
    """Forget a pool and its host key. Nothing is changed on the machine."""
    registry = open_registry()
    pool = registry.get(name)
    confirm(f"forget {name} ({pool.address})? Its workers go on.", yes=yes)
    from llorch.fleet import ssh

    with suppress(CliError):  # a shared connection that stays ends by itself
        ssh.close_master(pool, registry)
    registry.remove(name)
    say(f"{name}: forgotten")


@pool_app.command("devices")
def devices(
    names: PoolNames = None,
    pool: PoolsOption = None,
    everywhere: AllOption = False,
    timeout: Annotated[float, TimeoutOption()] = 30.0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the devices of pools with free and promised memory."""
    answer(
        wire.DeviceList(), DEVICE_COLUMNS, Asked([*(names or []), *(pool or [])], everywhere, timeout, output, as_json)
    )


@pool_app.command("doctor")
def doctor(
    names: PoolNames = None,
    pool: PoolsOption = None,
    everywhere: AllOption = False,
    fix: Annotated[bool, typer.Option("--fix", help="Repair what can be repaired without harm.")] = False,
    timeout: Annotated[float, TimeoutOption()] = 120.0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check machines: libraries, disk, devices, models, workers. Exit code 1 when something is wrong."""
    answers = answer(
        wire.Doctor(fix=fix),
        FINDING_COLUMNS,
        Asked([*(names or []), *(pool or [])], everywhere, timeout, output, as_json),
    )
    found: list[wire.Finding] = [finding for findings in answers for finding in findings]
    if any(finding.level == "error" and not finding.fixed for finding in found):
        raise typer.Exit(1)


@pool_app.command("bootstrap")
def bootstrap(
    names: PoolNames = None,
    pool: PoolsOption = None,
    everywhere: AllOption = False,
    source: Annotated[
        str, typer.Option("--source", help="auto, index (the pool downloads) or carry (this machine does).")
    ] = "auto",
    extras: Annotated[str, typer.Option("--extras", help="worker (with torch), or none.")] = "worker",
    torch: Annotated[
        str, typer.Option("--torch", help="auto (by the driver), cpu, default, or a build such as cu130.")
    ] = "auto",
    torch_index: Annotated[
        str, typer.Option("--torch-index", envvar="LLORCH_TORCH_INDEX", help="Where builds of torch are.")
    ] = "",
    wheels: Annotated[str, typer.Option("--wheels", help="Folder with dependency wheels to carry over.")] = "",
    system_packages: Annotated[
        bool, typer.Option("--system-packages", help="Let it use what the machine's own Python has (torch).")
    ] = False,
    python: Annotated[str, typer.Option("--python", help="The machine's Python to use.")] = "",
    dry_run: DryRun = False,
    yes: Yes = False,
    timeout: Annotated[float, TimeoutOption()] = 3600.0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Install a matching llorch-pool over ssh; no root is needed.

    The machines need nothing but ssh: what is missing (Python, torch) is brought or downloaded, and said before.
    """
    from llorch.fleet.bootstrap import COLUMNS as BOOTSTRAP_COLUMNS
    from llorch.fleet.bootstrap import bootstrap_pools
    from llorch.fleet.bootstrap_plan import Options

    form = chosen(output, as_json)
    registry = open_registry()
    options = Options.checked(
        source=source,
        extras=extras,
        torch=torch,
        torch_index=torch_index,
        wheels=wheels,
        system_packages=system_packages,
        python=python,
    )
    pools = registry.chosen([*(names or []), *(pool or [])], everywhere)
    outcomes = bootstrap_pools(registry, pools, options, dry_run=dry_run, yes=yes, timeout_s=timeout)
    show(outcomes, BOOTSTRAP_COLUMNS, form)
