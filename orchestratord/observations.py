"""What the runtime noticed, counted: numbers without a metrics library, so that pure tests can read them.

`Observations` holds labelled counters and hands single measurements to listeners; `metrics.py` exports both. Labels
are bounded sets (codes, reasons, models), never a task id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal, TypeAlias

CounterName: TypeAlias = Literal[
    "admissions",  # label: outcome: `admitted`, `repeated` or an error code in lower case
    "tokens_relayed",  # label: model
    "tokens_recomputed",  # label: model; a worker sent tokens that the log had (re-attachment overlap)
    "attempts_started",  # label: model
    "attempts_ended",  # label: how: `completed`, `failed`, `requeued`, `stopped`, `handed_over`
    "adoptions",  # label: outcome: `reattached`, `requeued`
    "migrations",  # label: reason
    "preemptions",  # label: model
    "cancellations",  # label: status the task was in
    "deadlines_missed",  # label: where: `queued`, `running`
    "claim_conflicts",  # label: model
    "forecast_starts",  # label: verdict: `within_p50`, `within_p90`, `late`
    "workers_lost",  # label: reason: `lease`, `stall`, `connection`, `instance`
    "store_errors",  # label: operation
    "readers_cut_off",  # label: reason: `behind`, `stopping`, `undone` (by a failover)
    "commits",  # label: "" ; one append pipeline each
    "webhooks",  # label: outcome
    "tasks_retired",  # label: ""
    "audit_findings",  # label: invariant
]

MeasureName: TypeAlias = Literal[
    "scheduling_latency_s",  # label: priority; admission (or requeue) to claim
    "ttft_s",  # label: priority; admission to the first token in the log
    "commit_s",  # label: ""; one append pipeline
    "commit_tokens",  # label: ""; tokens in it
    "plan_s",  # label: model; snapshot to claim
    "probe_s",  # label: ""; a /health probe
]

Listener: TypeAlias = Callable[[MeasureName, str, float], None]


class Observations:
    """Counters by (name, label), gauges of this process, and single measurements for whoever listens."""

    def __init__(self) -> None:
        self.counters: Counter[tuple[CounterName, str]] = Counter()
        self.relays_active = 0
        self.readers_active = 0
        self._listeners: list[Listener] = []

    def count(self, name: CounterName, label: str = "", amount: int = 1) -> None:
        """Add to a counter."""
        self.counters[name, label] += amount

    def measure(self, name: MeasureName, value: float, label: str = "") -> None:
        """Report one measurement, in the unit that the name ends with."""
        for listener in self._listeners:
            listener(name, label, value)

    def listen(self, listener: Listener) -> None:
        """Call `listener(name, label, value)` for every measurement from now on."""
        self._listeners.append(listener)
