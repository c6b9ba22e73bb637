"""How long a stream pauses when what serves it dies: `python -m tests.chaos.latency --rounds 5`.

20 streams, so that the processor isn't the limit. A round kills the replica that relays every task and that all
clients read from; or one of the two workers; or stops it, so that its sockets stay open. A sample is the time from the
signal to a client's next token; after a replica's death only one that comes over a new connection, to another one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import statistics
import sys
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp
import orjson

from llorch_wire.sse import SseParser
from tests.chaos.support import redis_sets
from tests.chaos.support.town import CLIENT_KEY, SCRIPTED, Plan, Town, town_of

STREAMS = 20
PLAN = Plan(replicas=3, workers=2, slots=STREAMS, token_ms=25)
VICTIM = 0
Case = Literal["replica_kill", "worker_kill", "worker_stop"]
CASES: tuple[Case, ...] = ("replica_kill", "worker_kill", "worker_stop")


@dataclass
class Figures:
    """Seconds from the fault to the next token, over all streams that it hit, and what was computed twice."""

    samples: dict[str, list[float]] = field(default_factory=lambda: {case: [] for case in CASES})
    recomputed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CASES, 0))
    relayed_by_the_victim: list[int] = field(default_factory=list)

    def p95(self, case: Case) -> float:
        """The 95th percentile."""
        return statistics.quantiles(self.samples[case], n=20, method="inclusive")[-1]

    def table(self) -> str:
        """For people."""
        lines = [f"{'fault':<14}{'streams':>8}{'median':>9}{'p95':>9}{'longest':>9}{'tokens computed twice':>24}"]
        for case in CASES:
            if values := self.samples[case]:
                lines.append(
                    f"{case:<14}{len(values):>8}{statistics.median(values):>8.2f}s{self.p95(case):>8.2f}s"
                    f"{max(values):>8.2f}s{self.recomputed[case]:>24}"
                )
        return "\n".join(lines)


class Reader:
    """One client of one task."""

    def __init__(self, task_id: str, home: int) -> None:
        self.task_id, self.home = task_id, home
        self.cursor: str | None = None
        self.next_index = 0
        self.worker = ""
        self.resumed_at: float | None = None
        """When the first token after the fault came."""
        self.fault_at: float | None = None
        self.elsewhere = False
        """Only what comes over a new connection counts."""

    async def run(self, town: Town) -> None:
        """Read for ever; on a break go on at the next replica."""
        replica = self.home
        headers = {"Authorization": f"Bearer {CLIENT_KEY}"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=1, sock_read=3)
        while True:
            url = f"{town.urls[replica]}/v2/tasks/{self.task_id}/events"
            last = {} if self.cursor is None else {"Last-Event-ID": self.cursor}
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with town.session.get(url, headers=headers | last, timeout=timeout) as reply:
                    opened_at = time.monotonic()
                    parser = SseParser()
                    async for chunk in reply.content.iter_any():
                        for frame in parser.feed(chunk):
                            self._take(frame.event, frame.id, orjson.loads(frame.data), opened_at)
            replica = (replica + 1) % len(town.urls)
            await asyncio.sleep(0.02)

    def _take(self, name: str, position: str | None, data: dict[str, Any], opened_at: float) -> None:
        self.cursor = position or self.cursor
        if name in ("started", "migrated"):
            self.worker = data["worker_id"]
        elif name == "token":
            assert data["i"] == self.next_index, f"{self.task_id}: token {data['i']} where {self.next_index} was due"
            self.next_index += 1
            if self.fault_at is None or self.resumed_at is not None:
                return
            if not self.elsewhere or opened_at > self.fault_at:
                self.resumed_at = time.monotonic()

    def hit(self, elsewhere: bool) -> None:
        """The fault is now."""
        self.fault_at, self.resumed_at, self.elsewhere = time.monotonic(), None, elsewhere


async def measure(rounds: int, folder: Path, cases: tuple[Case, ...] = CASES) -> Figures:
    """So many rounds of each fault."""
    figures = Figures()
    with redis_sets.plain() as redis:
        async with town_of(redis, PLAN, folder) as town:
            for case in cases:
                for number in range(rounds):
                    await _round(town, case, number, figures)
    return figures


async def _round(town: Town, case: Case, number: int, figures: Figures) -> None:
    await town.all_ready()
    readers = [Reader(task_id, VICTIM) for task_id in await _submit_all(town, number)]
    async with _beside(readers, town):
        await _until(lambda: all(reader.next_index > 10 for reader in readers), "every stream flows")
        if case == "replica_kill":
            owned = await town.store.owned("replica-0")
            figures.relayed_by_the_victim.append(len(owned))
            victim, hit = town.replicas[VICTIM], readers
        else:
            victim = town.workers[VICTIM]
            hit = [reader for reader in readers if reader.worker == victim.name]
            assert hit
        if case == "worker_stop":
            victim.send(signal.SIGSTOP)
        else:
            victim.send(signal.SIGKILL)
        for reader in hit:
            reader.hit(elsewhere=case == "replica_kill")
        await _until(lambda: all(reader.resumed_at is not None for reader in hit), "every stream goes on")
    figures.samples[case] += [(reader.resumed_at or 0) - (reader.fault_at or 0) for reader in hit]
    if case == "worker_stop":
        victim.send(signal.SIGCONT)
    else:
        victim.kill()
        victim.spawn()
    await town.all_ready()
    figures.recomputed[case] += await _computed_twice(town, {reader.task_id for reader in readers})
    for reader in readers:
        await _cancel(town, reader.task_id)


async def _computed_twice(town: Town, task_ids: set[str]) -> int:
    """By the workers' own count, as far as they live."""
    seen: set[tuple[str, int]] = set()
    twice = 0
    for number in range(len(town.workers)):
        for task_id, _, first, end in await town.worker_says(number, "/scripted/computed"):
            for index in range(first, end) if task_id in task_ids else ():
                twice += (task_id, index) in seen
                seen.add((task_id, index))
    return twice


@contextlib.asynccontextmanager
async def _beside(readers: list[Reader], town: Town) -> Any:
    tasks = [asyncio.create_task(reader.run(town)) for reader in readers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


async def _submit_all(town: Town, number: int) -> list[str]:
    """Through the victim, which relays them all: the others are stopped for a moment, shorter than their leases."""
    others = [part for place, part in enumerate(town.replicas) if place != VICTIM]
    for part in others:
        part.send(signal.SIGSTOP)
    try:
        task_ids = [await _submit(town, number * 100 + i) for i in range(STREAMS)]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while len(await town.store.owned("replica-0")) < STREAMS:
                    await asyncio.sleep(0.01)
    finally:
        for part in others:
            part.send(signal.SIGCONT)
    return task_ids


async def _submit(town: Town, seed: int) -> str:
    body = {
        "task_id": str(uuid.uuid4()), "model": SCRIPTED, "prompt": "latency", "max_tokens": 4000, "seed": seed,
        "ignore_eos": True,
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {CLIENT_KEY}"}
    async with town.session.post(f"{town.urls[VICTIM]}/v2/tasks", json=body, headers=headers) as reply:
        assert reply.status == 202, await reply.text()
        return (await reply.json())["task_id"]


async def _cancel(town: Town, task_id: str) -> None:
    headers = {"Authorization": f"Bearer {CLIENT_KEY}"}
    async with town.session.post(f"{town.urls[-1]}/v2/tasks/{task_id}/cancel", headers=headers) as reply:
        assert reply.status == 200, await reply.text()


async def _until(condition: Any, what: str, deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        await asyncio.sleep(0.01)


def main() -> int:
    """Print the table; exit status 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description="Pauses of streams when a replica or a worker dies")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", type=Path, default=Path("chaos-report-latency.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llorch-chaos-") as folder:
        figures = asyncio.run(measure(args.rounds, Path(folder)))
    args.report.write_text(json.dumps(asdict(figures), indent=1) + "\n")
    print(figures.table())
    return int(figures.p95("replica_kill") > 3 or figures.p95("worker_kill") > 5 or figures.recomputed["replica_kill"])


if __name__ == "__main__":
    sys.exit(main())
