"""The bounds on a stream's pause when a replica or a worker dies: the only figures of time that a test insists on."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.latency import measure


async def test_streams_go_on_in_time_and_a_replicas_death_costs_no_token(tmp_path: Path) -> None:
    figures = await measure(2, tmp_path, ("replica_kill", "worker_kill"))
    print(figures.table())
    assert figures.p95("replica_kill") <= 3.0
    assert figures.p95("worker_kill") <= 5.0
    assert figures.recomputed["replica_kill"] == 0
    assert sum(figures.relayed_by_the_victim) > 0
