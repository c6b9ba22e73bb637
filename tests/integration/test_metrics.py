"""`/metrics` after everything that it counts has happened once: each item of the list, with units in the names."""

from __future__ import annotations

import asyncio
import re

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from llorch_wire.errors import ApiError
from orchestratord.metrics import Metrics
from orchestratord.runtime import Orchestrator, Tenant
from orchestratord.store.types import QueueLimits
from tests.integration.house import TENANT, Town, read_all, until

LABELS = {"model", "priority", "outcome", "how", "reason", "status", "where", "verdict", "state", "worker", "pool",
          "tenant", "operation", "invariant", "le"}  # fmt: skip


async def scraped(orchestrator: Orchestrator, metrics: Metrics) -> dict[str, Metric]:
    text = (await metrics.render(orchestrator)).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    """The sum of a family's samples of that name and those labels."""
    family = next(family for key, family in families.items() if name.startswith(key))
    found = [s.value for s in family.samples if s.name == name and labels.items() <= s.labels.items()]
    assert found, (name, labels, family.samples)
    return sum(found)


async def test_everything_on_the_list_is_there_and_counts(town: Town) -> None:
    one = await town.replica(limits=QueueLimits(per_tenant=6))
    metrics = Metrics(one.observations, ["default", "bulk"])
    worker = await town.worker("w1", slots=1, token_ms=2)
    bulk = Tenant("bulk")
    batch = await town.submit(priority="batch", tenant=bulk, max_tokens=5_000, ignore_eos=True)
    await until(lambda: worker.counts["tokens"] > 20, "batch runs")
    urgent = await town.submit(max_tokens=1_500, ignore_eos=True)  # preempts
    await until(lambda: worker.counts["preempts"] == 1, "batch has yielded")
    await until(lambda: one._house.relays.has(urgent), "the urgent one has the slot, and no place in the queue")
    for _ in range(6):
        await town.submit(priority="batch")
    with pytest.raises(ApiError):
        await town.submit()
    families = await scraped(one, metrics)
    assert value(families, "llorch_queue_depth", model="scripted", priority="batch") >= 6
    assert value(families, "llorch_queue_oldest_age_seconds", model="scripted", priority="batch") > 0
    assert value(families, "llorch_tenant_queue_depth", tenant="default") == 6
    assert value(families, "llorch_admissions_total", outcome="admitted") == 8
    assert value(families, "llorch_admissions_total", outcome="queue_full") == 1
    assert value(families, "llorch_preemptions_total", model="scripted") == 1
    assert value(families, "llorch_worker_slots_used", worker="w1") == 1

    second = await town.worker("w2", slots=8, token_ms=1)
    await worker.die()  # the urgent one migrates
    await until(lambda: one.observations.counters["migrations", "worker_lost"] >= 1, "it goes on elsewhere")
    await town.finished(urgent)
    assert second.counts["tokens"] > 0
    await one.cancel(batch, None)
    running = [await town.submit(max_tokens=4_000, ignore_eos=True) for _ in range(2)]
    await until(lambda: len(one._house.relays) >= 2, "the first replica relays them")
    two = await town.replica()  # only now: any replica claims what is queued
    others = Metrics(two.observations)
    families = await scraped(one, metrics)
    await town.kill(one)
    for task_id in running:
        await town.finished(task_id)

    assert value(families, "llorch_migrations_total", reason="worker_lost") >= 1
    assert value(families, "llorch_workers_lost_total") >= 1
    assert value(families, "llorch_cancellations_total") == 1
    assert value(families, "llorch_forecast_starts_total") >= 1
    assert value(families, "llorch_tokens_relayed_total", model="scripted") > 1_000
    for histogram, labels in (
        ("llorch_scheduling_latency_seconds", {"priority": "interactive"}),
        ("llorch_time_to_first_token_seconds", {"priority": "interactive"}),
        ("llorch_redis_latency_seconds", {"operation": "append"}),
        ("llorch_redis_latency_seconds", {"operation": "claim"}),
        ("llorch_redis_latency_seconds", {"operation": "read"}),
    ):
        assert value(families, f"{histogram}_count", **labels) > 0
        assert value(families, f"{histogram}_sum", **labels) > 0
    adopted = await scraped(two, others)
    assert value(adopted, "llorch_adoptions_total", outcome="reattached") == 2
    assert not families["llorch_tokens_recomputed"].samples, "nothing was computed twice, migration or not"
    check_names([*families.values(), *adopted.values()], [batch, urgent, *running])
    await town.audit()


def check_names(families: list[Metric], task_ids: list[str]) -> None:
    """Prefix and unit in each name, labels of bounded sets, no task anywhere."""
    for family in families:
        assert re.fullmatch(r"llorch_[a-z_]+", family.name)
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_bytes", "_tokens")), family.name
        for sample in family.samples:
            assert set(sample.labels) <= LABELS, sample
            assert not set(sample.labels.values()) & set(task_ids), sample
            assert not any(re.search(r"[0-9a-f]{8}-[0-9a-f]{4}-", text) for text in sample.labels.values()), sample


async def test_what_is_still_open_is_counted_once_it_ends(town: Town) -> None:
    """Gauges of this process fall again."""
    orchestrator = await town.replica()
    metrics = Metrics(orchestrator.observations)
    worker = await town.worker(slots=2, token_ms=5)
    task_id = await town.submit(max_tokens=4_000, ignore_eos=True)
    reading = asyncio.create_task(read_all(orchestrator.follow(task_id, TENANT)))
    await until(lambda: worker.counts["tokens"] > 0, "it runs")
    families = await scraped(orchestrator, metrics)
    assert value(families, "llorch_relays_active") == value(families, "llorch_readers_active") == 1
    await orchestrator.cancel(task_id, None)
    await reading
    await until(lambda: orchestrator.observations.relays_active == 0, "its relay has ended")
    families = await scraped(orchestrator, metrics)
    assert value(families, "llorch_relays_active") == value(families, "llorch_readers_active") == 0
    assert (
        value(families, "llorch_deadlines_missed_total") == 0 if families["llorch_deadlines_missed"].samples else True
    )
