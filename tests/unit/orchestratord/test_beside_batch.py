"""Interactive work beside a batch flood, in simulated time: the real planner and its memory, the same arrivals with and
without the flood. `tests/chaos/test_fairness.py` shows the same with processes, sockets and Redis."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from orchestratord.planner import PlanPolicy
from tests.support.simulated_house import House, Result, Shape

YIELD_MS = Shape.yield_ms + Shape.token_ms + 2 * Shape.dispatch_ms
"""The longest that one yield takes."""


def per_s(shape: Shape, load: float) -> float:
    """Arrivals that keep so much of the slots busy."""
    service_ms = shape.interactive_tokens * shape.token_ms + shape.prefill_ms + 2 * shape.dispatch_ms
    return load * shape.workers * shape.slots * 1000 / service_ms


def runs(shape: Shape, load: float, policy: PlanPolicy | None = None, seeds: int = 2) -> list[Result]:
    shape = replace(shape, per_s=per_s(shape, load))
    return [House(replace(shape, seed=seed), policy or PlanPolicy()).run() for seed in range(seeds)]


def p95_ms(results: list[Result]) -> float:
    return statistics.quantiles([wait for result in results for wait in result.waits_ms], n=20)[-1]


def both(shape: Shape, load: float, policy: PlanPolicy | None = None) -> tuple[float, float, list[Result]]:
    """p95 without and with the flood, and the runs with it."""
    flooded = runs(replace(shape, batch_outstanding=60), load, policy)
    alone = runs(shape, load, policy)
    assert [len(result.waits_ms) for result in alone] == [len(result.waits_ms) for result in flooded]
    return p95_ms(alone), p95_ms(flooded), flooded


@pytest.mark.parametrize("shape", [Shape(seconds=90), Shape(workers=1, seconds=90)], ids=["2x4", "1x4"])
@pytest.mark.parametrize("load", [0.3, 0.6, 0.8, 0.9])
def test_a_flood_adds_at_most_a_yield_and_hardly_a_tenth(shape: Shape, load: float) -> None:
    alone, flooded, _ = both(shape, load)
    assert flooded <= alone + YIELD_MS
    if alone > YIELD_MS:
        assert flooded <= 1.2 * alone


def test_many_slots_keep_enough_of_them_free() -> None:
    alone, flooded, results = both(Shape(workers=4, slots=8, seconds=60), 0.7)
    assert flooded <= 1.1 * alone
    assert sum(result.batch_tokens for result in results) > 10_000


def test_batch_gets_most_of_what_is_left() -> None:
    shape = Shape(seconds=90)
    for load in (0.3, 0.6, 0.8):
        _, _, results = both(shape, load)
        left = (1 - load) * shape.workers * shape.slots * shape.seconds * 1000 / shape.token_ms * len(results)
        assert sum(result.batch_tokens for result in results) > 0.5 * left, load


def test_batch_is_not_starved_by_more_interactive_work_than_the_house_can_do() -> None:
    """Ageing brings one batch task on every half minute, and it runs for two seconds at least."""
    (result,) = runs(Shape(seconds=180, batch_outstanding=10), 1.2, seeds=1)
    assert result.batch_tokens >= 4 * 80


def test_the_simulation_tells_a_worse_planner_from_this_one() -> None:
    shape = Shape(seconds=90)
    for policy in (PlanPolicy(preempt=False), PlanPolicy(min_run_ms=2_000)):
        alone, flooded, _ = both(shape, 0.7, policy)
        assert flooded > 1.5 * alone
