"""Calls side by side: none of them outlives the other's failure."""

from __future__ import annotations

import asyncio

import pytest

from orchestratord.patience import all_of, both


async def fails() -> int:
    await asyncio.sleep(0)
    raise ValueError("no")


async def gives(value: str) -> str:
    await asyncio.sleep(0)
    return value


async def test_results_come_in_order() -> None:
    assert await both(gives("a"), gives("b")) == ("a", "b")
    assert await all_of(gives(value) for value in "abc") == ["a", "b", "c"]
    assert await all_of([]) == []


@pytest.mark.parametrize("pair", [True, False])
async def test_the_other_is_over_when_the_failure_is_raised(pair: bool) -> None:
    ended = asyncio.Event()

    async def waits() -> int:
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)
            ended.set()

    for calls in ([fails(), waits()], [waits(), fails()]):
        ended.clear()
        with pytest.raises(ValueError, match="no"):
            await (both(*calls) if pair else all_of(calls))
        assert ended.is_set()


async def test_a_cancelled_caller_leaves_nothing_behind() -> None:
    ended = asyncio.Event()

    async def waits() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    caller = asyncio.create_task(all_of([waits(), waits()]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended.is_set()
