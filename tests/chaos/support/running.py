"""One chaos run from start to verdict. Read `chaos_run`.

start the town → references of the real model → clients, and faults on them → heal → every task ends → look at all
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from llorch_wire.events import decode_task_event, encode_data
from llorch_wire.sse import SseParser
from orchestratord.store.errors import StoreUnavailableError
from orchestratord.store.types import LogEntry
from tests.chaos.support import ledger as ledgers
from tests.chaos.support.clients import TROUBLE, Clients, Load
from tests.chaos.support.ledger import Ledger
from tests.chaos.support.report import Report, Strike
from tests.chaos.support.scene import Fault, Scene
from tests.chaos.support.town import CLIENT_KEY, DEMO, Town
from tests.chaos.support.verdict import Reference, Transcript, judge, judge_log, reference_key, transcripts

DEMO_BODIES: list[dict[str, Any]] = [
    {"model": DEMO, "prompt": prompt, "max_tokens": 48, "seed": seed, "temperature": 0.8, "ignore_eos": True}
    for seed, prompt in enumerate(["Once upon a time", "The little boat", "One day a girl", "In the garden"])
]


@dataclass(frozen=True)
class Course:
    """How long and how hard."""

    seconds: float = 45.0
    clients: int = 50
    demo_clients: int = 0
    seed: int = 1
    gap_s: float = 2.5
    settle_s: float = 90.0
    load: Load = field(default_factory=Load)
    longest_redis_pause_s: float = 5.0
    audit_every_s: float = 8.0
    pure: bool = True
    """Whether a token depends on seed and position alone, so that every text has a reference."""


async def chaos_run(town: Town, faults: Mapping[str, Fault], course: Course, folder: Path) -> Report:
    """Load and faults for `course.seconds`, then the verdict. The town must be running."""
    report = Report(
        topology=town.redis.name, seed=course.seed, seconds=course.seconds, clients=course.clients,
        replicas=len(town.replicas), workers=len(town.workers) + (town.real is not None), kinds_due=sorted(faults),
    )  # fmt: skip
    references = await undisturbed(town, DEMO_BODIES) if course.demo_clients else {}
    ledger = Ledger(folder / "ledger.jsonl")
    clients = Clients(town.urls, ledger, course.seed, course.load, prompts=DEMO_BODIES)
    scene = Scene(town, clients, random.Random(course.seed), course.longest_redis_pause_s)
    try:
        async with _beside(ledger.run(), _audits(town, report, course.audit_every_s)):
            running = asyncio.create_task(clients.run(course.clients, course.demo_clients))
            try:
                await _strike(scene, faults, course, report, running)
                clients.stopping.set()
                await asyncio.wait({running}, timeout=course.settle_s)
            finally:
                running.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await running
        await _look(town, clients, report)
    finally:
        ledger.close()
    verdict = judge(ledgers.read(ledger.path), references, may_roll_back=town.redis.may_roll_back, pure=course.pure)
    for name in ("acknowledged", "completed", "cancelled", "tokens", "migrations", *verdict.BROKEN):
        setattr(report, name, getattr(verdict, name))
    report.rolled_back_tasks = verdict.rolled_back
    report.not_on_disk = [f"{name}: {missing}" for name, missing in scene.missing]
    report.rolled_back_in_files = [
        {"by": name, "tasks": len(missing.tasks), "events": missing.events, "ends": len(missing.ends)}
        for name, missing in scene.rolled_back
    ]
    found = transcripts(ledgers.read(ledger.path))
    report.log_differs = await _compare_logs(town, found, references, pure=course.pure)
    return report


@contextlib.asynccontextmanager
async def _beside(*work: Any) -> AsyncGenerator[None]:
    """These run for as long as the body does."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


async def _audits(town: Town, report: Report, every_s: float) -> None:
    """Invariants hold at every instant, not only at the end."""
    while True:
        await asyncio.sleep(every_s)
        try:
            findings = await town.store.audit(logs=False)
        except StoreUnavailableError:
            continue
        if len(report.audit) < 20:
            report.audit += [f"in mid-run: {finding}" for finding in findings]


# ---- faults


async def _strike(
    scene: Scene, faults: Mapping[str, Fault], course: Course, report: Report, running: asyncio.Task[None]
) -> None:
    """Faults until the time is over and each kind has struck; returns when all have healed."""
    begun = time.monotonic()
    rng = scene.rng
    queue: list[str] = []
    async with asyncio.TaskGroup() as group:
        await asyncio.sleep(min(3.0, course.seconds / 10))
        while not running.done():
            left = course.seconds - (time.monotonic() - begun)
            outstanding = set(faults) - {strike.kind for strike in report.strikes}
            if left <= 0 and (not outstanding or left < -60):
                break
            if not queue:
                queue = list(faults if left > 0 else outstanding)
                rng.shuffle(queue)
            if faults:
                kind = queue.pop()
                group.create_task(_one_strike(scene, kind, faults[kind], report, begun, course.clients // 5))
            gap_s = course.gap_s * rng.uniform(0.6, 1.4)
            await asyncio.sleep(min(gap_s, left) if left > 0 else gap_s)
    if running.done() and not running.cancelled():
        running.result()


async def _one_strike(scene: Scene, kind: str, fault: Fault, report: Report, begun: float, least: int) -> None:
    """Wait for streams to strike at, and strike."""
    waited = time.monotonic()
    while scene.clients.streams_in_flight() < least and time.monotonic() - waited < 10:
        await asyncio.sleep(0.05)
    at = time.monotonic()
    strike = Strike(kind, round(at - begun, 2), scene.clients.streams_in_flight())
    detail = await fault(scene)
    if detail is not None:
        strike.detail, strike.lasted_s = detail, round(time.monotonic() - at, 2)
        report.strikes.append(strike)


# ---- afterwards


async def _look(town: Town, clients: Clients, report: Report) -> None:
    """Quiet must come: no slot taken at any worker or in Redis, a clean audit, logs without complaints."""
    report.reconnections, report.posts_refused = clients.reconnections, clients.posts_refused
    report.take_pauses(clients.pauses)
    report.unexpected_answers = clients.unexpected
    try:
        if town.redis.may_roll_back:
            report.undone_commands = await _undrain_again(town)
        await town.all_ready(60)
    except TimeoutError as error:
        report.complaints.append(f"not everything came back: {error}")
    report.leaked_slots = await _until_empty(lambda: _slots_taken(town), 20.0)
    report.audit += await _until_empty(lambda: _findings(town), 5.0)
    report.complaints += town.complaints()
    report.adopted = _adopted(town)


async def _undrain_again(town: Town) -> list[str]:
    """An operator looks whether a command still stands after a failover, as docs/guarantees.md advises."""
    undone: list[str] = []
    with contextlib.suppress(StoreUnavailableError):  # what doesn't come back is found next
        for view in await town.store.workers():
            if view.state == "draining":
                await town.operate(f"/v2/workers/{view.worker_id}/undrain")
                undone.append(f"undrain of {view.worker_id}")
    return undone


async def _until_empty(look: Any, deadline_s: float) -> list[str]:
    """What is still found at the deadline; [] as soon as nothing is."""
    end = time.monotonic() + deadline_s
    while True:
        try:
            found: list[str] = await look()
        except (StoreUnavailableError, aiohttp.ClientError, OSError, TimeoutError) as error:
            found = [f"can't be looked at: {type(error).__name__}"]
        if not found or time.monotonic() > end:
            return found
        await asyncio.sleep(0.2)


async def _slots_taken(town: Town) -> list[str]:
    found = [
        f"{view.worker_id}: {view.slots_used} slots used in Redis"
        for view in await town.store.workers()
        if view.slots_used
    ]
    for number, part in enumerate(town.workers):
        stats = await town.worker_says(number, "/scripted/stats")
        if stats["running"]:
            found.append(f"{part.name}: {stats['running']} generations run there")
    return found


async def _findings(town: Town) -> list[str]:
    return [str(finding) for finding in await town.store.audit()]


def _adopted(town: Town) -> int:
    total = 0
    for part in town.replicas:
        for line in part.log_file.read_text(errors="replace").splitlines():
            if '"adopted"' in line:
                total += int(orjson.loads(line).get("tasks", 0))
    return total


async def _compare_logs(
    town: Town, found: Mapping[str, Transcript], references: Mapping[str, Reference], *, pure: bool
) -> list[str]:
    """Every log says what its client got, and what the undisturbed run gave: no more, no less, and one end."""
    differing: list[str] = []
    for one in found.values():
        if not one.acked or (one.terminal is None and not one.over) or len(differing) >= 20:
            continue
        tokens: list[tuple[int, str]] = []
        ends: list[dict[str, Any]] = []
        after = "0-0"
        if town.redis.may_roll_back and await town.store.log_bounds(one.task_id) is None:
            continue  # undone as a whole, after its end
        while entries := await town.store.read_log(one.task_id, after=after):
            for entry in entries:
                for token in entry.tokens:
                    if token.i == len(tokens):  # two owners of one attempt may both have written a piece
                        tokens.append((token.id, token.t))
                if entry.kind in ("end", "error"):
                    ends.append(_rendered(entry))
            after = entries[-1].position
        wrong = judge_log(one, references, tokens, ends) if pure else None
        if wrong is None and one.terminal is not None and not town.redis.may_roll_back:
            if tokens != list(one.tokens.values()):
                wrong = f"the log has {len(tokens)} tokens, the client {len(one.tokens)}"
            elif ends[0] != one.terminal[1]:
                wrong = f"the log ends with {ends[0]}, the client got {one.terminal[1]}"
        if wrong is not None:
            differing.append(f"{one.task_id}: {wrong}")
    return differing


def _rendered(entry: LogEntry) -> dict[str, Any]:
    """A terminal event as a client gets it."""
    event = decode_task_event(entry.kind, entry.data)
    assert event is not None
    return orjson.loads(encode_data(event))


# ---- references


async def undisturbed(town: Town, bodies: list[dict[str, Any]]) -> dict[str, Reference]:
    """Answers of requests while nothing is broken, by `reference_key`."""
    answers = await asyncio.gather(*(_answer(town, body) for body in bodies))
    return {reference_key(body): answer for body, answer in zip(bodies, answers, strict=True)}


async def _answer(town: Town, body: dict[str, Any]) -> Reference:
    headers = {"Authorization": f"Bearer {CLIENT_KEY}", "Accept": "text/event-stream"}
    tokens: list[tuple[int, str]] = []
    timeout = aiohttp.ClientTimeout(total=120)
    async with town.session.post(f"{town.urls[0]}/v2/tasks", json=body, headers=headers, timeout=timeout) as reply:
        assert reply.status == 200, await reply.text()
        parser = SseParser()
        async for chunk in reply.content.iter_any():
            for frame in parser.feed(chunk):
                data = orjson.loads(frame.data)
                if frame.event == "token":
                    tokens.append((data["id"], data["t"]))
                assert frame.event != "error", data
                if frame.event == "end":
                    return tokens, data["stop_reason"]
    raise AssertionError(f"the stream of {body} ended without an end")


__all__ = ["TROUBLE", "Course", "chaos_run", "undisturbed"]
