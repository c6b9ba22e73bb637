"""What orchestratord adds: the same streams through it and straight from the worker, side by side in one run.

Starts a real stack (embedded Redis, orchestratord, one worker with the demo model) and a second worker like the first
that no orchestrator knows (one that knew it would cancel what it didn't send). Each round streams the same tasks both
ways, in alternating order; a figure is the median over rounds. CPU is what the kernel charged to orchestratord and
to Redis (with its supervisor), per token relayed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from bench.report import last_line, table, where, write_section
from llorch_wire.sse import SseParser
from tests.support.stack import Stack, free_port

PROMPT = "Once upon a time"


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[float, int, float]:
    """(seconds to the first token, tokens, seconds in all) of one stream."""
    begun = time.perf_counter()
    first, tokens = None, 0
    headers = {"Accept": "text/event-stream"}
    async with session.post(url, json=body, headers=headers) as reply:
        assert reply.status == 200, await reply.text()
        parser = SseParser()
        async for chunk in reply.content.iter_any():
            for event in parser.feed(chunk):
                if event.event == "token":
                    tokens += 1
                    first = first or time.perf_counter() - begun
                assert event.event != "error", event.data
    assert first is not None
    return first, tokens, time.perf_counter() - begun


async def direct(session: aiohttp.ClientSession, worker: str, seed: int, tokens: int) -> tuple[float, int, float]:
    task_id = str(uuid.uuid4())
    body = {"task_id": task_id, "attempt": 1, "prompt": PROMPT, "seed": seed, "max_tokens": tokens, "ignore_eos": True}
    result = await stream(session, f"{worker}/execute", body)
    async with session.post(f"{worker}/ack", json={"task_id": task_id, "attempt": 1}) as reply:
        await reply.read()
    return result


async def relayed(session: aiohttp.ClientSession, url: str, seed: int, tokens: int) -> tuple[float, int, float]:
    body = {"model": "demo", "prompt": PROMPT, "seed": seed, "max_tokens": tokens, "ignore_eos": True}
    return await stream(session, f"{url}/v2/tasks", body)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of its children that run now."""
    parent = psutil.Process(pid)
    times = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
    return sum(t.user + t.system for t in times)


@contextlib.contextmanager
def lone_worker(folder: Path, slots: int) -> Iterator[str]:
    """URL of a worker that serves whoever asks."""
    ready, port = folder / "lone.json", free_port()
    command = [sys.executable, "-m", "worker", "--model", "demo", "--worker-id", "lone", "--port", str(port)]
    command += ["--ready-file", str(ready), "--slots", str(slots), "--threads", "1"]
    with (folder / "lone.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + 120
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the lone worker didn't start:\n{(folder / 'lone.log').read_text()[-2000:]}")
                time.sleep(0.05)
            yield json.loads(ready.read_text())["url"]
        finally:
            process.terminate()
            process.wait(30)


async def one_round(stack: Stack, worker: str, concurrency: int, tokens: int, seed: int, via: bool) -> dict[str, float]:
    parts = stack.parts()
    pids = {"orchestratord": parts["orchestratord"]["pid"], "redis": parts["redis"]["pid"]}
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    begun = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        one = (
            (lambda n: relayed(session, stack.url, seed + n, tokens))
            if via
            else (lambda n: direct(session, worker, seed + n, tokens))
        )
        results = await asyncio.gather(*(one(n) for n in range(concurrency)))
    elapsed = time.perf_counter() - begun
    total = sum(count for _, count, _ in results)
    used = {f"{name}_us": (cpu_seconds(pid) - before[name]) / total * 1e6 for name, pid in pids.items()}
    return {"ttft_ms": statistics.median(first for first, _, _ in results) * 1000, "tokens_s": total / elapsed, **used}


async def measure(stack: Stack, worker: str, concurrency: int, tokens: int, rounds: int) -> dict[str, float]:
    collected: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for number in range(-1, rounds):  # round -1 warms both ways up
        for via in (True, False) if number % 2 else (False, True):
            result = await one_round(stack, worker, concurrency, tokens, 1000 * (number + 2), via)
            if number >= 0:
                collected[via].append(result)
        print(f"  {concurrency} streams, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    through = {key: statistics.median(r[key] for r in collected[True]) for key in collected[True][0]}
    straight = {key: statistics.median(r[key] for r in collected[False]) for key in collected[False][0]}
    added = statistics.median(
        a["ttft_ms"] - b["ttft_ms"] for a, b in zip(collected[True], collected[False], strict=True)
    )
    rate = statistics.median(
        a["tokens_s"] / b["tokens_s"] for a, b in zip(collected[True], collected[False], strict=True)
    )
    return {
        "concurrency": concurrency,
        "ttft_direct_ms": straight["ttft_ms"],
        "ttft_relayed_ms": through["ttft_ms"],
        "added_ttft_ms": added,
        "throughput_ratio": rate,
        "tokens_s": through["tokens_s"],
        "orchestratord_us_per_token": through["orchestratord_us"],
        "redis_us_per_token": through["redis_us"],
        "cpu_us_per_token": through["orchestratord_us"] + through["redis_us"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llorch-bench-") as folder:
        slots = max(args.concurrency)
        stack = Stack(Path(folder), extra=("--slots", str(slots), "--threads", "1"))
        stack.start()
        try:
            with lone_worker(Path(folder), slots) as lone:
                results = [asyncio.run(measure(stack, lone, c, args.tokens, args.rounds)) for c in args.concurrency]
        finally:
            stack.stop()
    rows = [
        [
            f"{r['concurrency']:.0f}",
            f"{r['ttft_direct_ms']:.1f}",
            f"{r['ttft_relayed_ms']:.1f}",
            f"{r['added_ttft_ms']:+.1f}",
            f"{r['throughput_ratio']:.2f}",
            f"{r['orchestratord_us_per_token']:.0f}",
            f"{r['redis_us_per_token']:.0f}",
            f"{r['cpu_us_per_token']:.0f}",
        ]
        for r in results
    ]
    header = ["streams", "TTFT direct, ms", "TTFT relayed, ms", "added, ms", "tokens/s relayed ÷ direct"]
    header += ["orchestratord, CPU µs/token", "Redis, CPU µs/token", "both"]
    text = table(header, rows)
    print(text)
    write_section(
        "relay",
        "## What orchestratord adds\n\n"
        f"`make bench`: {args.tokens} tokens a stream, demo model, one worker, embedded Redis with `appendfsync\n"
        f"always`, medians of {args.rounds} alternating rounds; each task is admitted, queued, claimed and logged\n"
        "before its tokens are shown.\n\n"
        f"{text}\n\n{where()}",
    )
    last_line({"benchmark": "relay", "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
