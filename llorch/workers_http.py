"""`llorch worker list|drain|undrain` as orchestratord tells and does it, over HTTP."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llorch.errors import ApiFailure, CliError, UsageProblem
from llorch.http import Api, connect, rows, segment
from llorch.options import UrlOption, finite
from llorch.output import Column, JsonOption, OutputOption, chosen, duration, emit, say, size

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="Workers.")

COLUMNS = (
    Column("WORKER", "worker_id"),
    Column("STATE", "state"),
    Column("MODEL", "model"),
    Column("POOL", "pool"),
    Column("DEVICE", "device"),
    Column("USED", "slots_used", right=True),
    Column("SLOTS", "slots_total", right=True),
    Column("TOK/S", "tokens_per_second", "{:.1f}".format, right=True),
    Column("VRAM", "vram_used_bytes", size, right=True),
    Column("URL", "url"),
)

STATES = ("draining", "failed", "lost", "ready")
"""What orchestratord says of a worker (`state` in docs/api.md)."""

WorkerIds = Annotated[list[str], typer.Argument(metavar="WORKER...", help="Worker ids, as `llorch worker list` shows.")]


def workers(api: Api) -> list[dict[str, Any]]:
    """Every worker that orchestratord knows, by pool and id."""
    found = rows(api.get("/v2/workers"), "workers")
    return sorted(found, key=lambda row: (str(row.get("pool")), str(row.get("worker_id"))))


@app.command("list")
def list_workers(
    state: Annotated[str | None, typer.Option("--state", help="Only workers in this state.")] = None,
    url: UrlOption = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the workers that orchestratord knows."""
    form = chosen(output, as_json)
    if state is not None and state not in STATES:
        raise UsageProblem(f"no state {state!r} at orchestratord", next_step=f"one of: {', '.join(STATES)}")
    emit([row for row in workers(connect(url)) if state in (None, row.get("state"))], COLUMNS, form)


@app.command("drain")
def drain(
    worker: WorkerIds,
    deadline: Annotated[
        float, typer.Option("--deadline", min=0, callback=finite, help="Seconds for running tasks to end.")
    ] = 30.0,
    url: UrlOption = None,
) -> None:
    """Give workers no new tasks, until `undrain`.

    What still runs at the deadline goes on elsewhere.
    """
    body = {"deadline_ms": round(deadline * 1000)}
    _each(worker, connect(url), "drain", body, f"takes no new tasks; running ones have {duration(deadline * 1000)}")


@app.command("undrain")
def undrain(worker: WorkerIds, url: UrlOption = None) -> None:
    """Give drained workers tasks again."""
    _each(worker, connect(url), "undrain", {}, "takes tasks again")


def _lost(worker_id: str, verb: str) -> CliError:
    """A worker that orchestratord doesn't reach: what was asked for holds, but nothing comes of it now."""
    later = "takes tasks again" if verb == "undrain" else "gets no new tasks"
    return CliError(
        f"{worker_id} is lost: orchestratord does not reach it, so no task goes there; it {later} once it is back",
        next_step="llorch doctor    (says why, and forgets one that is gone)",
    )


def _each(worker_ids: list[str], api: Api, verb: str, body: dict[str, Any], done: str) -> None:
    failures: list[CliError] = []
    for worker_id in dict.fromkeys(worker_ids):
        try:
            answered = api.post(f"/v2/workers/{segment(worker_id)}/{verb}", body)
            if isinstance(answered, dict) and answered.get("state") == "lost":
                raise _lost(worker_id, verb)
        except CliError as error:
            if isinstance(error, ApiFailure) and error.status == 404:
                error.message, error.next_step = f"no worker {worker_id!r} is registered", "llorch worker list"
            if len(worker_ids) == 1:
                raise
            failures.append(error)
            say(f"error: {error.message}")
        else:
            still = answered.get("state") if isinstance(answered, dict) and verb == "undrain" else None
            # It drains by itself when it is stopping; one whose engine failed has to come up again first.
            said = f"is {still} by itself, and takes no tasks yet" if still in ("draining", "failed") else done
            say(f"{worker_id}: {said}")
    if failures:
        from llorch.errors import PartialFailure

        if len(failures) == len(worker_ids):
            raise failures[-1]
        raise PartialFailure(f"{len(failures)} of {len(worker_ids)} workers failed", next_step="llorch worker list")
