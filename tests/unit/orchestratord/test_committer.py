from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from llorch_wire.events import TokenEvent
from orchestratord.committer import Committer
from orchestratord.observations import Observations
from orchestratord.patience import backoff_ms, end_tasks
from orchestratord.store.errors import LogGapError, StoreUnavailableError
from orchestratord.store.types import AppendOutcome, TokenBatch


class Log:
    """As much of the store as the committer uses."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.away = 0
        self.gap: str | None = None
        self.open = asyncio.Event()
        self.open.set()

    async def append(self, batches: Sequence[TokenBatch]) -> list[AppendOutcome]:
        self.calls.append([batch.task_id for batch in batches])
        await self.open.wait()
        if self.away:
            self.away -= 1
            raise StoreUnavailableError("away")
        if self.gap in self.calls[-1]:
            raise LogGapError(self.gap or "", 4, 9)
        return ["appended"] * len(batches)


def batch(task_id: str) -> TokenBatch:
    return TokenBatch(task_id=task_id, attempt=1, tokens=(TokenEvent(t="x", i=0, id=1),))


@asynccontextmanager
async def running(log: Log) -> AsyncIterator[Committer]:
    committer = Committer(log, Observations(), min_interval_s=0.0)
    task = asyncio.create_task(committer.run())
    yield committer
    await end_tasks([task])


async def test_what_comes_while_one_append_is_in_flight_goes_into_the_next() -> None:
    log = Log()
    log.open.clear()
    async with running(log) as committer:
        first = asyncio.create_task(committer.append(batch("a")))
        while not log.calls:
            await asyncio.sleep(0)
        others = [asyncio.create_task(committer.append(batch(name))) for name in "bcd"]
        await asyncio.sleep(0)
        log.open.set()
        assert await asyncio.gather(first, *others) == ["appended"] * 4
    assert log.calls == [["a"], ["b", "c", "d"]]


async def test_an_outage_delays_and_loses_nothing() -> None:
    log = Log()
    log.away = 2
    async with running(log) as committer:
        assert await asyncio.gather(committer.append(batch("a")), committer.append(batch("b"))) == ["appended"] * 2
    assert log.calls == [["a", "b"]] * 3


async def test_a_gap_fails_its_own_batch_alone() -> None:
    log = Log()
    log.gap = "b"
    async with running(log) as committer:
        results = await asyncio.gather(*(committer.append(batch(name)) for name in "abc"), return_exceptions=True)
    assert [results[0], results[2]] == ["appended", "appended"]
    assert isinstance(results[1], LogGapError)


async def test_a_relay_that_left_is_not_written_for_again() -> None:
    log = Log()
    log.away = 1
    async with running(log) as committer:
        leaving = asyncio.create_task(committer.append(batch("a")))
        staying = asyncio.create_task(committer.append(batch("b")))
        while not log.calls:
            await asyncio.sleep(0)
        leaving.cancel()
        assert await staying == "appended"
    assert log.calls == [["a", "b"], ["b"]]


@pytest.mark.parametrize(("failures", "expected"), [(0, 200), (1, 400), (3, 1_600), (9, 10_000), (500, 10_000)])
def test_pauses_double_up_to_a_bound(failures: int, expected: int) -> None:
    assert backoff_ms(failures, spread=0.5) == expected
    assert backoff_ms(failures, spread=0.0) == expected * 0.75
