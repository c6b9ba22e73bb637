"""What finished tasks cost: Redis memory for each, the time of a listing among few and among many, retention's pace.

A real Redis on a unix socket with `appendfsync always`; tasks of 20 tokens go through the store's own transitions.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

from bench.report import last_line, table, where, write_section
from orchestratord.jobs.retention import Retention
from orchestratord.jobs.runner import SWEEP_BUDGET_S
from orchestratord.observations import Observations
from orchestratord.store.audit import AuditPlace
from orchestratord.store.store import Store
from tests.support.redis_server import RedisServer, redis_server
from tests.support.seeding import MODEL, TOKENS, seed_finished

FEW = 1_000
ROUNDS = 300
TENANT = "default"


def memory(server: RedisServer) -> int:
    client = server.client()
    info = cast("dict[str, int]", client.info("memory"))  # redis-py types it for its asyncio client too
    client.close()
    return info["used_memory"]


async def timed(call: Callable[[], Awaitable[Any]]) -> tuple[float, float]:
    """Median and 95th percentile of a call, in ms."""
    taken: list[float] = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        await call()
        taken.append((time.perf_counter() - begun) * 1000)
    return statistics.median(taken), statistics.quantiles(taken, n=20)[-1]


async def views(store: Store, task_id: str) -> dict[str, tuple[float, float]]:
    _, middle = await store.list_tasks(TENANT, limit=500)
    return {
        "newest 50 of a tenant": await timed(lambda: store.list_tasks(TENANT, limit=50)),
        "50 from the middle": await timed(lambda: store.list_tasks(TENANT, limit=50, after=middle)),
        "50 of a status and a model": await timed(
            lambda: store.list_tasks(TENANT, limit=50, status="completed", model=MODEL)
        ),
        "one task's log": await timed(lambda: store.read_log(task_id)),
        "queue": await timed(store.queue),
    }


async def sweep(store: Store) -> tuple[int, float]:
    """Periods of the sweep until it has seen everything, and the seconds it worked."""
    periods, begun = 0, time.monotonic()
    place: AuditPlace | None = None
    while True:
        periods += 1
        findings, place = await store.audit_from(place, budget_s=SWEEP_BUDGET_S)
        assert not findings, findings
        if place is None:
            return periods, time.monotonic() - begun


async def measure(count: int) -> dict[str, Any]:
    with redis_server(durable=True) as server:
        store = await Store.connect(server.url)
        empty = memory(server)
        (first, *_) = await seed_finished(store, FEW)
        few = await views(store, first)
        await seed_finished(store, count - FEW)
        full = memory(server)
        many = await views(store, first)
        periods, worked_s = await sweep(store)
        begun = time.monotonic()
        dropped = await Retention(store, Observations(), keep_s=3_600, keep_count=FEW).run()
        rate = dropped / (time.monotonic() - begun)
        await asyncio.sleep(1)  # some servers free large values in a thread of their own
        left = memory(server) - empty
        await store.aclose()
    return {
        "count": count,
        "bytes_per_task": round((full - empty) / count),
        "few": few,
        "many": many,
        "sweep_periods": periods,
        "sweep_s": round(worked_s, 1),
        "dropped": dropped,
        "dropped_per_s": round(rate),
        "left_mib": round(left / 2**20, 1),
        "full_mib": round((full - empty) / 2**20),
    }


def section(result: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{value:.2f}" for side in ("few", "many") for value in result[side][name])] for name in result["few"]
    ]
    head = ["ms", f"p50 of {FEW:,}", "p95", f"p50 of {result['count']:,}", "p95"]
    r = result
    return f"""## Finished tasks

`python -m bench.finished --write`: {r["count"]:,} finished tasks of {TOKENS} tokens on one Redis with
`appendfsync always`. One takes **{r["bytes_per_task"]:,} bytes** of Redis' memory ({r["full_mib"]} MiB in all).
Reads of the store, {ROUNDS} of each, one after the other:

{table(head, rows)}

Retention drops **{r["dropped_per_s"]:,} tasks a second** ({r["dropped"]:,} in one run, which ends after 9 s; there
is one every 30 s); afterwards {r["left_mib"]} MiB were in use. The reconciling sweep took {r["sweep_periods"]} periods
to see them all, {r["sweep_s"]} s at half speed.

{where()}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--write", action="store_true", help="write the section of docs/benchmarks.md")
    options = parser.parse_args()
    result = asyncio.run(measure(options.count))
    text = section(result)
    print(text)
    if options.write:
        write_section("finished", text)
    last_line(result)


if __name__ == "__main__":
    main()
