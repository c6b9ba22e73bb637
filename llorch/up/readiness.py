"""Does a part take work? Asked over HTTP, in threads, each question with a deadline of its own.

A worker counts when orchestratord lists the very engine instance that the worker itself reports: after a restart
the old registration is still listed as ready until its lease has run out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from llorch.errors import ApiFailure, CliError
from llorch.http import Api, rows, segment

ASK_TIMEOUT_S = 2.0


class WorkerState(NamedTuple):
    """What a worker and orchestratord say of it."""

    takes_work: bool
    is_drained: bool
    text: str
    model: str | None


class Questions:
    """Asks orchestratord and workers."""

    def __init__(self, url: str, key: str | None) -> None:
        self._key = key
        self._orchestratord = Api(url, key, timeout_s=ASK_TIMEOUT_S)

    async def orchestratord(self) -> str | None:
        """None once it takes requests; before that, why it doesn't."""
        try:
            await asyncio.to_thread(self._orchestratord.get, "/ready")
        except ApiFailure as error:
            return error.message
        except CliError:
            return "starting"
        return None

    async def workers(self, urls: dict[str, str]) -> dict[str, WorkerState]:
        """The state of each worker, by id, from id → URL."""
        listed = await asyncio.to_thread(self._listed)
        answers = await asyncio.gather(*(asyncio.to_thread(self._health, url) for url in urls.values()))
        return {
            worker_id: judge(health, listed.get(worker_id)) for worker_id, health in zip(urls, answers, strict=True)
        }

    async def forget_others(self, prefix: str, kept: set[str]) -> None:
        """Have orchestratord forget workers of this data folder that this life has no use for (fewer --workers)."""
        for worker_id, row in (await asyncio.to_thread(self._listed)).items():
            if worker_id.startswith(prefix) and worker_id not in kept and row.get("state") == "lost":
                with contextlib.suppress(CliError):
                    path = f"/v2/workers/{segment(worker_id)}"
                    await asyncio.to_thread(self._orchestratord.request, "DELETE", path)

    def _listed(self) -> dict[str, dict[str, Any]]:
        try:
            return {str(row.get("worker_id")): row for row in rows(self._orchestratord.get("/v2/workers"), "workers")}
        except CliError:
            return {}

    def _health(self, url: str) -> dict[str, Any] | None:
        try:
            health = Api(url, self._key, timeout_s=ASK_TIMEOUT_S).get("/health")
        except CliError:
            return None
        return health if isinstance(health, dict) else None


def judge(health: dict[str, Any] | None, listed: dict[str, Any] | None) -> WorkerState:
    """One worker's state from its own `/health` and its line in `/v2/workers`."""
    if health is None:
        return WorkerState(False, False, "starting", None)
    status, model = str(health.get("status")), health.get("model")
    if status in ("starting", "failed"):
        return WorkerState(False, False, str(health.get("detail") or status), model)
    same = listed is not None and listed.get("instance_id") == health.get("instance_id") is not None
    if listed is None or not same:
        return WorkerState(False, False, "registering", model)
    state = str(listed.get("state"))
    return WorkerState(state == "ready", state == "draining", state, str(listed.get("model") or model))


def redis_url(url_file: Path) -> str | None:
    """The embedded Redis' URL, once its file is there."""
    try:
        document = json.loads(url_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    url = document.get("url") if isinstance(document, dict) else None
    return url if isinstance(url, str) else None
