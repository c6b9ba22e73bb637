"""Patience: with Redis (what must be written is tried until it is, however long that takes) and with asyncio."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from orchestratord.observations import Observations
from orchestratord.store.errors import StoreUnavailableError

T = TypeVar("T")
S = TypeVar("S")

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 0.8


async def until_stored(call: Callable[[], Awaitable[T]], observations: Observations, operation: str) -> T:
    """Result of `call`, tried again while the store is unavailable. Every store method may be repeated as it is."""
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return await call()
        except StoreUnavailableError:
            observations.count("store_errors", operation)
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)


def backoff_ms(failures: int, *, first_ms: int = 200, longest_ms: int = 10_000, spread: float | None = None) -> int:
    """Pause before attempt number `failures` + 1: doubling, bounded, with jitter (`spread` in 0..1 fixes it)."""
    full = min(longest_ms, first_ms * 2 ** max(0, min(failures, 16)))
    return round(full * (0.75 + 0.5 * (random.random() if spread is None else spread)))


async def both(first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, S]) -> tuple[T, S]:
    """The results of two calls that run side by side. None outlives this call, as the rest of a failed
    `asyncio.gather` does."""
    tasks = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        one, other = await asyncio.gather(*tasks)
        return one, other
    finally:
        await end_tasks(tasks)


async def all_of(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """As `both`, for any number of calls of one type."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await end_tasks(tasks)


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel until they are done, even if the caller is cancelled meanwhile (which it learns then).

    Once is not enough: before Python 3.12 `asyncio.wait_for`, which redis-py sends its commands with, swallows a
    cancellation that comes in the same turn of the loop as its result (python/cpython#86296).
    """
    cancelled = False
    waiting = {task for task in tasks if not task.done()}
    while waiting:
        for task in waiting:
            task.cancel()
        try:
            await asyncio.wait(waiting, timeout=0.1)
        except asyncio.CancelledError:
            cancelled = True
        waiting = {task for task in waiting if not task.done()}
    if cancelled:
        raise asyncio.CancelledError
