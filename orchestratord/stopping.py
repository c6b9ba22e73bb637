"""Stop an attempt whose log is sealed already: tell the worker, then give its slot back. Read `stop_attempt`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

from orchestratord.patience import until_stored
from orchestratord.store.types import RunningTask

if TYPE_CHECKING:
    from orchestratord.house import House

PAUSES_S = (0.0, 0.05, 0.2, 0.5, 1.0, 2.0)
"""After the last one the worker's heartbeats bring it the order, and their silence about the attempt frees the slot."""


async def stop_attempt(house: House, task: RunningTask, reason: Literal["cancel", "fenced", "deadline"]) -> bool:
    """Idempotent at both ends. False when the worker didn't confirm; its slot then stays taken for now."""
    for pause_s in PAUSES_S:
        await asyncio.sleep(pause_s)
        if await house.client.cancel(task.worker_url, task.task_id, task.attempt, reason, task.correlation_id):
            await until_stored(
                lambda: house.store.release(task.worker_id, task.task_id, task.attempt), house.observations, "release"
            )
            return True
    return False
