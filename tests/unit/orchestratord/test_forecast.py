from __future__ import annotations

import random

import pytest

from llorch_wire.tasks import Priority
from orchestratord.forecast import Forecast, ForecastBook, judge, next_turn, predict
from orchestratord.store.types import QueueDepth, ServiceRates

RATES = ServiceRates(samples=50, service_ms=1_000.0, service_ms_variance=250_000.0)


def test_nothing_measured_or_nothing_serving_means_no_forecast() -> None:
    assert predict(3, slots_total=0, slots_free=0, rates=RATES) is None
    assert predict(3, slots_total=2, slots_free=0, rates=None) is None
    assert predict(3, slots_total=2, slots_free=0, rates=ServiceRates()) is None


def test_a_free_slot_means_now() -> None:
    now = predict(0, slots_total=2, slots_free=1, rates=None)
    assert now is not None
    assert now.p50_ms < 100


def test_a_longer_queue_takes_longer_and_more_slots_less() -> None:
    def at(ahead: int, slots: int) -> Forecast:
        forecast = predict(ahead, slots_total=slots, slots_free=0, rates=RATES)
        assert forecast is not None
        return forecast

    assert at(9, 1).p50_ms == pytest.approx(10_020)
    assert at(9, 2).p50_ms == pytest.approx(5_020)
    for ahead in range(20):
        assert at(ahead, 3).p50_ms < at(ahead + 1, 3).p50_ms
        assert at(ahead, 3).p50_ms < at(ahead, 3).p90_ms


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_on_a_steady_load_nine_of_ten_start_before_their_p90(spread: float) -> None:
    """A queue simulated with 4 slots: constant, varied and exponential service times."""
    draw = random.Random(7)
    slots, kept, total = 4, 0, 4_000
    rates = ServiceRates(samples=100, service_ms=1_000.0, service_ms_variance=(spread * 1_000.0) ** 2)
    for _ in range(total):
        ahead = draw.randrange(30)
        free_at = sorted(_residual(draw, spread) for _ in range(slots))
        for _ in range(ahead):
            free_at[0] += _service(draw, spread)
            free_at.sort()
        forecast = predict(ahead, slots_total=slots, slots_free=0, rates=rates)
        assert forecast is not None
        kept += judge(forecast, free_at[0]) != "late"
    assert kept / total >= 0.85


def _service(draw: random.Random, spread: float) -> float:
    if spread == 1.0:
        return draw.expovariate(1 / 1_000)
    return max(1.0, draw.gauss(1_000, spread * 1_000))


def _residual(draw: random.Random, spread: float) -> float:
    return _service(draw, spread) * (1.0 if spread == 1.0 else draw.random())


def test_the_book_scores_once_and_stays_small() -> None:
    book = ForecastBook(bound=2)
    for name in ("a", "b", "c"):
        book.note(name, Forecast(100, 200), now_ms=1_000)
    assert len(book) == 2
    assert book.settle("a", 1_050) is None
    assert book.settle("b", 1_050) == "within_p50"
    assert book.settle("b", 1_050) is None
    assert book.settle("c", 1_150) == "within_p90"
    book.note("d", Forecast(100, 200), now_ms=1_000)
    assert book.settle("d", 1_300) == "late"


def test_a_tenants_next_turn() -> None:
    def row(tenant: str, priority: Priority, depth: int, model: str = "m") -> QueueDepth:
        return QueueDepth(model=model, priority=priority, tenant=tenant, depth=depth, oldest_age_ms=0)

    depths = [
        row("a", "interactive", 5), row("b", "interactive", 9), row("c", "batch", 4), row("d", "batch", 1),
        row("e", "interactive", 7, "other"),
    ]  # fmt: skip
    assert next_turn(depths, "m", "a") == 2
    assert next_turn(depths, "m", "c") == 5 + 9 + 2, "batch comes after all that is interactive"
    assert next_turn(depths, "m", "nobody") == next_turn([], "m", "a") == 1
