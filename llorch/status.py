"""`llorch status`: pools, devices, workers, queue and alerts on one screen, once or live.

Read `collect` (what is asked), `alerts` (pure: what deserves attention) and `screen` (pure: how it looks) first.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import typer

from llorch.errors import ApiFailure, Unreachable
from llorch.http import Api, connect, rows
from llorch.options import UrlOption, finite
from llorch.output import Column, Format, JsonOption, OutputOption, chosen, clean, duration, size, table, use_color
from llorch.queue import COLUMNS as QUEUE_COLUMNS

OLDEST_WAIT_MS = 30_000
"""A task that waits longer than this is worth a line."""

WORKER_COLUMNS = (
    Column("WORKER", "worker_id"),
    Column("STATE", "state"),
    Column("MODEL", "model"),
    Column("POOL", "pool"),
    Column("SLOTS", "slots"),
    Column("TOK/S", "tokens_per_second", "{:.1f}".format, right=True),
)
POOL_COLUMNS = (
    Column("POOL", "pool"),
    Column("READY", "ready"),
    Column("SLOTS", "slots"),
    Column("MODELS", "models", ", ".join),
)
DEVICE_COLUMNS = (
    Column("DEVICE", "device"),
    Column("POOL", "pool"),
    Column("WORKERS", "workers", right=True),
    Column("MEMORY", "memory"),
)


class Alert(NamedTuple):
    """Something that deserves attention, and what to type about it."""

    level: str
    text: str
    next_step: str


def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay, and show what happens as it happens.")] = False,
    interval: Annotated[
        float, typer.Option("--interval", min=0.2, max=3600, help="Seconds between looks.", callback=finite)
    ] = 1.0,
    url: UrlOption = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show pools, devices, workers, queue and alerts on one screen."""
    form = chosen(output, as_json)
    api = connect(url)
    if watch:
        from llorch.watch import watch as stay

        stay(api, form, interval)
    else:
        _print(collect(api), form)


def collect(api: Api) -> dict[str, Any]:
    """Everything that `status` shows, as one JSON object. Raises Unreachable when orchestratord isn't there."""
    workers = sorted(rows(api.get("/v2/workers"), "workers"), key=lambda row: str(row.get("worker_id")))
    snapshot: dict[str, Any] = {
        "url": api.url,
        "at_ms": int(time.time() * 1000),
        "ready": _readiness(api),
        "version": _optional(api, "/v2/meta/version"),
        "pools": rows(_optional(api, "/v2/pools") or {"pools": []}, "pools"),
        "devices": devices(workers),
        "workers": workers,
        "queues": rows(api.get("/v2/queue"), "queues"),
    }
    snapshot["alerts"] = [alert._asdict() for alert in alerts(snapshot)]
    return snapshot


def _readiness(api: Api) -> dict[str, Any]:
    try:
        api.get("/ready")
    except ApiFailure as error:
        return {"ready": False, "reason": error.message}
    except Unreachable as error:
        if not error.connected:
            raise
        return {"ready": False, "reason": error.message}
    return {"ready": True, "reason": None}


def _optional(api: Api, path: str) -> Any:
    """The answer, or None from an orchestratord that doesn't have this yet."""
    try:
        return api.get(path)
    except ApiFailure as error:
        if error.status in (404, 405):
            return None
        raise


def devices(workers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Devices as their workers report them: memory is the device's, so the largest report counts."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for worker in workers:
        if worker.get("state") == "lost":
            continue
        key = (str(worker.get("pool")), str(worker.get("device")))
        entry = found.setdefault(
            key, {"pool": key[0], "device": key[1], "workers": 0, "vram_total_bytes": 0, "vram_used_bytes": 0}
        )
        entry["workers"] += 1
        for name in ("vram_total_bytes", "vram_used_bytes"):
            entry[name] = max(entry[name], worker.get(name) or 0)
    return list(found.values())


def alerts(snapshot: Mapping[str, Any]) -> list[Alert]:
    """What deserves attention, the worst first."""
    found: list[Alert] = []
    if not snapshot["ready"]["ready"]:
        found.append(Alert("critical", f"orchestratord is not ready: {snapshot['ready']['reason']}", "llorch status"))
    served = {worker.get("model") for worker in snapshot["workers"] if worker.get("state") == "ready"}
    for queue in snapshot["queues"]:
        model, depth, age = queue.get("model"), queue.get("depth", 0), queue.get("oldest_age_ms", 0)
        if depth and model not in served:
            text = f"{depth} tasks wait for {model}, which no worker serves"
            found.append(Alert("critical", text, "llorch worker list"))
        elif depth and age > OLDEST_WAIT_MS:
            text = f"{queue.get('priority')} tasks for {model} wait up to {duration(age)}"
            found.append(Alert("warning", text, "llorch queue show"))
    for worker in snapshot["workers"]:
        name, state = worker.get("worker_id"), worker.get("state")
        if state in ("lost", "failed"):
            found.append(Alert("critical", f"worker {name} is {state}", "llorch doctor"))
        elif state == "draining":
            found.append(Alert("warning", f"worker {name} takes no new tasks", f"llorch worker undrain {name}"))
    return sorted(found, key=lambda alert: alert.level != "critical")


def screen(snapshot: Mapping[str, Any], *, color: bool = False, events: Sequence[str] = ()) -> list[str]:
    """The one screen, as lines."""
    version = (snapshot.get("version") or {}).get("version")
    state = "ready" if snapshot["ready"]["ready"] else "not ready"
    waiting = sum(queue.get("depth", 0) for queue in snapshot["queues"])
    head = f"orchestratord {version or ''} at {snapshot['url']}: {state}, {waiting} waiting".replace("  ", " ")
    lines = [clean(head)]

    def section(name: str, columns: Sequence[Column], found: Sequence[Mapping[str, Any]], none: str) -> None:
        lines.append("")
        if found:
            lines.extend(table(found, columns, color=color))
        else:
            lines.append(f"{name}: {none}")

    section("Pools", POOL_COLUMNS, [_pool_row(pool) for pool in snapshot["pools"]], "none")
    section("Devices", DEVICE_COLUMNS, [_device_row(device) for device in snapshot["devices"]], "none")
    section("Workers", WORKER_COLUMNS, [_worker_row(worker) for worker in snapshot["workers"]], "none has registered")
    section("Queue", QUEUE_COLUMNS, [queue for queue in snapshot["queues"] if queue.get("depth")], "empty")
    lines.append("")
    if not snapshot["alerts"]:
        lines.append("Alerts: none")
    for alert in snapshot["alerts"]:
        mark = alert["level"].upper()
        if color:
            mark = f"\x1b[{31 if alert['level'] == 'critical' else 33}m{mark}\x1b[0m"
        lines.append(f"{mark} {clean(alert['text'])}    next: {clean(alert['next_step'])}")
    if events:
        lines += ["", *events]
    return lines


def _pool_row(pool: Mapping[str, Any]) -> dict[str, Any]:
    ready = f"{pool.get('workers_ready', 0)}/{pool.get('workers_total', 0)} workers"
    slots = f"{pool.get('slots_used', 0)}/{pool.get('slots_total', 0)}"
    return {"pool": pool.get("pool"), "ready": ready, "slots": slots, "models": pool.get("models") or []}


def _device_row(device: Mapping[str, Any]) -> dict[str, Any]:
    total = device["vram_total_bytes"]
    return {**device, "memory": f"{size(device['vram_used_bytes'])} of {size(total)}" if total else None}


def _worker_row(worker: Mapping[str, Any]) -> dict[str, Any]:
    return {**worker, "slots": f"{worker.get('slots_used', 0)}/{worker.get('slots_total', 0)}"}


def _print(snapshot: Mapping[str, Any], form: Format) -> None:
    if form is Format.JSON:
        print(json.dumps(snapshot, ensure_ascii=False, indent=2))
    elif form is Format.JSONL:
        print(json.dumps(snapshot, ensure_ascii=False, separators=(",", ":")), flush=True)
    elif form is Format.TABLE:
        print("\n".join(screen(snapshot, color=use_color(sys.stdout))))
    else:
        # One line per thing: kind, name, state, details; `name` keeps what other commands take as arguments.
        for line in _flat(snapshot):
            print(line[1] if form is Format.NAME else "\t".join(line))


def _flat(snapshot: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    ready = "ready" if snapshot["ready"]["ready"] else "not ready"
    lines = [("orchestratord", snapshot["url"], ready, "")]
    for pool in snapshot["pools"]:
        row = _pool_row(pool)
        lines.append(("pool", str(row["pool"]), row["ready"], row["slots"]))
    for worker in snapshot["workers"]:
        row = _worker_row(worker)
        lines.append(("worker", str(row.get("worker_id")), str(row.get("state")), row["slots"]))
    for queue in snapshot["queues"]:
        lines.append(("queue", f"{queue.get('model')}/{queue.get('priority')}", str(queue.get("depth")), ""))
    lines += [("alert", clean(a["text"]), a["level"], a["next_step"]) for a in snapshot["alerts"]]
    return lines
