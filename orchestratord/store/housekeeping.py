"""The store's part for background jobs: webhooks that are due, and how much has finished.

`finish` (lua/_tasks.lua) puts a task with a callback_url into `{o}:webhooks`, in the same step that seals its log, with
the time at which its webhook is due. It stays there until a delivery succeeded or was given up.
"""

from __future__ import annotations

from redis import exceptions

from orchestratord.store.base import StoreBase, moment
from orchestratord.store.keys import key

MEMORY_MARGIN = 0.1
"""Share of `maxmemory` below the watermark at which finished tasks begin to go early."""


class HousekeepingStore(StoreBase):
    """Webhooks, counts, memory. See `orchestratord.store.store.Store`."""

    async def due_webhooks(self, *, limit: int = 100, now_ms: int | None = None) -> list[tuple[str, int]]:
        """Tasks whose webhook is due, the longest waiting first, each with how often it was tried."""
        flat = await self._run("webhooks_due", moment(now_ms), limit)
        return [(flat[at].decode(), int(flat[at + 1])) for at in range(0, len(flat), 2)]

    async def webhook_tries(self, task_id: str) -> int | None:
        """How often the task's webhook was tried; None when it needs no delivery (any more)."""
        client = self._connection.client
        if await self._connection.call(lambda: client.zscore(key("webhooks"), task_id)) is None:
            return None
        return int(await self._connection.call(lambda: client.hget(key("task", task_id), "webhook_tries")) or 0)

    async def defer_webhook(self, task_id: str, tries: int, delay_ms: int, *, now_ms: int | None = None) -> bool:
        """A delivery failed for the `tries`-th time: due again after `delay_ms`. False when another call was first."""
        return bool(await self._run("webhook_defer", moment(now_ms), task_id, tries, delay_ms))

    async def finish_webhook(self, task_id: str) -> None:
        """Delivered, or given up."""
        client = self._connection.client
        await self._connection.call(lambda: client.zrem(key("webhooks"), task_id))

    async def memory_share(self) -> float:
        """Share of Redis' `maxmemory` in use; 0 where there is no bound, or where the server doesn't tell."""
        client = self._connection.client
        try:
            memory = await self._connection.call(lambda: client.info("memory"))
        except exceptions.ResponseError:  # INFO may be forbidden by an ACL
            return 0.0
        bound = int(memory.get("maxmemory", 0))
        return int(memory["used_memory"]) / bound if bound else 0.0

    async def is_memory_short(self) -> bool:
        """Whether so much memory is in use that admissions will soon be refused."""
        return await self.memory_share() >= self._memory_watermark - MEMORY_MARGIN

    async def finished_count(self) -> int:
        """How many finished tasks are kept."""
        client = self._connection.client
        return int(await self._connection.call(lambda: client.zcard(key("done"))))
