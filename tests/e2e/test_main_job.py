"""The main job, whole: curl-like clients, a real stack, a real model, and SIGKILL at the worst moments."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.support.stack import Stack, Transcript, post_task, read_events

pytestmark = pytest.mark.e2e

NUM_TASKS = 50
MAX_TOKENS = 48


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = Stack(tmp_path_factory.mktemp("stack"))
    running.start()
    yield running
    running.stop()


def bodies(run: str) -> list[dict[str, object]]:
    """Fifty different tasks with fixed seeds; `run` only tells runs apart in their metadata."""
    openings = ("Once upon a time", "The little fox", "One day, a robot", "In a quiet village", "A small boat")
    return [
        {
            "prompt": openings[n % len(openings)],
            "seed": 1000 + n,
            "temperature": 0.9,
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
            "metadata": {"run": run},
        }
        for n in range(NUM_TASKS)
    ]


async def submit_all(session: aiohttp.ClientSession, stack: Stack, run: str) -> list[Transcript]:
    answers = [await post_task(session, stack.url, **body) for body in bodies(run)]
    return [Transcript(answer["task_id"]) for answer in answers]


async def finish_all(session: aiohttp.ClientSession, stack: Stack, transcripts: list[Transcript]) -> None:
    await asyncio.gather(*(transcript.follow(session, stack.url) for transcript in transcripts))


async def until_tokens(transcripts: list[Transcript], count: int) -> None:
    async with asyncio.timeout(60):
        while sum(len(transcript.tokens) for transcript in transcripts) < count:
            await asyncio.sleep(0.01)


def check_against(reference: list[Transcript], transcripts: list[Transcript]) -> None:
    for expected, got in zip(reference, transcripts, strict=True):
        assert got.terminal is not None and got.terminal[0] == "end", got.terminal
        assert got.terminal[1]["tokens_out"] == len(got.tokens) == MAX_TOKENS
        assert got.tokens == expected.tokens
        assert got.text == expected.text
        assert sum(name in ("end", "error") for name in got.names) == 1


async def test_events_in_order_and_a_second_reader_gets_exactly_the_rest(stack: Stack) -> None:
    async with aiohttp.ClientSession() as session:
        task = await post_task(session, stack.url, prompt="Once upon a time", seed=7, max_tokens=60, ignore_eos=True)
        events = []
        second: asyncio.Task[list[tuple[str, bytes]]] | None = None

        async def rest_after(cursor: str) -> list[tuple[str, bytes]]:
            return [(e.event, e.data) async for e in read_events(session, stack.url, task["task_id"], cursor)]

        async for event in read_events(session, stack.url, task["task_id"]):
            events.append(event)
            if event.event == "token" and json.loads(event.data)["i"] == 5:
                assert event.id is not None
                second = asyncio.create_task(rest_after(event.id))
        named = [event for event in events if event.event != "metrics"]
        assert [event.event for event in named[:2]] == ["queued", "started"]
        assert [event.event for event in named[2:]] == ["token"] * 60 + ["end"]
        assert [json.loads(event.data)["i"] for event in named[2:-1]] == list(range(60))
        rest = [(event.event, event.data) for event in named[8:]]
        assert second is not None
        assert [pair for pair in await second if pair[0] != "metrics"] == rest
        after_the_end = await rest_after(str(named[7].id))
        assert [pair for pair in after_the_end if pair[0] != "metrics"] == rest
        async with session.get(f"{stack.url}/v2/tasks/{task['task_id']}") as reply:
            view = await reply.json()
        assert view["status"] == "completed"
        assert view["text"] == "".join(json.loads(event.data)["t"] for event in named[2:-1])


async def test_fifty_queued_tasks_survive_kill_9_of_orchestratord_and_of_everything(stack: Stack) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        reference = await submit_all(session, stack, "undisturbed")
        await finish_all(session, stack, reference)

        transcripts = await submit_all(session, stack, "orchestratord killed")
        readers = asyncio.create_task(finish_all(session, stack, transcripts))
        await until_tokens(transcripts, 100)
        assert sum(t.terminal is None for t in transcripts) > 25, "the kill must strike while most tasks wait or run"
        await stack.kill_and_wait_restarted("orchestratord")
        await readers
        check_against(reference, transcripts)
        assert sum(t.reconnections for t in transcripts) > 0

        transcripts = await submit_all(session, stack, "everything killed")
        readers = asyncio.create_task(finish_all(session, stack, transcripts))
        await until_tokens(transcripts, 100)
        assert sum(t.terminal is None for t in transcripts) > 25
        await asyncio.to_thread(stack.kill_everything)
        await asyncio.to_thread(stack.start)
        await readers
        check_against(reference, transcripts)


async def test_killed_worker_and_killed_redis_lose_nothing(stack: Stack) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        reference = await submit_all(session, stack, "undisturbed")
        await finish_all(session, stack, reference)
        for part in ("worker0", "redis"):
            transcripts = await submit_all(session, stack, f"{part} killed")
            readers = asyncio.create_task(finish_all(session, stack, transcripts))
            await until_tokens(transcripts, 100)
            await stack.kill_and_wait_restarted(part)
            await readers
            check_against(reference, transcripts)


async def test_a_clean_stop_and_a_new_start_go_on_where_they_stopped(tmp_path: Path) -> None:
    first = Stack(tmp_path)
    first.start()
    try:
        async with aiohttp.ClientSession() as session:
            transcripts = await submit_all(session, first, "stopped")
            await asyncio.to_thread(first.stop)
            first.start()
            await finish_all(session, first, transcripts)
            assert all(t.terminal is not None and t.terminal[0] == "end" for t in transcripts)
            assert all(len(t.tokens) == MAX_TOKENS for t in transcripts)
    finally:
        first.stop()
