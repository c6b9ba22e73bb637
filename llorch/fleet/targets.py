"""What every command on pools has in common: its options, its rows, and the way to the pools. Read `ask` first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import typer

from llorch.options import finite
from llorch.output import Column, Format, chosen, emit
from llorch_wire import pool as wire

if TYPE_CHECKING:
    import threading

    from llorch.fleet.fanout import Outcome
    from llorch.fleet.live import Live
    from llorch.fleet.pools import Pool, Pools

PoolsOption = Annotated[
    list[str] | None, typer.Option("--pool", "-p", metavar="POOL", help="A pool; may be given several times.")
]
AllOption = Annotated[bool, typer.Option("--all", help="Every pool.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]


def TimeoutOption(help_text: str = "Seconds until a pool counts as too slow.") -> Any:  # noqa: N802 - an option
    """`--timeout`, in seconds."""
    return typer.Option("--timeout", min=0.1, max=7 * 24 * 3600, help=help_text, callback=finite)


def app(help_text: str) -> typer.Typer:
    """A group of commands."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, help=help_text)


def ask(
    pools: Sequence[Pool],
    registry: Pools,
    command: wire.AnyCommand | Callable[[Pool], wire.AnyCommand],
    *,
    timeout_s: float,
    quiet: bool = False,
) -> list[Outcome[Any]]:
    """Run a command on pools, side by side. Failures stand in the outcomes; `fanout.settle` raises them."""
    from llorch.fleet import fanout, ssh
    from llorch.fleet.head_start import current

    started = current()

    def work(pool: Pool, live: Live, cancel: threading.Event) -> Any:
        wanted = command(pool) if callable(command) else command
        if live.moving:
            live.set(pool.name, "asking")
        return ssh.call(
            pool,
            registry,
            wanted,
            timeout_s=timeout_s,
            on_event=lambda event: live.event(pool.name, event),
            cancel=cancel,
            head_start=started,
        )

    return fanout.run(pools, work, quiet=quiet)


class Asked(NamedTuple):
    """The options that most commands on pools have, as they were given."""

    pool: list[str] | None
    everywhere: bool
    timeout_s: float
    output: Format | None
    as_json: bool


def answer(
    command: wire.AnyCommand,
    columns: Sequence[Column],
    asked: Asked,
    keep: Callable[[Any], bool] | None = None,
) -> list[Any]:
    """Run a command on the pools that were asked for, show what they answer, raise what failed.

    Returns every pool's answer. Of lists, only what `keep` says is shown.
    """
    form = chosen(asked.output, asked.as_json)
    registry = open_registry()
    pools = registry.chosen(asked.pool or [], asked.everywhere)
    outcomes = ask(pools, registry, command, timeout_s=asked.timeout_s)
    for outcome in outcomes:
        if keep is not None and isinstance(outcome.value, list):
            found: list[Any] = outcome.value
            found[:] = [item for item in found if keep(item)]
    show(outcomes, columns, form)
    return [outcome.value for outcome in outcomes if outcome.value is not None]


def rows_of(outcomes: Sequence[Outcome[Any]]) -> list[dict[str, Any]]:
    """Every answered struct as a row, with its pool first."""
    from llorch.fleet.failures import from_afar

    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        if outcome.value is None:
            continue
        values: list[Any] = outcome.value if isinstance(outcome.value, list) else [outcome.value]
        for value in values:
            # `pool` may also be a field of the value: what orchestratord knows the machine as.
            row = {**msgspec.to_builtins(value), "pool": outcome.pool.name}
            if isinstance(value, wire.Finding):
                row["repair"] = from_afar(value.repair, outcome.pool)
            rows.append(row)
    return [{"pool": row.pop("pool"), **row} for row in rows]


def show(outcomes: Sequence[Outcome[Any]], columns: Sequence[Column], form: Format) -> None:
    """Print what was answered, then say and raise what failed."""
    from llorch.fleet.fanout import settle

    rows = rows_of(outcomes)
    if rows or form is not Format.TABLE or all(outcome.ok for outcome in outcomes):
        emit(rows, columns, form)  # a header above nothing would only be in the way of what failed
    settle(outcomes)


def confirm(question: str, *, yes: bool) -> None:
    """Ask on a terminal; elsewhere `-y` must have been given. Raises typer.Abort or UsageProblem."""
    import sys

    if yes:
        return
    if not sys.stdin.isatty():
        from llorch.errors import UsageProblem

        raise UsageProblem(f"{question} Nobody is there to answer", next_step="give -y to go ahead")
    # Not typer.confirm: it makes Ctrl-C look like a "no", and this has exit code 130.
    print(f"{question} [y/N]: ", end="", file=sys.stderr, flush=True)
    answered = sys.stdin.readline()
    if not answered:
        print(file=sys.stderr)  # the end of input leaves the cursor behind the question
    if answered.strip().lower() not in ("y", "yes"):
        raise typer.Abort


def open_registry() -> Pools:
    """The operator's registry of pools."""
    from llorch.fleet.pools import Pools

    return Pools.open()
