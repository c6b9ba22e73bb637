"""`llorch doctor`: what each pool says, what orchestratord believes and what runs, side by side, with the repair."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llorch.errors import CliError
from llorch.fleet.targets import PoolsOption, TimeoutOption, ask, open_registry
from llorch.http import Api, rows, segment
from llorch.options import UrlOption
from llorch.output import Column, JsonOption, OutputOption, chosen, emit, say, yes_if
from llorch_wire import pool as wire

if TYPE_CHECKING:
    from llorch.fleet.agreement import Discrepancy, Repair
    from llorch.fleet.pools import Pool, Pools

COLUMNS = (
    Column("LEVEL", "level"),
    Column("POOL", "pool"),
    Column("WHAT", "subject"),
    Column("FOUND", "text"),
    Column("NEXT", "command"),
    Column("FIXED", "fixed", yes_if),
)


def doctor(
    pool: PoolsOption = None,
    fix: Annotated[bool, typer.Option("--fix", help="Do the repairs that can't do harm.")] = False,
    url: UrlOption = None,
    timeout: Annotated[float, TimeoutOption()] = 60.0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare what pools, orchestratord and the processes say. Exit code 1: they disagree; 3: a pool is silent."""
    form = chosen(output, as_json)
    registry = open_registry()
    pools = registry.chosen(pool or [], not pool) if registry.all() else []
    api = _operator(url)
    findings, silent = _examine(registry, pools, api, timeout)
    fixed = _repair(registry, [item.repair for item in findings if item.repair], api, timeout) if fix else set[Any]()
    emit([{**asdict(item), "fixed": item.repair in fixed} for item in findings], COLUMNS, form)
    left = [item for item in findings if item.repair not in fixed]
    if not findings:
        say(f"{len(pools) - len(silent)} pools and orchestratord agree")
    elif any(item.repair for item in left):
        say("next:  llorch doctor --fix    (does the repairs that can't do harm)")
    if silent:
        from llorch.errors import PartialFailure

        raise PartialFailure(f"could not ask {', '.join(silent)}", next_step=f"llorch pool doctor -p {silent[0]}")
    if any(item.level == "error" for item in left):
        raise typer.Exit(1)


def _operator(url: str | None) -> Api:
    """orchestratord with whichever key operators have: an API key, or the workers' one."""
    from llorch.config import Settings

    settings = Settings()
    key = settings.get("api_key").value or settings.get("worker_key").value
    return Api(settings.value("url", url), key, timeout_s=10.0)


def _examine(registry: Pools, pools: Sequence[Pool], api: Api, timeout_s: float) -> tuple[list[Discrepancy], list[str]]:
    """(disagreements, pools that could not be asked)."""
    from llorch.fleet.agreement import Discrepancy, compare

    outcomes = ask(pools, registry, wire.Status(), timeout_s=timeout_s) if pools else []
    statuses: dict[str, wire.PoolStatus] = {o.pool.name: o.value for o in outcomes if o.value is not None}
    findings: list[Discrepancy] = []
    for outcome in outcomes:
        if outcome.error is not None:
            error = outcome.error
            findings.append(Discrepancy("error", outcome.pool.name, "ssh", error.message, error.next_step))
    known: list[dict[str, Any]] | None = None
    try:
        known = rows(api.get("/v2/workers"), "workers")
    except CliError as error:
        findings.append(Discrepancy("error", "-", "orchestratord", error.message, error.next_step))
    for name, status in statuses.items():
        if status.version != wire.VERSION:
            text = f"has llorch-pool {status.version}, this is llorch {wire.VERSION}"
            findings.append(Discrepancy("warning", name, "version", text, f"llorch pool bootstrap {name}"))
    silent = [outcome.pool.name for outcome in outcomes if not outcome.ok]
    return [*findings, *compare(statuses, known, round(time.time() * 1000))], silent


def _repair(registry: Pools, repairs: Sequence[Repair], api: Api, timeout_s: float) -> set[Repair]:
    """Do each repair once; what fails is said and left."""
    done: set[Repair] = set()
    for repair in dict.fromkeys(repairs):
        try:
            if repair.action == "forget":
                api.request("DELETE", f"/v2/workers/{segment(repair.target)}")
            else:
                command = wire.WorkerCleanup() if repair.action == "cleanup" else wire.WorkerRestore()
                outcome = ask([registry.get(repair.target)], registry, command, timeout_s=timeout_s)[0]
                if outcome.error is not None:
                    raise outcome.error
            done.add(repair)
        except CliError as error:
            say(f"error: {error.message}")
            say(f"next:  {error.next_step}")
    return done
