"""When will a waiting task start? Pure: from its place, the slots and measured service rates. Read `predict` first.

A task with k departures ahead of it, on c slots with mean service time m, starts at about k·m/c (renewal argument).
Its 90th percentile takes the departures to come in rounds of c – equal tasks started together do – plus the spread of
the service time over those rounds.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from orchestratord.store.types import QueueDepth, ServiceRates

Verdict: TypeAlias = Literal["within_p50", "within_p90", "late"]

DISPATCH_P50_MS = 20.0
DISPATCH_P90_MS = 500.0
"""Without a queue a start takes one dispatch; a lost wake-up costs one dispatch interval."""
_Z90 = 1.2816
_EXPONENTIAL_90 = 2.303
TIGHT = 8
FEW_SAMPLES = 5
EFFECTIVE_SAMPLES = 19
"""What a mean that gives a tenth of its weight to the latest sample is worth."""
MIN_SAMPLES = 1


@dataclass(frozen=True)
class Forecast:
    """Milliseconds from now until the start: median and 90th percentile."""

    p50_ms: float
    p90_ms: float


def predict(ahead: int, *, slots_total: int, slots_free: int, rates: ServiceRates | None) -> Forecast | None:
    """Forecast for a task with `ahead` waiting tasks before it; None while nothing serves or nothing was measured."""
    if slots_total <= 0:
        return None
    departures = ahead - slots_free + 1
    measured = rates is not None and rates.samples >= MIN_SAMPLES
    if departures <= 0:
        spare = slots_free - ahead
        if rates is None or not measured or spare > max(1, slots_total // TIGHT):
            return Forecast(DISPATCH_P50_MS, DISPATCH_P90_MS)
        # The last free slots may be gone by the time the task is looked at: then it waits for one departure.
        one_ms = min(rates.service_ms, rates.service_ms / slots_total * _EXPONENTIAL_90)
        return Forecast(DISPATCH_P50_MS, DISPATCH_P90_MS + one_ms)
    if rates is None or not measured:
        return None
    rounds = math.ceil(departures / slots_total)
    variance = max(rates.service_ms_variance, 0.0)
    p50 = departures * rates.service_ms / slots_total
    # The mean itself is known from few samples only, and its error grows with the queue.
    seen = min(rates.samples, EFFECTIVE_SAMPLES)
    relative = math.sqrt(variance) / max(rates.service_ms, 1.0) if rates.samples >= FEW_SAMPLES else 1.0
    error = p50 * relative / math.sqrt(seen)
    p90 = rounds * rates.service_ms + _Z90 * math.sqrt(rounds * variance + error**2)
    return Forecast(p50 + DISPATCH_P50_MS, max(p50, p90) + DISPATCH_P90_MS)


def next_turn(depths: Iterable[QueueDepth], model: str, tenant: str) -> int:
    """The place from which a waiting task of the tenant will start next: tenants of a class take turns. 1 where none of
    the tenant's tasks waits for this model."""
    rows = [row for row in depths if row.model == model]
    classes = {row.priority for row in rows if row.tenant == tenant}
    if "interactive" in classes:
        return sum(row.priority == "interactive" for row in rows)
    if "batch" not in classes:
        return 1
    return sum(row.depth if row.priority == "interactive" else 1 for row in rows)


def judge(forecast: Forecast, actual_ms: float) -> Verdict:
    """How a forecast did."""
    if actual_ms <= forecast.p50_ms:
        return "within_p50"
    return "within_p90" if actual_ms <= forecast.p90_ms else "late"


class ForecastBook:
    """Forecasts given at admission, kept until the start is seen. Bounded: the oldest are forgotten first."""

    def __init__(self, bound: int = 20_000) -> None:
        self._given: OrderedDict[str, tuple[Forecast, int]] = OrderedDict()
        self._bound = bound

    def __len__(self) -> int:
        return len(self._given)

    def note(self, task_id: str, forecast: Forecast, now_ms: int) -> None:
        """A forecast was given to a client."""
        self._given[task_id] = (forecast, now_ms)
        while len(self._given) > self._bound:
            self._given.popitem(last=False)

    def settle(self, task_id: str, started_at_ms: int) -> Verdict | None:
        """The task started: the verdict on its forecast, None when none was given here."""
        given = self._given.pop(task_id, None)
        return None if given is None else judge(given[0], started_at_ms - given[1])

    def forget(self, task_id: str) -> None:
        """The task ended without a start."""
        self._given.pop(task_id, None)
