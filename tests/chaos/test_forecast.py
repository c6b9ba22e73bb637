"""The forecast of a task's start, scored by its own metric on a steady load."""

from __future__ import annotations

import asyncio
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.chaos.support import redis_sets
from tests.chaos.support.loads import Tenants, keys, running
from tests.chaos.support.town import Plan, Town, town_of

STARTS = 200


async def test_at_least_85_in_100_starts_come_before_the_p90_forecast(tmp_path: Path) -> None:
    plan = Plan(replicas=2, workers=2, slots=4, token_ms=10, env=keys({"acme": 1}))
    with redis_sets.plain() as redis:
        async with town_of(redis, plan, tmp_path) as town:
            tenants = Tenants(town)
            short = tenants.closed_loop("acme", 12, max_tokens=20)
            long = tenants.closed_loop("acme", 12, max_tokens=60)
            async with running(short, long), asyncio.timeout(240):
                while sum((scores := await verdicts(town)).values()) < STARTS:
                    await asyncio.sleep(0.2)
    total = sum(scores.values())
    held = (total - scores.get("late", 0)) / total
    print(f"{total} starts: {scores}; {held:.1%} before the p90 forecast")
    assert held >= 0.85, scores


async def verdicts(town: Town) -> dict[str, int]:
    """`llorch_forecast_starts` of every replica, by verdict."""
    counts: dict[str, int] = {}
    for url in town.urls:
        async with town.session.get(
            f"{url}/metrics", headers={"Authorization": "Bearer admin-key-of-the-chaos-run"}
        ) as reply:
            assert reply.status == 200
            for family in text_string_to_metric_families(await reply.text()):
                for sample in family.samples if family.name == "llorch_forecast_starts" else ():
                    if sample.name.endswith("_total"):
                        verdict = sample.labels["verdict"]
                        counts[verdict] = counts.get(verdict, 0) + int(sample.value)
    return counts
