"""The token log: fencing, overlap, gaps, positions, the seal."""

from __future__ import annotations

import pytest

from llorch_wire.events import TERMINAL_SEQUENCE, TokenEvent, TopLogprob
from orchestratord.store.errors import LogGapError
from orchestratord.store.store import Store
from orchestratord.store.types import TokenBatch
from tests.contract.values import T, batch, claim, end, error, positions, running, tokens, worker


@pytest.fixture(autouse=True)
async def a_worker(store: Store) -> None:
    await worker(store, slots_total=8)


async def test_batches_stand_at_their_last_token(store: Store) -> None:
    await running(store, "a")
    assert await store.append([batch("a", 1, 0, 1), batch("a", 1, 1, 4)]) == ["appended", "appended"]
    assert await positions(store, "a") == [("0-1", "queued"), ("1-0", "started"), ("1-1", "tokens"), ("1-5", "tokens")]
    (task,) = await store.owned("r1")
    assert task.tokens_logged == 5
    assert await store.token_ids("a") == (1000, 1001, 1002, 1003, 1004)
    record = await store.task("a", None)
    assert record is not None and record.usage.tokens_out == 5


async def test_tokens_come_back_as_they_were(store: Store) -> None:
    await running(store, "a")
    top = (TopLogprob(id=1, t="é\n", logprob=-0.25), TopLogprob(id=2, t='"', logprob=-1.123456789012345678))
    written = (
        TokenEvent(t="", i=0, id=0),
        TokenEvent(t="é\u2028\x00", i=1, id=2**31, logprob=-0.1),
        TokenEvent(t='"\\', i=2, id=5, logprob=-3.0, top=top),
        TokenEvent(t="x", i=3, id=6, logprob=0.0, top=()),
    )
    await store.append([TokenBatch(task_id="a", attempt=1, tokens=written)])
    (entry,) = await store.read_log("a", after="1-0")
    assert entry.tokens == written


async def test_overlap_is_covered_or_appended_whole_and_a_gap_is_an_error(store: Store) -> None:
    await running(store, "a")
    await running(store, "b")
    await store.append([batch("a", 1, 0, 3)])
    assert await store.append([batch("a", 1, 0, 3), batch("a", 1, 1, 2), batch("a", 1, 2, 3)]) == [
        "covered",
        "covered",
        "appended",
    ]
    assert await store.token_ids("a") == tuple(range(1000, 1005))
    with pytest.raises(LogGapError, match=r"next token of the log is 5, but the batch starts at 6") as caught:
        await store.append([batch("a", 1, 6, 1), batch("b", 1, 0, 1)])
    assert (caught.value.expected_index, caught.value.first_index) == (5, 6)
    assert await store.token_ids("a") == tuple(range(1000, 1005))
    assert await store.token_ids("b") == (1000,)


async def test_a_batch_with_a_hole_or_nothing_in_it_is_refused(store: Store) -> None:
    await running(store, "a")
    with pytest.raises(ValueError, match="contiguous"):
        await store.append([TokenBatch(task_id="a", attempt=1, tokens=(*tokens(0, 1), *tokens(2, 1)))])
    with pytest.raises(ValueError, match="contiguous"):
        await store.append([TokenBatch(task_id="a", attempt=1, tokens=())])


async def test_nothing_follows_a_newer_attempt_or_the_end(store: Store) -> None:
    await running(store, "a")
    await store.append([batch("a", 1, 0, 2)])
    await store.requeue("a", 1, "worker_lost", failure=True, now_ms=T)
    assert await store.append([batch("a", 1, 2, 1)]) == ["stale"]
    assert (await claim(store, "a")).attempt == 2
    assert await store.append([batch("a", 1, 2, 1), batch("a", 2, 2, 1)]) == ["stale", "appended"]
    assert await store.complete("a", 2, end(3), now_ms=T)
    assert await store.append([batch("a", 2, 3, 1), batch("unknown", 1, 0, 1)]) == ["stale", "stale"]
    assert await positions(store, "a") == [
        ("0-1", "queued"),
        ("1-0", "started"),
        ("1-2", "tokens"),
        ("2-2", "migrated"),
        ("2-3", "tokens"),
        (f"2-{TERMINAL_SEQUENCE}", "end"),
    ]


async def test_reading_from_a_cursor(store: Store) -> None:
    await running(store, "a")
    await store.append([batch("a", 1, 0, 4), batch("a", 1, 4, 4)])
    await store.complete("a", 1, error(), now_ms=T)
    assert [entry.position for entry in await store.read_log("a", after="1-2")][:1] == ["1-4"]
    assert [entry.position for entry in await store.read_log("a", after="1-4", limit=1)] == ["1-8"]
    assert await store.read_log("a", after=f"1-{TERMINAL_SEQUENCE}") == []
    assert await store.read_log("a", after="7-0") == []
    assert await store.read_log("nobody") == []
    for wrong in ("banana", "1", "-", "1-", "1--1", "99999999999999999999999-1", f"1-{TERMINAL_SEQUENCE + 1}", "+"):
        with pytest.raises(ValueError, match="not a log position"):
            await store.read_log("a", after=wrong)


async def test_bounds(store: Store) -> None:
    assert await store.log_bounds("a") is None
    await running(store, "a")
    assert await store.log_bounds("a") == ("0-1", "1-0", False)
    await store.complete("a", 1, end(), now_ms=T)
    assert await store.log_bounds("a") == ("0-1", f"1-{TERMINAL_SEQUENCE}", True)


async def test_many_batches_and_long_logs(store: Store) -> None:
    await running(store, "a")
    outcomes = await store.append([batch("a", 1, index, 1) for index in range(1300)])
    assert set(outcomes) == {"appended"}
    assert await store.token_ids("a") == tuple(range(1000, 2300))
    await store.requeue("a", 1, "preempted", failure=False, now_ms=T)
    await claim(store, "a")
    assert await store.append([]) == []
