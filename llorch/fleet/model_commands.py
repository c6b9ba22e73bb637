"""`llorch model ...`: models on pools."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from llorch.fleet.targets import (
    AllOption,
    Asked,
    PoolsOption,
    TimeoutOption,
    Yes,
    answer,
    app,
    ask,
    confirm,
    open_registry,
    show,
)
from llorch.output import Column, JsonOption, OutputOption, chosen, size
from llorch_wire import pool as wire

model_app = app("Models on pools.")

COLUMNS = (
    Column("POOL", "pool"),
    Column("MODEL", "name"),
    Column("SIZE", "bytes", size, right=True),
    Column("DTYPE", "dtype"),
    Column("CONTEXT", "context_length", right=True),
    Column("REF", "ref"),
    Column("REVISION", "revision"),
)


def _yes_or_no(flag: bool) -> str:
    return "yes" if flag else "no"


VERIFY_COLUMNS = (
    Column("POOL", "pool"),
    Column("MODEL", "name"),
    Column("OK", "ok", _yes_or_no),
    Column("SIZE", "bytes", size, right=True),
)
Name = Annotated[str, typer.Argument(metavar="MODEL", help="A model's name, as `llorch model list` shows it.")]


@model_app.command("download")
def download(
    ref: Annotated[
        str, typer.Argument(metavar="REF", help="hf:org/name[@revision], file:/abs/path on the pool, or an alias.")
    ],
    pool: PoolsOption = None,
    everywhere: AllOption = False,
    name: Annotated[str | None, typer.Option("--name", help="Name to keep and serve it under.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Only use what is there.")] = False,
    hf_token: Annotated[
        bool, typer.Option("--hf-token", help="Hand this shell's HF_TOKEN over for this call.")
    ] = False,
    timeout: Annotated[float, TimeoutOption()] = 24 * 3600.0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a model to pools; goes on with an interrupted download."""
    from llorch.config import readable

    token = readable(os.environ, "HF_TOKEN") if hf_token else None
    if hf_token and not token:
        from llorch.errors import UsageProblem

        raise UsageProblem("--hf-token: HF_TOKEN is not set here", next_step="export HF_TOKEN=hf_...")
    command = wire.ModelDownload(
        ref=ref, name=name, offline=offline, endpoint=readable(os.environ, "HF_ENDPOINT"), token=token
    )
    answer(command, COLUMNS, Asked(pool, everywhere, timeout, output, as_json))


@model_app.command("list")
def list_models(
    pool: PoolsOption = None,
    everywhere: AllOption = False,
    timeout: Annotated[float, TimeoutOption()] = 30.0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the models on pools."""
    answer(wire.ModelList(), COLUMNS, Asked(pool, everywhere, timeout, output, as_json))


@model_app.command("show")
def show_model(
    name: Name,
    pool: PoolsOption = None,
    everywhere: AllOption = False,
    timeout: Annotated[float, TimeoutOption()] = 30.0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one model; with --json also its files and digests."""
    answer(wire.ModelShow(name=name), COLUMNS, Asked(pool, everywhere, timeout, output, as_json))


@model_app.command("verify")
def verify(
    name: Name,
    pool: PoolsOption = None,
    everywhere: AllOption = False,
    timeout: Annotated[float, TimeoutOption()] = 3600.0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of a model again and compare its digests."""
    answer(wire.ModelVerify(name=name), VERIFY_COLUMNS, Asked(pool, everywhere, timeout, output, as_json))


@model_app.command("remove")
def remove(
    name: Name,
    pool: PoolsOption = None,
    everywhere: AllOption = False,
    force: Annotated[bool, typer.Option("--force", help="Even if a worker uses it or it is damaged.")] = False,
    yes: Yes = False,
    timeout: Annotated[float, TimeoutOption()] = 300.0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a model from pools."""
    form = chosen(output, as_json)
    registry = open_registry()
    pools = registry.chosen(pool or [], everywhere)
    confirm(f"delete {name} from {', '.join(item.name for item in pools)}?", yes=yes)
    show(ask(pools, registry, wire.ModelRemove(name=name, force=force), timeout_s=timeout), COLUMNS, form)


@model_app.command("copy")
def copy(
    name: Name,
    source: Annotated[str, typer.Option("--from", metavar="POOL", help="The pool that has it.")],
    to: Annotated[list[str], typer.Option("--to", metavar="POOL", help="Where it goes; may be given several times.")],
    timeout: Annotated[float, TimeoutOption()] = 24 * 3600.0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a model from one pool to others, through this machine.

    An interrupted copy goes on where it was, and every digest is checked.
    """
    from llorch.fleet.copy import copy_model

    form = chosen(output, as_json)
    registry = open_registry()
    targets = registry.chosen(to, False)
    show(copy_model(registry, registry.get(source), targets, name, timeout_s=timeout), COLUMNS, form)
