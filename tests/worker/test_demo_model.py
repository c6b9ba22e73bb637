"""The real engine on the demo model: equal to transformers, to itself in company, and to itself across moves."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from llorch_demo import MODEL_DIR
from tests.support.worker_process import WorkerProcess, execute, health, post, request, until_health

pytestmark = pytest.mark.e2e

MAX_TOKENS = 40
PROMPTS = [
    "Once upon a time",
    "One day, a robot",
    "The little fox",
    "In a quiet village",
    "A small boat",
    "The old clock said",
    "Mia looked at the moon",
    "There was a dragon who",
    "Why did the owl",
    "Far away,",
    "It rained all day and",
    "The bear and the bee",
    "Under the bridge",
    "Nobody knew that",
    "Every evening",
    "The king had a",
    "Tom found a",
    "At the end of the garden",
    "x",
    "Once upon a time, there was a little girl who lived near a forest. She had a red scarf, and every morning she",
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def demo(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WorkerProcess]:
    folder = tmp_path_factory.mktemp("demo")
    worker = WorkerProcess(folder, "--model", "demo", "--slots", "16", "--threads", "1")
    try:
        yield await worker.start()
    finally:
        status = await worker.stop()
    assert status == 0


@pytest.fixture(scope="module")
def reference() -> list[list[int]]:
    """Greedy answers of transformers' own `generate`, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    answers: list[list[int]] = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            whole = model.generate(**ids, max_new_tokens=MAX_TOKENS, do_sample=False)
        answers.append(whole[0, ids["input_ids"].shape[1] :].tolist())
    return answers


def greedy(prompt: str) -> dict[str, Any]:
    return request(prompt=prompt, temperature=0, max_tokens=MAX_TOKENS)


async def test_greedy_equals_transformers_alone(
    demo: WorkerProcess, session: aiohttp.ClientSession, reference: list[list[int]]
) -> None:
    for prompt, expected in zip(PROMPTS, reference, strict=True):
        stream = await execute(session, demo.url, greedy(prompt))
        stream.check()
        assert stream.ids == expected, prompt
        assert stream.end["tokens_out"] == len(expected)


async def test_greedy_equals_transformers_sixteen_at_a_time(
    demo: WorkerProcess, session: aiohttp.ClientSession, reference: list[list[int]]
) -> None:
    places = asyncio.Semaphore(16)

    async def one(prompt: str) -> list[int]:
        async with places:
            return (await execute(session, demo.url, greedy(prompt))).ids

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(prompt)) for prompt in PROMPTS]
    assert [task.result() for task in tasks] == reference


async def test_a_seeded_answer_continues_exactly_from_every_n(
    demo: WorkerProcess, session: aiohttp.ClientSession
) -> None:
    sampling = {
        "prompt": "Once upon a time",
        "seed": 4242,
        "temperature": 0.9,
        "top_p": 0.95,
        "top_k": 50,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "max_tokens": 24,
        "ignore_eos": True,
        "stop": [" never in this story"],
    }
    whole = await execute(session, demo.url, request(**sampling))
    assert len(whole.ids) == 24

    async def rest(n: int) -> None:
        stream = await execute(session, demo.url, request(**sampling, resume_token_ids=whole.ids[:n]))
        stream.check(first_index=n)
        assert whole.tokens[:n] + stream.tokens == whole.tokens, n

    async with asyncio.TaskGroup() as group:
        for n in (0, 1, 2, 5, 8, 13, 21, 23, 24):
            group.create_task(rest(n))


async def test_text_is_what_the_tokenizer_says(demo: WorkerProcess, session: aiohttp.ClientSession) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    hot = request(prompt="x", temperature=2.0, max_tokens=200, ignore_eos=True, seed=99)
    stream = await execute(session, demo.url, hot)
    assert stream.text == tokenizer.decode(stream.ids, skip_special_tokens=True)


async def test_a_chat_ends_by_itself(demo: WorkerProcess, session: aiohttp.ClientSession) -> None:
    messages = [{"role": "user", "content": "Tell me a story about a fox."}]
    stream = await execute(session, demo.url, request(messages=messages, temperature=0, max_tokens=600))
    assert stream.end["stop_reason"] == "EOS"
    assert "<|" not in stream.text


async def test_cancel_while_sixteen_run(demo: WorkerProcess, session: aiohttp.ClientSession) -> None:
    bodies = [request(seed=n, max_tokens=2000, ignore_eos=True) for n in range(16)]
    running = [asyncio.create_task(execute(session, demo.url, body)) for body in bodies]
    await until_health(session, demo.url, lambda state: state["slots_free"] == 0)
    assert (await execute(session, demo.url, request())).status == 503
    for body in bodies:
        await post(session, demo.url, "/cancel", {"task_id": body["task_id"], "attempt": 1})
    for stream in await asyncio.gather(*running):
        stream.check()
        assert stream.end["stop_reason"] == "CANCELLED"
    assert (await health(session, demo.url))["slots_free"] == 16
    assert (await execute(session, demo.url, request(max_tokens=3))).end["tokens_out"] == 3


async def test_kill_9_of_the_engine_under_load_and_a_move(demo: WorkerProcess, session: aiohttp.ClientSession) -> None:
    body = request(seed=7, max_tokens=60, ignore_eos=True)
    whole = await execute(session, demo.url, body)
    again = {**body, "attempt": 2}
    seen = asyncio.Event()

    def notice(name: str, data: dict[str, Any]) -> None:
        if name == "token" and data["i"] >= 10:
            seen.set()

    running = asyncio.create_task(execute(session, demo.url, again, on_event=notice))
    await asyncio.wait_for(seen.wait(), 60)
    os.kill(demo.engine_pid(), signal.SIGKILL)
    broken = await running
    assert broken.terminal[0] == "error" and broken.terminal[1]["retriable"]
    await until_health(session, demo.url, lambda state: state["status"] == "ready", 120)
    rest = await execute(session, demo.url, {**body, "attempt": 3, "resume_token_ids": broken.ids})
    assert broken.tokens + rest.tokens == whole.tokens


async def test_the_long_prompt_is_cached_the_second_time(demo: WorkerProcess, session: aiohttp.ClientSession) -> None:
    ids = [5 + (n * 37) % 2000 for n in range(600)]
    first = await execute(session, demo.url, request(prompt_token_ids=ids, temperature=0, max_tokens=4))
    second = await execute(session, demo.url, request(prompt_token_ids=ids, temperature=0, max_tokens=4))
    assert second.ids == first.ids
    assert second.end["cached_tokens"] > first.end["cached_tokens"]


async def test_the_context_to_its_last_token(demo: WorkerProcess, session: aiohttp.ClientSession) -> None:
    context = (await health(session, demo.url))["context_length"]
    ids = [5 + (n * 37) % 2000 for n in range(context - 1)]
    stream = await execute(session, demo.url, request(prompt_token_ids=ids, max_tokens=1))
    assert stream.end["tokens_out"] == 1
    over = await execute(session, demo.url, request(prompt_token_ids=[*ids, 5], max_tokens=1))
    assert (over.status, over.refusal["code"]) == (400, "CONTEXT_LENGTH_EXCEEDED")
