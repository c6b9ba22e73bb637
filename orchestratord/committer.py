"""Group commit: while one append is in flight, every relay's next batch gathers for the one after it.

Read `Committer.run` first. A relay has at most one batch here and reads no further until it is in the log, so Redis'
pace holds the workers back through TCP and memory stays bounded, however long Redis is away.
"""

from __future__ import annotations

import asyncio
import time

from orchestratord.observations import Observations
from orchestratord.patience import FIRST_PAUSE_S, LONGEST_PAUSE_S
from orchestratord.store.errors import LogGapError, StoreUnavailableError
from orchestratord.store.store import Store
from orchestratord.store.types import AppendOutcome, TokenBatch

MAX_BATCHES = 256
MIN_INTERVAL_S = 0.003
"""Between the starts of two appends: a lone stream never waits for it, a hundred streams share one pipeline."""


class Committer:
    """One a process; every relay appends through it."""

    def __init__(self, store: Store, observations: Observations, *, min_interval_s: float = MIN_INTERVAL_S) -> None:
        self._store = store
        self._observations = observations
        self._min_interval_s = min_interval_s
        self._pending: list[tuple[TokenBatch, asyncio.Future[AppendOutcome]]] = []
        self._wake = asyncio.Event()

    async def append(self, batch: TokenBatch) -> AppendOutcome:
        """Returns once the batch is in the log, or can't ever be. Raises LogGapError."""
        future: asyncio.Future[AppendOutcome] = asyncio.get_running_loop().create_future()
        self._pending.append((batch, future))
        self._wake.set()
        return await future

    async def run(self) -> None:
        """Gather, append, answer; until cancelled."""
        loop = asyncio.get_running_loop()
        started = 0.0
        while True:
            await self._wake.wait()
            pause_s = started + self._min_interval_s - loop.time()
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            started = loop.time()
            batch, self._pending = self._pending[:MAX_BATCHES], self._pending[MAX_BATCHES:]
            if not self._pending:
                self._wake.clear()
            await self._commit([item for item in batch if not item[1].done()])

    async def _commit(self, items: list[tuple[TokenBatch, asyncio.Future[AppendOutcome]]]) -> None:
        pause_s = FIRST_PAUSE_S
        while items:
            begun = time.perf_counter()
            try:
                outcomes = await self._store.append([batch for batch, _ in items])
            except StoreUnavailableError:
                self._observations.count("store_errors", "append")
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
                items = [item for item in items if not item[1].done()]
                continue
            except LogGapError as gap:
                items = self._refuse(items, gap)
                continue
            self._observations.measure("commit_s", time.perf_counter() - begun)
            self._observations.measure("commit_tokens", sum(len(batch.tokens) for batch, _ in items))
            self._observations.count("commits")
            for (_, future), outcome in zip(items, outcomes, strict=True):
                if not future.done():
                    future.set_result(outcome)
            return

    @staticmethod
    def _refuse(
        items: list[tuple[TokenBatch, asyncio.Future[AppendOutcome]]], gap: LogGapError
    ) -> list[tuple[TokenBatch, asyncio.Future[AppendOutcome]]]:
        """Fail the batch with the gap; the others are appended again, which changes nothing where they already were."""
        for batch, future in items:
            if batch.task_id == gap.task_id and not future.done():
                future.set_exception(gap)
        return [item for item in items if item[0].task_id != gap.task_id]
