"""Nobody gets less because others want more: tenants share by weight, and batch work gives way to interactive work."""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path

import pytest

from tests.chaos.support import redis_sets
from tests.chaos.support.loads import Tenants, keys, running
from tests.chaos.support.town import Plan, town_of

WEIGHTS = {"calm": 1.0, "heavy": 2.0, "flood": 1.0}
TOKENS = 30
SECONDS = 5.0
"""Of each of four phases."""


async def test_each_well_behaved_tenant_gets_its_fair_share(tmp_path: Path) -> None:
    plan = Plan(replicas=2, workers=2, slots=4, token_ms=20, env=keys(WEIGHTS))
    with redis_sets.plain() as redis:
        async with town_of(redis, plan, tmp_path) as town:
            tenants = Tenants(town)
            flood = tenants.flood("flood", 600, max_tokens=TOKENS)
            calm = tenants.closed_loop("calm", 8, max_tokens=TOKENS)
            heavy = tenants.closed_loop("heavy", 12, max_tokens=TOKENS)
            async with running(flood, calm, heavy):
                await until_served(tenants, 40 * TOKENS)
                before = await tenants.generated()
                await until_served(tenants, sum(before.values()) + 180 * TOKENS)
                after = await tenants.generated()
    served = {name: after[name] - before[name] for name in WEIGHTS}
    total = sum(served.values())
    shares = {name: served[name] / total for name in WEIGHTS}
    print(f"shares {shares} of {total} tokens, weights {WEIGHTS}")
    for name, weight in WEIGHTS.items():
        fair = weight / sum(WEIGHTS.values())
        assert abs(shares[name] / fair - 1) <= 0.10, shares


async def until_served(tenants: Tenants, tokens: int) -> None:
    """Wait until so many tokens were generated."""
    async with asyncio.timeout(120):
        while sum((await tenants.generated()).values()) < tokens:
            await asyncio.sleep(0.1)


@pytest.mark.slow  # it compares times, which other work on the machine may move
async def test_interactive_work_hardly_waits_longer_beside_a_batch_flood(tmp_path: Path) -> None:
    """Interactive tasks fill four fifths of the slots, by their tokens alone, so that they wait for each other.

    With and without the flood by turns, over the same arrivals: what else the machine does hits both, and a slow one
    only makes both wait longer. What depends on no machine is shown, at every load, by
    `tests/unit/orchestratord/test_beside_batch.py`.
    """
    plan = Plan(replicas=2, workers=2, slots=4, token_ms=20, env=keys({"people": 1, "machines": 1}))
    per_s = 0.8 * plan.workers * plan.slots * 1000 / (TOKENS * plan.token_ms)
    waits: dict[bool, list[int]] = {False: [], True: []}
    with redis_sets.plain() as redis:
        async with town_of(redis, plan, tmp_path) as town:
            tenants = Tenants(town)
            for seed, flooded in [(5, False), (5, True), (6, True), (6, False)]:
                await until_idle(tenants)
                flood = tenants.closed_loop("machines", 60 * flooded, max_tokens=4 * TOKENS, priority="batch")
                async with running(flood):
                    await until_served(tenants, sum((await tenants.generated()).values()) + 4 * TOKENS * flooded)
                    await tenants.open_loop("people", per_s, SECONDS, seed, waits[flooded], max_tokens=TOKENS)
            batch_tokens = (await tenants.generated())["machines"]
    assert len(waits[False]) == len(waits[True]) > 50 and batch_tokens > 500
    p95 = {flooded: statistics.quantiles(each, n=20)[-1] for flooded, each in waits.items()}
    print(f"wait of {len(waits[True])} tasks: p95 {p95[False]:.0f} ms alone, {p95[True]:.0f} ms beside a flood")
    print(f"{batch_tokens} tokens of batch work were generated meanwhile")
    assert p95[True] <= 1.5 * p95[False], p95


async def until_idle(tenants: Tenants) -> None:
    """Cancel what is left of an earlier load, and wait until nothing runs or waits."""
    async with asyncio.timeout(60):
        await tenants.cancel_all()
        while await tenants.town.store.queue() or any(view.slots_used for view in await tenants.town.store.workers()):
            await asyncio.sleep(0.1)
