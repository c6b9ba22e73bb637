"""What `/metrics` says (Prometheus text format), from the runtime's counters, its measurements and the store.

One registry an app, nothing global. Units stand in the names. Labels are bounded: models, priorities, configured
tenants, codes and reasons; never a task. Read `Metrics.render` first.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llorch_wire.errors import LlorchError
from orchestratord.observations import CounterName, MeasureName, Observations
from orchestratord.store.types import QueueDepth, WorkerView

if TYPE_CHECKING:
    from orchestratord.runtime import Orchestrator

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# counter → (name without `_total`, its label, help)
_COUNTERS: dict[CounterName, tuple[str, str, str]] = {
    "admissions": ("llorch_admissions", "outcome", "Tasks that asked for admission"),
    "tokens_relayed": ("llorch_tokens_relayed", "model", "Tokens written to logs by this replica"),
    "tokens_recomputed": ("llorch_tokens_recomputed", "model", "Tokens that a worker sent although the log had them"),
    "attempts_started": ("llorch_attempts_started", "model", "Attempts claimed by this replica"),
    "attempts_ended": ("llorch_attempts_ended", "how", "Attempts that ended at this replica"),
    "adoptions": ("llorch_adoptions", "outcome", "Attempts taken over from another replica"),
    "migrations": ("llorch_migrations", "reason", "Tasks that went on in another attempt"),
    "preemptions": ("llorch_preemptions", "model", "Batch attempts that yielded to interactive work"),
    "cancellations": ("llorch_cancellations", "status", "Tasks cancelled, by the status they had"),
    "deadlines_missed": ("llorch_deadlines_missed", "where", "Tasks ended by their deadline"),
    "claim_conflicts": ("llorch_claim_conflicts", "model", "Plans that another replica had overtaken"),
    "forecast_starts": ("llorch_forecast_starts", "verdict", "Starts compared with their forecast"),
    "workers_lost": ("llorch_workers_lost", "reason", "Workers declared lost"),
    "store_errors": ("llorch_store_errors", "operation", "Failed store operations"),
    "readers_cut_off": ("llorch_readers_cut_off", "reason", "Streams ended by this replica before their task"),
    "commits": ("llorch_commits", "", "Append pipelines sent to Redis"),
    "webhooks": ("llorch_webhooks", "outcome", "Webhook deliveries tried"),
    "tasks_retired": ("llorch_tasks_retired", "", "Finished tasks dropped by retention"),
    "audit_findings": ("llorch_audit_findings", "invariant", "Broken invariants found by the reconciling sweep"),
}

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

# measurement → (name, label name, fixed label value or None for the observed one, help, buckets)
_MEASURES: dict[MeasureName, tuple[str, str, str | None, str, tuple[float, ...]]] = {
    "scheduling_latency_s": (
        "llorch_scheduling_latency_seconds", "priority", None, "From admission or requeue to the claim", _SLOW,
    ),
    "ttft_s": ("llorch_time_to_first_token_seconds", "priority", None, "Admission to first token in the log", _SLOW),
    "commit_s": ("llorch_redis_latency_seconds", "operation", "append", "Time of a round trip to Redis", _FAST),
    "plan_s": ("llorch_redis_latency_seconds", "operation", "claim", "Time of a round trip to Redis", _FAST),
    "commit_tokens": ("llorch_commit_tokens", "", None, "Tokens in one append pipeline", _SIZES),
    "probe_s": ("llorch_worker_probe_seconds", "", None, "Time of a worker's /health", _FAST),
}  # fmt: skip


class Metrics:
    """The registry of one app."""

    def __init__(self, observations: Observations, tenants: Iterable[str] = ()) -> None:
        self._registry = CollectorRegistry()
        self._tenants = frozenset(tenants)
        self._observations = observations
        self._state = _State(observations)
        self._registry.register(self._state)
        self._histograms: dict[str, Histogram] = {}
        for name, label, _, text, buckets in _MEASURES.values():
            if name not in self._histograms:
                labels = (label,) if label else ()
                self._histograms[name] = Histogram(name, text, labels, buckets=buckets, registry=self._registry)
        observations.listen(self._measured)

    async def render(self, orchestrator: Orchestrator) -> bytes:
        """The exposition. Without Redis it still tells what this process knows, and `llorch_store_up 0`."""
        started = time.perf_counter()
        try:
            depths = await orchestrator.queue()
            self._histograms["llorch_redis_latency_seconds"].labels("read").observe(time.perf_counter() - started)
            workers = await orchestrator.workers()
        except LlorchError:
            self._state.forget_store()
        else:
            self._state.take(depths, workers, self._tenants)
        ready, _ = await orchestrator.ready()
        self._state.ready = ready
        return generate_latest(self._registry)

    def _measured(self, measure: MeasureName, label: str, value: float) -> None:
        name, label_name, fixed, _, _ = _MEASURES[measure]
        histogram = self._histograms[name]
        (histogram.labels(label if fixed is None else fixed) if label_name else histogram).observe(value)


class _State(Collector):
    """Gauges from the last look at the store and counters from the observations."""

    def __init__(self, observations: Observations) -> None:
        self._observations = observations
        self._depths: list[QueueDepth] = []
        self._workers: list[WorkerView] = []
        self._tenants: frozenset[str] = frozenset()
        self._store_up = False
        self.ready = False

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are known at collection only."""
        return []

    def take(self, depths: list[QueueDepth], workers: list[WorkerView], tenants: frozenset[str]) -> None:
        """What the store says now."""
        self._depths, self._workers, self._tenants, self._store_up = depths, workers, tenants, True

    def forget_store(self) -> None:
        """The store doesn't answer: old figures would lie."""
        self._depths, self._workers, self._store_up = [], [], False

    def collect(self) -> Iterator[Metric]:
        """Everything but the histograms."""
        yield _gauge("llorch_store_up", "Whether Redis answers", self._store_up)
        yield _gauge("llorch_ready", "Whether this replica takes work", self.ready)
        yield _gauge("llorch_relays_active", "Attempts relayed by this replica", self._observations.relays_active)
        yield _gauge("llorch_readers_active", "Streams open at this replica", self._observations.readers_active)
        yield from self._counters()
        yield from self._queue()
        yield from self._fleet()

    def _counters(self) -> Iterator[Metric]:
        families: dict[CounterName, CounterMetricFamily] = {}
        for key, (name, label, text) in _COUNTERS.items():
            families[key] = CounterMetricFamily(name, text, labels=[label] if label else [])
        for (key, value), amount in sorted(self._observations.counters.items()):
            family = families.get(key)
            if family is not None:
                family.add_metric([value] if _COUNTERS[key][1] else [], amount)
        yield from families.values()

    def _queue(self) -> Iterator[Metric]:
        depth = GaugeMetricFamily("llorch_queue_depth", "Waiting tasks", labels=["model", "priority"])
        age = GaugeMetricFamily(
            "llorch_queue_oldest_age_seconds", "Age of the oldest waiting task", labels=["model", "priority"]
        )
        by_tenant = GaugeMetricFamily("llorch_tenant_queue_depth", "Waiting tasks of a tenant", labels=["tenant"])
        depths: dict[tuple[str, str], int] = {}
        ages: dict[tuple[str, str], int] = {}
        tenants = dict.fromkeys(self._tenants, 0)
        for row in self._depths:
            key = (row.model, row.priority)
            depths[key] = depths.get(key, 0) + row.depth
            ages[key] = max(ages.get(key, 0), row.oldest_age_ms)
            if row.tenant in tenants:
                tenants[row.tenant] += row.depth
        for key in sorted(depths):
            depth.add_metric(key, depths[key])
            age.add_metric(key, ages[key] / 1000)
        for tenant in sorted(tenants):
            by_tenant.add_metric([tenant], tenants[tenant])
        yield from (depth, age, by_tenant)

    def _fleet(self) -> Iterator[Metric]:
        workers = GaugeMetricFamily("llorch_workers", "Registered workers", labels=["model", "state"])
        labels = ["worker", "model", "pool"]
        families = (
            GaugeMetricFamily("llorch_worker_slots_total", "Slots of a worker", labels=labels),
            GaugeMetricFamily("llorch_worker_slots_used", "Slots in use", labels=labels),
            GaugeMetricFamily("llorch_worker_kv_blocks_free", "Free KV-cache blocks", labels=labels),
            GaugeMetricFamily("llorch_worker_tokens_per_second", "Tokens per second of late", labels=labels),
            GaugeMetricFamily("llorch_worker_vram_used_bytes", "Device memory in use", labels=labels),
        )
        counted: dict[tuple[str, str], int] = {}
        for view in self._workers:
            counted[view.model, view.state] = counted.get((view.model, view.state), 0) + 1
            values = (
                view.slots_total, view.slots_used, view.kv_blocks_free, view.tokens_per_second, view.vram_used_bytes,
            )  # fmt: skip
            for family, value in zip(families, values, strict=True):
                family.add_metric([view.worker_id, view.model, view.pool], value)
        for key in sorted(counted):
            workers.add_metric(key, counted[key])
        yield workers
        yield from families


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))
