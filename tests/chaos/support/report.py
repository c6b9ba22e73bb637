"""What a chaos run found, as JSON and as a table. Read `Report.failures`."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Strike:
    """One fault that happened."""

    kind: str
    at_s: float
    streams_in_flight: int
    detail: str = ""
    lasted_s: float = 0.0


@dataclass
class Report:
    """Everything that one run has to say."""

    topology: str
    seed: int
    seconds: float
    clients: int
    replicas: int
    workers: int
    strikes: list[Strike] = field(default_factory=list)
    kinds_due: list[str] = field(default_factory=list)
    acknowledged: int = 0
    completed: int = 0
    cancelled: int = 0
    tokens: int = 0
    reconnections: int = 0
    posts_refused: int = 0
    migrations: dict[str, int] = field(default_factory=dict)
    adopted: int = 0
    longest_pause_s: float = 0.0
    pause_p95_s: float = 0.0
    rolled_back_tasks: list[str] = field(default_factory=list)
    """What clients saw of it: tasks that were unknown or whose log had ended before the client's place (they sent them
    again), and tokens that had to be generated again."""
    rolled_back_in_files: list[dict[str, Any]] = field(default_factory=list)
    """By failover: what the new master's files lacked of what clients held."""

    undone_commands: list[str] = field(default_factory=list)
    """Commands of the operator that a failover undid, found and given again at the end."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    reordered: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    not_on_disk: list[str] = field(default_factory=list)
    log_differs: list[str] = field(default_factory=list)
    leaked_slots: list[str] = field(default_factory=list)
    audit: list[str] = field(default_factory=list)
    unexpected_answers: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    MUST_BE_EMPTY = (
        "lost", "doubled", "reordered", "hung", "mismatched", "not_on_disk", "log_differs", "leaked_slots", "audit",
        "unexpected_answers", "complaints",
    )  # fmt: skip

    def failures(self) -> dict[str, list[str]]:
        """What must not be, by kind; {} for a clean run. A kind of fault that didn't hit a stream is a failure too."""
        found = {name: getattr(self, name) for name in self.MUST_BE_EMPTY if getattr(self, name)}
        hit = {strike.kind for strike in self.strikes if strike.streams_in_flight > 0}
        if missing := [kind for kind in self.kinds_due if kind not in hit]:
            found["faults_that_hit_no_stream"] = missing
        if not self.acknowledged:
            found["nothing_ran"] = ["no task was acknowledged"]
        return found

    def take_pauses(self, pauses: list[float]) -> None:
        """Longest silences of the streams."""
        if pauses:
            self.longest_pause_s = round(max(pauses), 2)
            self.pause_p95_s = round(statistics.quantiles([*pauses, *pauses], n=20)[-1], 2)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "failures": self.failures()}

    def write(self, path: Path) -> None:
        """The whole report."""
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")

    def table(self) -> str:
        """The report for people."""
        moves = ", ".join(f"{reason} {count}" for reason, count in sorted(self.migrations.items()))
        lines = [
            f"{self.topology}: {self.seconds:.0f} s, {self.clients} clients, {self.replicas} replicas, "
            f"{self.workers} workers, seed {self.seed}",
            f"  tasks acknowledged {self.acknowledged}, completed {self.completed}, cancelled {self.cancelled}; "
            f"tokens delivered {self.tokens}",
            f"  streams reopened {self.reconnections}, POSTs to be repeated {self.posts_refused}, "
            f"tasks adopted {self.adopted}, "
            f"moved {sum(self.migrations.values())} ({moves})",
            f"  longest silence of a stream {self.longest_pause_s} s, 95 % below {self.pause_p95_s} s",
        ]
        if self.topology.startswith("sentinel"):
            lines.append(f"  rolled back by failover, as clients saw it: {len(self.rolled_back_tasks)}; in files:")
            lines += [f"    {entry}" for entry in [*self.rolled_back_in_files, *self.undone_commands]]
        lines.append(f"  {'fault':<28}{'times':>6}{'streams in flight':>20}")
        times = Counter(strike.kind for strike in self.strikes)
        for kind in sorted(times):
            flights = [strike.streams_in_flight for strike in self.strikes if strike.kind == kind]
            lines.append(f"  {kind:<28}{times[kind]:>6}{f'{min(flights)} to {max(flights)}':>20}")
        counts = ", ".join(f"{name} {len(getattr(self, name))}" for name in self.MUST_BE_EMPTY)
        lines.append(f"  {counts}")
        for name, what in self.failures().items():
            lines += [f"  FAILED {name} ({len(what)}):", *(f"    {one}" for one in what[:5])]
        return "\n".join(lines)
