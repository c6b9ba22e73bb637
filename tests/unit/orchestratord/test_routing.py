from __future__ import annotations

from collections import Counter

import pytest

from orchestratord.routing import Fleet, RoutingPolicy, place, suitable
from orchestratord.store.types import PlacementSpec, QueuedTask, WorkerView
from tests.unit.orchestratord.makers import NOW, queued, worker

POLICY = RoutingPolicy()


def where(
    task: QueuedTask, workers: list[WorkerView], prefixes: dict[str, tuple[str, ...]] | None = None
) -> str | None:
    return place(task, Fleet(workers), prefixes or {}, POLICY, NOW)


def spec(**fields: object) -> PlacementSpec:
    return PlacementSpec(**fields)


def test_the_least_loaded_by_slots_or_blocks() -> None:
    busy, free = worker("busy", slots_used=3), worker("free", slots_used=1)
    assert where(queued("t"), [busy, free]) == "free"
    starved = worker("starved", kv_blocks_total=100, kv_blocks_free=4)
    assert where(queued("t"), [starved, free]) == "free"
    assert where(queued("t"), [worker("full", slots_used=4)]) is None


@pytest.mark.parametrize("state", ["lost", "draining", "failed"])
def test_only_ready_workers(state: str) -> None:
    assert where(queued("t"), [worker("w", state=state)]) is None


def test_ties_are_broken_alike_everywhere_and_favour_nobody() -> None:
    workers = [worker(f"w{n}") for n in range(4)]
    chosen = [where(queued(f"task-{n}"), workers) for n in range(400)]
    assert chosen == [where(queued(f"task-{n}"), workers[::-1]) for n in range(400)]
    assert min(Counter(chosen).values()) > 60


def test_a_pin_never_falls_back() -> None:
    workers = [worker("w1", pool="p"), worker("w2", pool="q")]
    assert where(queued("t", placement=spec(mode="pin", pin_worker="w2")), workers) == "w2"
    assert where(queued("t", placement=spec(mode="pin", pin_pool="p")), workers) == "w1"
    assert where(queued("t", placement=spec(mode="pin", pin_worker="w3")), workers) is None
    full = [worker("w1", pool="p", slots_used=4), worker("w2", pool="q")]
    assert where(queued("t", placement=spec(mode="pin", pin_pool="p")), full) is None


def test_preferred_and_avoided_pools() -> None:
    workers = [worker("near", pool="near", slots_used=3), worker("far", pool="far"), worker("bad", pool="bad")]
    assert where(queued("t", placement=spec(mode="prefer", prefer_pools=("near",))), workers) == "near"
    assert where(queued("t", placement=spec(avoid_pools=("far", "bad"))), workers) == "near"
    gone = [worker("near", pool="near", state="lost"), worker("far", pool="far"), worker("bad", pool="bad")]
    prefer = {"mode": "prefer", "prefer_pools": ("near",), "avoid_pools": ("bad",)}
    assert where(queued("t", placement=spec(**prefer)), gone) == "far"
    assert where(queued("t", placement=spec(**prefer, allow_fallback=False)), gone) is None
    assert where(queued("t", placement=spec(avoid_pools=("far", "bad"))), gone[1:]) in ("far", "bad")


def test_a_continuation_needs_the_same_weights() -> None:
    task = queued("t", required_digest="d", required_dtype="float32", tokens_kept=3, attempt=1)
    assert suitable(task, worker("w"))
    assert not suitable(task, worker("w", model_digest="e"))
    assert not suitable(task, worker("w", dtype="bfloat16"))


def test_a_session_stays_while_its_worker_has_a_slot() -> None:
    warm, idle = worker("warm", slots_used=3), worker("idle")
    task = queued("t", session_worker="warm")
    assert where(task, [warm, idle]) == "warm"
    assert where(task, [worker("warm", slots_used=4), idle]) == "idle"
    assert where(task, [worker("warm", state="lost"), idle]) == "idle"
    assert where(task, [worker("warm", kv_blocks_total=8, kv_blocks_free=0), idle]) == "idle"


def test_the_longest_cached_prefix_wins_unless_it_is_overloaded() -> None:
    task = queued("t", prefix_hashes=("short", "long"))
    prefixes = {"short": ("a",), "long": ("b", "c")}
    fleet = [worker("a"), worker("b", slots_used=1), worker("c")]
    assert where(task, fleet, prefixes) == "b"
    assert where(task, [worker("a"), worker("b", slots_used=2), worker("c")], prefixes) == "c"
    assert where(task, [worker("a"), worker("b", slots_used=2), worker("c", slots_used=2)], prefixes) == "a"
    assert where(task, [worker("d"), worker("b", slots_used=4)], prefixes) == "d"


def test_where_it_failed_it_goes_last() -> None:
    task = queued("t", avoid_worker="w1", attempt=1, waiting_since_ms=NOW - 500)
    workers = [worker("w1"), worker("w2", slots_used=3)]
    assert where(task, workers) == "w2"
    assert where(task, [worker("w1")]) == "w1", "the only one is better than none"
    full = [worker("w1"), worker("w2", slots_used=4)]
    assert where(task, full) is None, "it waits a moment for the other one"
    assert where(queued("t", avoid_worker="w1", waiting_since_ms=NOW - 3_000), full) == "w1"
    reborn = [worker("w1", registered_at_ms=NOW), worker("w2", slots_used=3)]
    assert where(task, reborn) == "w1", "it is another instance now"
