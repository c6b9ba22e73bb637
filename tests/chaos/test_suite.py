"""The suite in CI's size: 45 s of faults of every kind on 200 streaming clients, on each deployment of Redis.

`make chaos` runs the same for minutes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.run import SETS
from tests.chaos.support.faults import faults_of
from tests.chaos.support.running import Course, chaos_run
from tests.chaos.support.town import Plan, town_of

PLAN = Plan(replicas=3, workers=4, slots=50, token_ms=150, real_worker=True)
COURSE = Course(seconds=45, clients=200, demo_clients=4, gap_s=2.5)


@pytest.mark.parametrize("name", ["redis", "sentinel", "cluster"])
async def test_nothing_is_lost_doubled_reordered_or_hung(name: str, tmp_path: Path) -> None:
    with SETS[name]() as redis:
        faults = faults_of(redis.name, real_worker=True)
        async with town_of(redis, PLAN, tmp_path) as town:
            report = await chaos_run(town, faults, COURSE, tmp_path)
    report.write(tmp_path / "report.json")
    print(report.table())
    assert report.failures() == {}, report.table()
    assert report.adopted > 0 and report.migrations, "replicas and workers died, so tasks were adopted and moved"
