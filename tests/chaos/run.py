"""The chaos suite by hand: `python -m tests.chaos.run --minutes 5`. Prints a table for each set-up and writes
chaos-report-<set-up>.json; exit status 1 when anything was lost, doubled, reordered, hung or otherwise wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from tests.chaos.support import redis_sets
from tests.chaos.support.faults import faults_of
from tests.chaos.support.partition import PartitionedSet, partitioned
from tests.chaos.support.report import Report
from tests.chaos.support.running import Course, chaos_run
from tests.chaos.support.town import Plan, town_of

SETS: dict[str, Callable[[], AbstractContextManager[redis_sets.RedisSet]]] = {
    "redis": redis_sets.plain,
    "sentinel": redis_sets.sentinel,
    "sentinel-min-replicas": lambda: redis_sets.sentinel(min_replicas=1),
    "cluster": redis_sets.cluster,
    "partition": partitioned,
}


async def one(name: str, plan: Plan, course: Course, only: list[str] | None = None) -> Report:
    """One run on a fresh deployment."""
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(SETS[name]())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llorch-chaos-")))
        places = redis.places if isinstance(redis, PartitionedSet) else None
        if places is not None:  # the real worker would have to be on a cable too, with its engine
            plan, course = replace(plan, real_worker=False), replace(course, demo_clients=0)
        faults = faults_of(redis.name, real_worker=plan.real_worker)
        faults = {kind: fault for kind, fault in faults.items() if only is None or kind in only}
        clean = False
        try:
            async with town_of(redis, plan, folder, places) as town:
                report = await chaos_run(town, faults, course, folder)
            report.topology = name
            clean = not report.failures()
            return report
        finally:
            if not clean:
                _keep(folder, redis, name)


def _keep(folder: Path, redis: redis_sets.RedisSet, name: str) -> None:
    kept = Path(tempfile.mkdtemp(prefix=f"llorch-chaos-{name}-"))
    for path in folder.glob("*.*"):
        path.rename(kept / path.name)
    for server in redis.servers:
        shutil.copy(server.folder / "server.log", kept / f"redis-{server.port}.log")
    print(f"logs and ledger are kept in {kept}")


def main() -> int:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description="Chaos runs")
    parser.add_argument("--set", action="append", choices=sorted(SETS), help="default: every one")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--slots", type=int, default=50)
    parser.add_argument("--token-ms", type=float, default=150.0)
    parser.add_argument("--gap-s", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest-pause-s", type=float, default=30.0)
    parser.add_argument("--no-real-worker", action="store_true")
    parser.add_argument("--fault", action="append", help="only these kinds")
    parser.add_argument("--report-dir", type=Path, default=Path())
    args = parser.parse_args()
    real = not args.no_real_worker
    plan = Plan(args.replicas, args.workers, args.slots, args.token_ms, real_worker=real)
    course = Course(
        args.minutes * 60, args.clients, 4 if real else 0, args.seed, args.gap_s,
        longest_redis_pause_s=args.longest_pause_s,
    )  # fmt: skip
    failed = False
    for name in args.set or sorted(SETS):
        report = asyncio.run(one(name, plan, course, args.fault))
        report.write(args.report_dir / f"chaos-report-{name}.json")
        print(report.table(), flush=True)
        failed = failed or bool(report.failures())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
