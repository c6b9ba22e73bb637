"""A recent view of workers, models and service rates, so that admission and forecasts cost no round trip each.

Figures here may be a second old; decisions that matter are taken by the store's scripts. Read `FleetView.forecast`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from llorch_wire.tasks import Priority
from orchestratord.forecast import Forecast, ForecastBook, predict
from orchestratord.planner import free_for
from orchestratord.routing import is_bound, may_take
from orchestratord.store.types import PlacementSpec, ServiceRates, Snapshot, WorkerView
from orchestratord.values import ModelView, PoolView

if TYPE_CHECKING:
    from orchestratord.house import House

WORKERS_FRESH_S = 1.0
RATES_FRESH_S = 1.0
SLOTS_FRESH_S = 1.0
MAX_MODELS = 10_000

Slots: TypeAlias = tuple[Snapshot, int, dict[Priority, int]]


class FleetView:
    """What this process lately knew of the fleet."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._workers: tuple[float, list[WorkerView]] = (float("-inf"), [])
        self._rates: dict[str, tuple[float, ServiceRates | None]] = {}
        self._slots_of: dict[str, tuple[float, Slots]] = {}
        self._models: frozenset[str] = frozenset()
        self.book = ForecastBook()

    async def workers(self, *, fresh: bool = False) -> list[WorkerView]:
        """Every registered worker, at most a second old. Raises StoreUnavailableError."""
        read_at, views = self._workers
        now = time.monotonic()
        if fresh or now - read_at >= WORKERS_FRESH_S:
            views = await self._house.store.workers()
            self._workers = (now, views)
        return views

    async def known_models(self, model: str | None = None) -> frozenset[str]:
        """Every model ever registered; read again unless `model` is among those known here (none is ever forgotten)."""
        if model is None or model not in self._models:
            self._models = frozenset(await self._house.store.models())
        return self._models

    async def rates(self, model: str) -> ServiceRates | None:
        """Measured service of a model, at most a second old."""
        now = time.monotonic()
        read_at, rates = self._rates.get(model, (float("-inf"), None))
        if now - read_at >= RATES_FRESH_S:
            rates = await self._house.store.rates(model)
            if len(self._rates) >= MAX_MODELS:
                self._rates.clear()
            self._rates[model] = (now, rates)
        return rates

    async def forecast(
        self, model: str, position: int, priority: Priority, placement: PlacementSpec | None = None
    ) -> Forecast | None:
        """When the task at this place of the model's queue (1: the next) will start; None while no ready worker may
        take it."""
        view, slots_total, free = await self._slots(model)
        if placement is not None and is_bound(placement):
            slots_total, free = self._count(_only_for(view, placement))
        return predict(
            max(0, position - 1),
            slots_total=slots_total,
            slots_free=free[priority],
            rates=await self.rates(model),
        )

    async def _slots(self, model: str) -> Slots:
        """The model's workers, their slots in all, and those that each class can have; at most a second old."""
        now = time.monotonic()
        read_at, slots = self._slots_of.get(model, (float("-inf"), None))
        if slots is None or now - read_at >= SLOTS_FRESH_S:
            view = await self._house.store.snapshot(model, per_queue=1)
            slots = (view, *self._count(view))
            if len(self._slots_of) >= MAX_MODELS:
                self._slots_of.clear()
            self._slots_of[model] = (now, slots)
        return slots

    def _count(self, view: Snapshot) -> tuple[int, dict[Priority, int]]:
        """Slots in all, and those that each class can have."""
        preempt = self._house.settings.preempt
        free: dict[Priority, int] = {
            "interactive": free_for("interactive", view, preempt=preempt), "batch": free_for("batch", view),
        }  # fmt: skip
        return sum(worker.slots_total for worker in view.workers if worker.state == "ready"), free


def _only_for(view: Snapshot, placement: PlacementSpec) -> Snapshot:
    """The snapshot with those workers alone that a task so placed may run on."""
    workers = tuple(worker for worker in view.workers if may_take(placement, worker))
    return msgspec.structs.replace(view, workers=workers)


def by_model(models: frozenset[str], workers: list[WorkerView]) -> list[ModelView]:
    """Every known model with what serves it now, by name."""
    views: list[ModelView] = []
    for model in sorted(models):
        ready = [view for view in workers if view.model == model and view.state == "ready"]
        views.append(
            ModelView(
                model=model,
                workers_ready=len(ready),
                slots_total=sum(view.slots_total for view in ready),
                slots_free=sum(max(0, view.slots_total - view.slots_used) for view in ready),
                context_length=min((view.context_length for view in ready), default=0),
            )
        )
    return views


def by_pool(workers: list[WorkerView]) -> list[PoolView]:
    """Workers summed up by pool, by name."""
    pools: dict[str, list[WorkerView]] = {}
    for view in workers:
        pools.setdefault(view.pool, []).append(view)
    return [
        PoolView(
            pool=pool,
            workers_total=len(views),
            workers_ready=sum(1 for view in views if view.state == "ready"),
            slots_total=sum(view.slots_total for view in views if view.state == "ready"),
            slots_used=sum(view.slots_used for view in views),
            models=tuple(sorted({view.model for view in views})),
        )
        for pool, views in sorted(pools.items())
    ]
