"""`llorch queue show`: what waits, by model, priority and tenant."""

from __future__ import annotations

import typer

from llorch.http import connect, rows
from llorch.options import UrlOption
from llorch.output import Column, JsonOption, OutputOption, chosen, duration, emit

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="The queue.")

COLUMNS = (
    Column("MODEL", "model"),
    Column("PRIORITY", "priority"),
    Column("TENANT", "tenant"),
    Column("WAITING", "depth", right=True),
    Column("OLDEST", "oldest_age_ms", duration, right=True),
)


@app.callback()
def _queue() -> None:  # pyright: ignore[reportUnusedFunction] - keeps `show` a subcommand
    """Show what waits."""


@app.command("show")
def show(url: UrlOption = None, output: OutputOption = None, as_json: JsonOption = False) -> None:
    """Show how many tasks wait and for how long, by model, priority and tenant."""
    form = chosen(output, as_json)
    emit(rows(connect(url).get("/v2/queue"), "queues"), COLUMNS, form)
