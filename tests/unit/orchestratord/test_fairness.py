from __future__ import annotations

import pytest

from orchestratord.fairness import ServiceOrder, charge, promoted
from orchestratord.store.types import QueuedTask
from tests.unit.orchestratord.makers import NOW, queued, running, snapshot, worker

AGED = {"age_limit_ms": 30_000, "slots_per_aged": 8}


def order_of(waiting: list[QueuedTask], virtual_times: dict[str, float] | None = None, cost: float = 10.0) -> list[str]:
    view = snapshot(waiting, virtual_times=virtual_times or {})
    order = ServiceOrder(view, promoted(view, **AGED))
    served = []
    for task in order:
        order.serve(task, cost)
        served.append(task.task_id)
    return served


def test_interactive_before_batch_and_fifo_within_a_tenant() -> None:
    waiting = [queued("b1", 1, priority="batch"), queued("i2", 3), queued("i1", 2), queued("b2", 4, priority="batch")]
    assert order_of(waiting) == ["i1", "i2", "b1", "b2"]


def test_the_least_virtual_time_goes_first_and_is_charged_at_once() -> None:
    waiting = [queued(f"a{n}", n, tenant="a") for n in range(1, 4)] + [
        queued(f"b{n}", n + 10, tenant="b") for n in (1, 2)
    ]
    assert order_of(waiting, {"a": 0.0, "b": 15.0}) == ["a1", "a2", "b1", "a3", "b2"]
    assert order_of(waiting, {"a": 0.0, "b": 0.0}) == ["a1", "b1", "a2", "b2", "a3"]


def test_a_heavier_tenant_pays_less() -> None:
    waiting = [queued(f"a{n}", n, tenant="a", weight=2.0) for n in range(1, 7)]
    waiting += [queued(f"b{n}", n + 10, tenant="b") for n in range(1, 4)]
    served = order_of(waiting, {"a": 0.0, "b": 0.0})
    assert [name[0] for name in served[:6]].count("a") == 4


def test_a_tenant_never_seen_starts_level_with_the_least() -> None:
    waiting = [queued("old", 1, tenant="old"), queued("new", 2, tenant="new")]
    assert order_of(waiting, {"old": 500.0}) == ["old", "new"]


def test_a_tenant_passed_over_does_not_stop_the_pass() -> None:
    waiting = [queued("a1", 1, tenant="a"), queued("a2", 2, tenant="a"), queued("b1", 3, tenant="b")]
    view = snapshot(waiting)
    assert [task.task_id for task in ServiceOrder(view, frozenset())] == ["a1", "a2", "b1"]


def test_batch_ages_but_a_backlog_does_not_take_over() -> None:
    old = [queued(f"b{n}", n, priority="batch", waiting_since_ms=NOW - 60_000) for n in range(1, 5)]
    assert promoted(snapshot(old), **AGED) == {"b1"}
    assert order_of([*old, queued("i", 9)]) == ["b1", "i", "b2", "b3", "b4"]
    served_now = snapshot(old, busy=[running("r")])
    assert promoted(served_now, **AGED) == frozenset()
    just_yielded = queued("y", 0, priority="batch", attempt=1, waiting_since_ms=NOW - 1_000, created_at_ms=NOW - 90_000)
    assert promoted(snapshot([just_yielded, *old]), **AGED) == frozenset()
    assert promoted(snapshot(old, workers=[worker("w1", slots_total=32)]), **AGED) == {"b1", "b2", "b3", "b4"}


def test_young_batch_is_not_promoted() -> None:
    young = [queued("b", 1, priority="batch", waiting_since_ms=NOW - 29_000, created_at_ms=NOW - 90_000)]
    assert promoted(snapshot(young), **AGED) == frozenset()


def test_charges() -> None:
    assert charge(queued("t", max_tokens=50), 256.0) == 60.0
    assert charge(queued("t", max_tokens=5_000), 256.0) == 266.0
    assert charge(queued("t", max_tokens=100, tokens_kept=40, attempt=1), 256.0) == 60.0
    assert charge(queued("t", max_tokens=100, tokens_kept=99, attempt=3), 20.0) == 1.0


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0, "flood": 1.0}, {"a": 1.0, "b": 2.0, "flood": 1.0}])
def test_a_flood_gets_its_share_and_no_more(weights: dict[str, float]) -> None:
    """Every tenant has more to do than it gets; long and short tasks differ tenfold."""
    cost = {"a": 20.0, "b": 200.0, "flood": 60.0}
    served = dict.fromkeys(weights, 0.0)
    virtual = dict.fromkeys(weights, 0.0)
    sequence = 0
    for _ in range(600):
        waiting = []
        for tenant, weight in weights.items():
            for _ in range(16 if tenant == "flood" else 4):
                sequence += 1
                waiting.append(queued(f"{tenant}{sequence}", sequence, tenant=tenant, weight=weight))
        order = ServiceOrder(snapshot(waiting, virtual_times=virtual), frozenset())
        for task, _ in zip(order, range(4), strict=False):
            order.serve(task, cost[task.tenant])
            served[task.tenant] += cost[task.tenant]
            virtual[task.tenant] += cost[task.tenant] / task.weight
    total, weight_sum = sum(served.values()), sum(weights.values())
    for tenant, weight in weights.items():
        assert served[tenant] / total == pytest.approx(weight / weight_sum, rel=0.1)
