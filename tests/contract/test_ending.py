"""Complete, cancel, requeue, release: exactly one end, and no slot leaks."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from llorch_wire.events import TERMINAL_SEQUENCE, EndEvent, ErrorEvent
from orchestratord.store.errors import LogGapError
from orchestratord.store.store import Store
from orchestratord.store.types import CancelOutcome, RequeueOutcome
from tests.contract.values import (
    LEASE_MS,
    LONG_MS,
    MODEL,
    T,
    admit,
    batch,
    claim,
    end,
    error,
    heartbeat,
    running,
    try_claim,
    worker,
)


@pytest.fixture(autouse=True)
async def a_worker(store: Store) -> None:
    await worker(store)


async def slots_used(store: Store, worker_id: str = "w1") -> int:
    view = await store.worker(worker_id, now_ms=T)
    assert view is not None
    return view.slots_used


async def test_complete_seals_frees_and_records(store: Store) -> None:
    task = await running(store, "a")
    await store.record_prompt_tokens("a", 1, 12)
    await store.append([batch("a", 1, 0, 2)])
    assert await store.complete("a", task.attempt, end(2, cached_tokens=4), now_ms=T + 50)
    record = await store.task("a", "acme")
    assert record is not None
    assert (record.status, record.finished_at_ms, record.worker_id) == ("completed", T + 50, "w1")
    assert (record.usage.tokens_in, record.usage.tokens_out, record.usage.cached_tokens) == (12, 2, 4)
    assert record.end == end(2, cached_tokens=4) and record.error is None
    assert await slots_used(store) == 0
    assert await store.owned("r1") == [] and await store.payload("a") is None
    assert await store.finished(T + 50) == ["a"] and await store.finished(T + 49) == []


async def test_an_end_beyond_the_log_is_refused(store: Store) -> None:
    """After a failover had undone a log's tail, the task ended with a text that lacked it."""
    await running(store, "a")
    await store.append([batch("a", 1, 0, 3)])
    with pytest.raises(LogGapError) as caught:
        await store.complete("a", 1, end(5), tokens=5, now_ms=T)
    assert caught.value.expected_index == 3
    await store.append([batch("a", 1, 3, 2)])
    assert await store.complete("a", 1, end(5), tokens=5, now_ms=T)


async def test_only_the_running_attempt_can_complete(store: Store) -> None:
    await running(store, "a")
    assert not await store.complete("a", 2, end(), now_ms=T)
    await store.requeue("a", 1, "worker_lost", failure=True, now_ms=T)
    assert not await store.complete("a", 1, end(), now_ms=T)
    await claim(store, "a")
    assert not await store.complete("a", 1, end(), now_ms=T)
    assert await store.complete("a", 2, error(), now_ms=T)
    assert not await store.complete("a", 2, end(), now_ms=T)
    assert not await store.complete("unknown", 1, end(), now_ms=T)
    record = await store.task("a", None)
    assert record is not None and record.status == "failed" and record.error == error()
    await store.record_prompt_tokens("a", 2, 99)
    record = await store.task("a", None)
    assert record is not None and record.usage.tokens_in == 0


async def test_an_end_that_says_cancelled_makes_the_task_cancelled(store: Store) -> None:
    await running(store, "a")
    assert await store.complete("a", 1, end(stop_reason="CANCELLED"), now_ms=T)
    record = await store.task("a", None)
    assert record is not None and record.status == "cancelled"


async def test_a_repeated_call_gives_the_first_ones_answer(store: Store) -> None:
    run = store._run
    await running(store, "a")
    await running(store, "b")
    completed = ("complete", T, "c1", "a", 1, "failed", "error", b'{"code":"X","message":"y"}', 0, 0, 0, 0)
    assert [await run(*completed), await run(*completed)] == [1, 1]
    requeued = ("requeue", T, "c2", "b", 1, "worker_lost", 1, 0, "", 0, 3, b"{}")
    assert [await run(*requeued), await run(*requeued)] == [[b"queued", 1]] * 2
    await claim(store, "b")
    cancelled = ("cancel", T, "c3", "b", "")
    first, second = await run(*cancelled), await run(*cancelled)
    assert first == second and first[1] == 1


async def test_cancelling_what_waits(store: Store) -> None:
    await admit(store, "a")
    assert await store.cancel("a", "acme", now_ms=T + 30) == CancelOutcome(status="cancelled", changed=True)
    assert await store.cancel("a", "acme", now_ms=T + 40) == CancelOutcome(status="cancelled", changed=False)
    (entry,) = await store.read_log("a", after="0-1")
    assert entry.position == f"0-{TERMINAL_SEQUENCE}"
    event = msgspec.json.decode(entry.data, type=EndEvent)
    assert (event.stop_reason, event.queue_time_ms, event.tokens_out) == ("CANCELLED", 30, 0)
    assert await try_claim(store, "a") == []
    assert await store.cancel("unknown", None) is None


async def test_cancelling_what_runs_keeps_the_slot_until_it_is_released(store: Store) -> None:
    task = await running(store, "a")
    await store.append([batch("a", 1, 0, 2)])
    outcome = await store.cancel("a", "acme", now_ms=T)
    assert outcome is not None and outcome.changed
    assert outcome.running is not None and outcome.running.task_id == "a"
    assert (outcome.running.worker_id, outcome.running.attempt, outcome.running.owner) == ("w1", 1, "r1")
    assert outcome.running.worker_url == task.worker_url
    assert await slots_used(store) == 1
    assert await store.append([batch("a", 1, 2, 1)]) == ["stale"]
    assert not await store.complete("a", 1, end(), now_ms=T)
    assert await store.requeue("a", 1, "worker_lost", failure=True, now_ms=T) == RequeueOutcome(state="stale")
    await store.release("w1", "a", 2)
    assert await slots_used(store) == 1
    await store.release("w1", "a", 1)
    await store.release("w1", "a", 1)
    assert await slots_used(store) == 0
    event = msgspec.json.decode((await store.read_log("a"))[-1].data, type=EndEvent)
    assert (event.stop_reason, event.tokens_out) == ("CANCELLED", 2)


async def test_a_heartbeat_frees_what_it_no_longer_lists(store: Store) -> None:
    await running(store, "a")
    await store.cancel("a", None, now_ms=T)
    beat = await store.heartbeat("w1", heartbeat(running=(("a", 1),)), LEASE_MS, now_ms=T + 3000)
    assert beat.cancel == (("a", 1),)
    assert await slots_used(store) == 1
    await store.heartbeat("w1", heartbeat(), LEASE_MS, now_ms=T + 900)
    assert await slots_used(store) == 1, "this heartbeat may have been written before the cancel"
    await store.heartbeat("w1", heartbeat(), LEASE_MS, now_ms=T + 1001)
    assert await slots_used(store) == 0


@pytest.mark.parametrize("how", ["instance", "lost", "lease"])
async def test_a_stopped_attempt_ends_with_its_worker(store: Store, how: str) -> None:
    await running(store, "a")
    await store.cancel("a", None, now_ms=T)
    match how:
        case "instance":
            await worker(store, instance_id="i2")
        case "lost":
            assert await store.mark_worker_lost("w1", "i1", "probed", now_ms=T)
        case _:
            await store.sweep(now_ms=T + LEASE_MS, healthy_ms=LONG_MS)
    assert await slots_used(store) == 0


async def test_cancelling_on_a_worker_that_is_gone_takes_no_slot(store: Store) -> None:
    await running(store, "a")
    await running(store, "b")
    await store.mark_worker_lost("w1", "i1", "probed", now_ms=T)
    await store.cancel("a", None, now_ms=T)
    await worker(store, instance_id="i2")
    await store.cancel("b", None, now_ms=T)
    assert await slots_used(store) == 0


async def test_cancelling_what_backs_off(store: Store) -> None:
    await running(store, "a")
    outcome = await store.requeue("a", 1, "worker_error", failure=True, backoff_ms=500, now_ms=T)
    assert outcome == RequeueOutcome(state="retry", failures=1)
    record = await store.task("a", None)
    assert record is not None and record.status == "queued"
    cancelled = await store.cancel("a", None, now_ms=T)
    assert cancelled == CancelOutcome(status="cancelled", changed=True)
    assert (await store.sweep(now_ms=T + 1000, healthy_ms=0)).retried == 0


async def test_cancel_and_complete_at_once_leave_one_end(store: Store) -> None:
    await worker(store, slots_total=64)
    for number in range(16):
        await running(store, f"t{number}")
    jobs = [
        job
        for number in range(16)
        for job in (store.complete(f"t{number}", 1, end(), now_ms=T), store.cancel(f"t{number}", None, now_ms=T))
    ]
    outcomes = await asyncio.gather(*jobs)
    for completed, cancelled in zip(outcomes[::2], outcomes[1::2], strict=True):
        assert isinstance(cancelled, CancelOutcome)
        assert completed is not cancelled.changed


async def test_a_requeued_task_keeps_its_place(store: Store) -> None:
    for name in "abc":
        await admit(store, name)
    await claim(store, "a")
    await admit(store, "d")
    outcome = await store.requeue("a", 1, "drained", failure=False, avoid_worker="w1", now_ms=T)
    assert outcome == RequeueOutcome(state="queued", failures=0)
    waiting = (await store.snapshot(MODEL, now_ms=T)).waiting
    assert [task.task_id for task in waiting] == ["a", "b", "c", "d"]
    assert (waiting[0].avoid_worker, waiting[0].attempt) == ("w1", 1)
    record = await store.task("a", None)
    assert record is not None and record.queue_position == 1
    assert await slots_used(store) == 0


async def test_a_backoff_ends_at_the_old_place(store: Store) -> None:
    await running(store, "a")
    await admit(store, "b")
    await store.requeue("a", 1, "worker_error", failure=True, backoff_ms=500, now_ms=T)
    assert [task.task_id for task in (await store.snapshot(MODEL, now_ms=T)).waiting] == ["b"]
    assert (await store.sweep(now_ms=T + 499, healthy_ms=0)).retried == 0
    assert (await store.sweep(now_ms=T + 500, healthy_ms=0)).retried == 1
    assert [task.task_id for task in (await store.snapshot(MODEL, now_ms=T)).waiting] == ["a", "b"]


async def test_failures_are_bounded_and_progress_forgives(store: Store) -> None:
    await admit(store, "a")
    expected = [(False, "queued", 1), (False, "queued", 2), (True, "queued", 1), (False, "queued", 2)]
    for attempt, (progressed, state, failures) in enumerate(expected, start=1):
        await claim(store, "a")
        outcome = await store.requeue(
            "a", attempt, "worker_lost", failure=True, progressed=progressed, max_failures=3, now_ms=T
        )
        assert (outcome.state, outcome.failures) == (state, failures)
    await claim(store, "a")
    preempted = await store.requeue("a", 5, "preempted", failure=False, max_failures=3, now_ms=T)
    assert preempted == RequeueOutcome(state="queued", failures=2)
    await claim(store, "a")
    outcome = await store.requeue(
        "a", 6, "worker_error", failure=True, max_failures=3, error=error("VRAM_OOM", "out of memory"), now_ms=T
    )
    assert outcome == RequeueOutcome(state="failed", failures=3)
    entry = (await store.read_log("a"))[-1]
    event = msgspec.json.decode(entry.data, type=ErrorEvent)
    assert entry.position == f"6-{TERMINAL_SEQUENCE}"
    assert event.code == "RETRIES_EXHAUSTED" and "VRAM_OOM: out of memory" in event.message and "3" in event.message
    assert await slots_used(store) == 0


async def test_requeue_past_the_deadline_ends_the_task(store: Store) -> None:
    await running(store, "a", deadline_at_ms=T + 100)
    outcome = await store.requeue("a", 1, "worker_lost", failure=True, now_ms=T + 100)
    assert outcome.state == "failed"
    record = await store.task("a", None)
    assert record is not None and record.error is not None and record.error.code == "DEADLINE_MISSED"


async def test_rates_are_measured(store: Store) -> None:
    assert await store.rates(MODEL) is None
    for name, duration in (("a", 1000), ("b", 3000)):
        await running(store, name)
        await store.append([batch(name, 1, 0, 10)])
        await store.complete(name, 1, end(10), now_ms=T + duration)
    await running(store, "c")
    await store.complete("c", 1, error(), now_ms=T + 99_000)
    rates = await store.rates(MODEL)
    assert rates is not None
    assert (rates.samples, rates.tokens_out, rates.tokens_out_variance) == (2, 10.0, 0.0)
    assert (rates.service_ms, rates.service_ms_variance) == pytest.approx((2000, 1_000_000))
    assert rates.ms_per_token == pytest.approx(200)
    assert rates.updated_at_ms == T + 3000
    await store.set_rates(MODEL, msgspec.structs.replace(rates, samples=7))
    again = await store.rates(MODEL)
    assert again is not None and again.samples == 7


async def test_deleting(store: Store) -> None:
    await running(store, "a")
    assert not await store.delete_task("a")
    await store.complete("a", 1, end(), now_ms=T)
    assert await store.delete_task("a")
    assert not await store.delete_task("a")
    assert await store.task("a", None) is None and await store.log_bounds("a") is None
    assert await store.finished(T + 10**6) == []
    assert await store.list_tasks("acme") == ([], None)


async def test_a_task_stays_until_its_webhook_is_settled(store: Store) -> None:
    for name in ("tells", "quiet"):
        await running(store, name, callback_url="https://example.org/hook" if name == "tells" else None)
        await store.complete(name, 1, end(), now_ms=T)
    assert await store.delete_tasks(["tells", "quiet", "nobody"]) == 1
    assert await store.finished(T, skip=0) == ["tells"] and await store.finished(T, skip=1) == []
    await store.finish_webhook("tells")
    assert await store.delete_tasks(["tells"]) == 1
