"""Minutes of mixed load on one real worker, and whether its memory stays flat. `make soak`.

Every few hundred milliseconds a client streams an answer, drops a stream in the middle, cancels one, sends rubbish, or
resumes an answer that it has the beginning of. The resident memory of the HTTP process and of the engine process is
sampled; after a warm-up (caches that fill up to their bounds) a line is fitted through the samples. The last line of
the output is JSON; the exit status is 1 if memory grew or a request went wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression, median
from typing import Any
from uuid import uuid4

import aiohttp
import psutil

from bench.report import last_line, table, where, write_section
from tests.support.worker_process import WorkerProcess, execute, health, post, request, until_health

WARM_UP_SHARE = 0.3
KV_MEMORY = 32 * 2**20
"""Small, so that all of the cache has been written to before the warm-up ends."""
LARGEST_GROWTH_MB = 24.0
"""What the medians of the first and the last third after the warm-up may differ by: allocators breathe by as much."""
BAD_BODIES = (
    b"{",
    b'{"task_id": "no uuid"}',
    b'{"prompt_token_ids": [999999999]}',
    b"\xff\xfe",
)
WORDS = "once upon a time the little dog saw her big red ball and they all went home to play with mum".split()


@dataclass
class Sample:
    """Seconds since the start, and MiB that the two processes keep in memory."""

    at_s: float
    http_mb: float
    engine_mb: float


@dataclass
class Load:
    """Clients of one worker, and what became of their requests."""

    session: aiohttp.ClientSession
    url: str
    draw: random.Random
    done: Counter[str] = field(default_factory=Counter[str])
    tokens: int = 0

    async def client(self, until: float, pause_s: float) -> None:
        """One client: a request, a pause, and again."""
        while time.monotonic() < until:
            kind = self.draw.choices(("whole", "dropped", "cancelled", "bad", "resumed"), (55, 15, 12, 8, 10))[0]
            await getattr(self, f"_{kind}")()
            self.done[kind] += 1
            await asyncio.sleep(self.draw.uniform(0, 2 * pause_s))

    def _body(self) -> dict[str, Any]:
        return request(
            prompt=" ".join(self.draw.choice(WORDS) for _ in range(self.draw.randint(1, 120))),
            max_tokens=self.draw.randint(1, 96),
            temperature=self.draw.choice((0.0, 0.8, 1.2)),
            top_p=self.draw.choice((1.0, 0.9)),
            repetition_penalty=self.draw.choice((1.0, 1.1)),
            seed=self.draw.randrange(2**31),
            ignore_eos=True,
        )

    async def _whole(self) -> None:
        body = self._body()
        stream = await execute(self.session, self.url, body)
        assert stream.status == 200, stream.refusal
        stream.check()
        self.tokens += len(stream.tokens)
        await self._acknowledge(body)

    async def _dropped(self) -> None:
        body = self._body()
        stream = await execute(self.session, self.url, body, stop_after=self.draw.randint(1, 20))
        self.tokens += len(stream.tokens)
        await self._cancel(body)

    async def _cancelled(self) -> None:
        body = self._body()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(execute(self.session, self.url, body))
            await asyncio.sleep(self.draw.uniform(0, 0.3))
            await self._cancel(body)
        self.tokens += len(running.result().tokens)

    async def _bad(self) -> None:
        stream = await execute(self.session, self.url, self.draw.choice(BAD_BODIES))
        assert 400 <= stream.status < 500, stream.status

    async def _resumed(self) -> None:
        body = {**self._body(), "max_tokens": 40}
        first = await execute(self.session, self.url, body)
        assert first.status == 200, first.refusal
        await self._acknowledge(body)
        kept = first.ids[: self.draw.randint(1, 39)]
        again = request(**{**body, "task_id": str(uuid4()), "resume_token_ids": kept})
        second = await execute(self.session, self.url, again)
        assert second.status == 200, second.refusal
        assert kept + second.ids == first.ids, "a resumed answer differs"
        self.tokens += len(first.tokens) + len(second.tokens)
        await self._acknowledge(again)

    async def _acknowledge(self, body: dict[str, Any]) -> None:
        await post(self.session, self.url, "/ack", {"task_id": body["task_id"], "attempt": body["attempt"]})

    async def _cancel(self, body: dict[str, Any]) -> None:
        await post(self.session, self.url, "/cancel", {"task_id": body["task_id"], "attempt": body["attempt"]})


async def sample(pids: tuple[int, int], until: float, every_s: float) -> list[Sample]:
    """Resident memory of (HTTP process, engine) until then."""
    http, engine = (psutil.Process(pid) for pid in pids)
    begun = time.monotonic()
    samples: list[Sample] = []
    while time.monotonic() < until:
        at_s = time.monotonic() - begun
        samples.append(Sample(at_s, http.memory_info().rss / 2**20, engine.memory_info().rss / 2**20))
        await asyncio.sleep(every_s)
    return samples


def verdict(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """By process: first and last MiB, the largest, growth after the warm-up, and its slope in MiB an hour."""
    settled = [s for s in samples if s.at_s >= WARM_UP_SHARE * samples[-1].at_s]
    third = max(1, len(settled) // 3)
    found: dict[str, dict[str, float]] = {}
    for name in ("http", "engine"):
        values = [getattr(s, f"{name}_mb") for s in samples]
        late = [getattr(s, f"{name}_mb") for s in settled]
        slope = linear_regression([s.at_s / 3600 for s in settled], late).slope if len(settled) > 1 else 0.0
        found[name] = {
            "first_mb": round(values[0], 1),
            "settled_mb": round(late[0], 1),
            "last_mb": round(values[-1], 1),
            "largest_mb": round(max(values), 1),
            "growth_mb": round(median(late[-third:]) - median(late[:third]), 2),
            "slope_mb_per_hour": round(slope, 2),
        }
    return found


async def run(minutes: float, clients: int, pause_s: float, folder: Path) -> dict[str, Any]:
    """Start a worker, load it, watch it, stop it."""
    flags = ("--model", "demo", "--slots", "8", "--threads", "1", "--kv-memory", str(KV_MEMORY))
    worker = WorkerProcess(folder, *flags)
    await worker.start()
    until = time.monotonic() + minutes * 60
    try:
        pids = worker.pid, worker.engine_pid()
        async with aiohttp.ClientSession() as session:
            load = Load(session, worker.url, random.Random(0))
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(sample(pids, until, max(0.5, minutes * 60 / 200)))
                for _ in range(clients):
                    group.create_task(load.client(until, pause_s))
            idle = await until_health(session, worker.url, lambda state: state["slots_free"] == state["slots_total"])
            state = await health(session, worker.url)
        assert worker.engine_pid() == pids[1], "the engine was restarted"
    finally:
        status = await worker.stop()
    samples = watch.result()
    return {
        "minutes": minutes,
        "requests": dict(sorted(load.done.items())),
        "tokens": load.tokens,
        "memory": verdict(samples),
        "samples": [[round(s.at_s), round(s.http_mb, 1), round(s.engine_mb, 1)] for s in samples],
        "slots_free": idle["slots_free"],
        "kv_blocks_free": state.get("kv_blocks_free"),
        "exit_status": status,
    }


def plot(samples: list[list[float]], path: Path) -> None:
    """Memory over time, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.5))
    for index, name in ((1, "HTTP process"), (2, "engine process")):
        axes.plot([s[0] / 60 for s in samples], [s[index] for s in samples], label=name)
    axes.set_xlabel("minutes")
    axes.set_ylabel("MiB resident")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(result: dict[str, Any]) -> str:
    """The section of docs/benchmarks.md."""
    rows = [
        [
            {"http": "HTTP process", "engine": "engine process"}[name],
            *(f"{memory[key]:.1f}" for key in ("first_mb", "settled_mb", "last_mb", "largest_mb", "growth_mb")),
            f"{memory['slope_mb_per_hour']:+.1f}",
        ]
        for name, memory in result["memory"].items()
    ]
    header = ["", "start", f"after {WARM_UP_SHARE:.0%}", "end", "largest", "growth since", "slope per hour"]
    total = sum(result["requests"].values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in result["requests"].items())
    return (
        f"## Memory of a worker under load\n\n`make soak MINUTES={result['minutes']:g}`: demo model, one thread, a KV "
        f"cache of {KV_MEMORY >> 20} MiB; {total} requests ({kinds}), {result['tokens']} tokens; MiB resident.\n\n"
        f"{table(header, rows)}\n\n{where()}"
    )


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--pause-s", type=float, default=0.5, help="mean pause of a client between two requests")
    parser.add_argument("--plot", type=Path, help="write a PNG (needs matplotlib)")
    parser.add_argument("--write-docs", action="store_true", help="write the section of docs/benchmarks.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = asyncio.run(run(args.minutes, args.clients, args.pause_s, Path(scratch)))
    print(report(result))
    if args.plot is not None:
        plot(result["samples"], args.plot)
    if args.write_docs:
        write_section("soak", report(result))
    flat = all(memory["growth_mb"] <= LARGEST_GROWTH_MB for memory in result["memory"].values())
    last_line({**result, "flat": flat})
    return 0 if flat and result["exit_status"] == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
