"""`llorch task list|show|watch|cancel`."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from llorch.errors import CliError, PartialFailure, UsageProblem
from llorch.http import Api, connect, rows, segment
from llorch.options import UrlOption, finite
from llorch.output import Column, JsonOption, OutputOption, chosen, duration, emit, emit_record, say

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="Tasks.")

PAGE = 200
STATUSES = ("queued", "running", "completed", "failed", "cancelled")

TaskIdArgument = Annotated[str, typer.Argument(metavar="TASK_ID", help="A task's id, as `llorch task list` shows.")]
TaskIds = Annotated[list[str], typer.Argument(metavar="TASK_ID...", help="Ids of tasks.")]


@app.command("list")
def list_tasks(
    status: Annotated[str | None, typer.Option("--status", help=f"Only these: {', '.join(STATUSES)}.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Only tasks of this model.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="At most this many, newest first.")] = 50,
    url: UrlOption = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """List tasks, newest first."""
    if status is not None and status not in STATUSES:
        raise UsageProblem(f"no status {status!r}: use {', '.join(STATUSES)}", next_step="llorch task list --help")
    form = chosen(output, as_json)
    columns = (
        Column("TASK", "task_id"),
        Column("STATUS", "status"),
        Column("MODEL", "model"),
        Column("WORKER", "worker_id"),
        Column("ATTEMPT", "attempt", right=True),
        Column("TOKENS", "usage", _tokens_out, right=True),
        Column("AGE", "created_at_ms", _age, right=True),
    )
    emit(pages(connect(url), limit, status, model), columns, form)


def _tokens_out(usage: dict[str, Any]) -> str:
    return str(usage.get("tokens_out", "-"))


def _age(created_at_ms: int) -> str:
    return duration(max(0.0, time.time() * 1000 - created_at_ms))


def pages(api: Api, limit: int, status: str | None, model: str | None) -> list[dict[str, Any]]:
    """Up to `limit` tasks, in as many requests as that takes."""
    found: list[dict[str, Any]] = []
    after: str | None = None
    while len(found) < limit:
        query = {"status": status, "model": model, "limit": min(PAGE, limit - len(found)), "after": after}
        document = api.get("/v2/tasks", query)
        found += rows(document, "tasks")
        after = document.get("next") if isinstance(document, dict) else None
        if not after:
            break
    return found[:limit]


@app.command("show")
def show(
    task_id: TaskIdArgument, url: UrlOption = None, output: OutputOption = None, as_json: JsonOption = False
) -> None:
    """Show one task with its text so far."""
    form = chosen(output, as_json)
    emit_record(connect(url).get(f"/v2/tasks/{segment(task_id)}"), form)


@app.command("watch")
def watch(
    task_id: TaskIdArgument,
    after: Annotated[str | None, typer.Option("--after", help="Only what follows this event id.")] = None,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", min=0, help="Seconds to go on trying to reach orchestratord.", callback=finite),
    ] = None,
    url: UrlOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the events, one JSON object a line.")] = False,
) -> int:
    """Stream a task's text from its beginning, or from an event on. Ctrl-C leaves the task alone."""
    from llorch.follow import Follower, Retry
    from llorch.run import Printer, patience_s

    follower = Follower(connect(url), task_id, Retry(patience_s(timeout), say))
    follower.cursor = after
    if after is not None:
        follower.next_index = None
    printer = Printer(as_json=as_json)
    for batch in follower.events():
        printer.show(batch)
    return printer.finish(task_id)


@app.command("cancel")
def cancel(task_ids: TaskIds, url: UrlOption = None) -> None:
    """Cancel tasks. One that ended already stays as it is."""
    api = connect(url)
    failed = 0
    for task_id in dict.fromkeys(task_ids):
        try:
            answer = api.post(f"/v2/tasks/{segment(task_id)}/cancel")
        except CliError as error:
            if len(task_ids) == 1:
                raise
            failed += 1
            say(f"{task_id}: {error.message}")
        else:
            say(f"{task_id}: {(answer or {}).get('status', 'cancelled')}")
    if failed:
        raise PartialFailure(f"{failed} of {len(task_ids)} tasks could not be cancelled", next_step="llorch task list")
