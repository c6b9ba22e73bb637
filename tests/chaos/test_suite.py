"""The suite in CI's size: 45 s of faults of every kind on 200 streaming clients, on each deployment of Redis.

`make chaos` runs the same for minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from tests.chaos.run import one
from tests.chaos.support.running import Course
from tests.chaos.support.town import Plan
from tests.support.namespaces import missing_tools

PLAN = Plan(replicas=3, workers=4, slots=50, token_ms=150, real_worker=True)
COURSE = Course(seconds=45, clients=200, demo_clients=4, gap_s=2.5)


@pytest.mark.parametrize("name", ["redis", "sentinel", "cluster", "partition"])
async def test_nothing_is_lost_doubled_reordered_or_hung(
    name: str, tmp_path: Path, missing_service: Callable[[str], NoReturn]
) -> None:
    if name == "partition" and (reason := missing_tools()):
        missing_service(reason)
    report = await one(name, PLAN, COURSE)
    report.write(tmp_path / "report.json")
    print(report.table())
    assert report.failures() == {}, report.table()
    assert report.adopted > 0 and report.migrations, "replicas and workers died, so tasks were adopted and moved"
