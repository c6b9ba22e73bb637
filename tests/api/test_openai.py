"""The official OpenAI client against `/v1`, and what its library never sends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import aiohttp
import openai
import pytest

from llorch_wire.errors import ApiError, ErrorCode
from llorch_wire.events import ErrorEvent
from tests.api.harness import WORDS, MemoryOrchestrator, golden, until

STORY = "".join(WORDS)
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A story, please."}]
TASK_ID = "00000000-0000-0000-0000-000000000001"


@pytest.fixture
async def client(server: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="anything", max_retries=0, timeout=20) as made:
        yield made


async def test_models(client: openai.AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["demo"]
    assert (await client.models.retrieve("demo")).owned_by == "llorch"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("org/nothing")
    assert caught.value.code == "model_not_found"


async def test_a_chat_streamed_equals_the_chat_unstreamed(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="demo", messages=MESSAGES, seed=3, max_completion_tokens=50)
    assert whole.object == "chat.completion" and whole.id == f"chatcmpl-{TASK_ID}"
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", STORY, "stop")
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (4, 9, 13)
    assert whole.usage.prompt_tokens_details is not None and whole.usage.prompt_tokens_details.cached_tokens == 1
    stream = await client.chat.completions.create(
        model="demo", messages=MESSAGES, seed=3, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == STORY
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_length_is_a_finish_reason(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=2)
    assert whole.choices[0].finish_reason == "length"
    text = await client.completions.create(model="demo", prompt="Once", max_tokens=2)
    assert (text.object, text.choices[0].text, text.choices[0].finish_reason) == (
        "text_completion",
        "Once upon",
        "length",
    )


async def test_n_choices_have_their_own_seeds(client: openai.AsyncOpenAI, memory: MemoryOrchestrator) -> None:
    whole = await client.chat.completions.create(model="demo", messages=MESSAGES, n=3, seed=5)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    seeds = [task.seed for task in memory.tasks_by_id.values()]
    assert seeds[0] == 5 and len(set(seeds)) == 3 and all(0 <= seed < 2**63 for seed in seeds)
    assert whole.usage is not None and (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (4, 27)
    stream = await client.chat.completions.create(model="demo", messages=MESSAGES, n=3, seed=5, stream=True)
    texts = ["", "", ""]
    finished = [0, 0, 0]
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finished[choice.index] += choice.finish_reason is not None
    assert (texts, finished) == ([STORY] * 3, [1] * 3)
    assert [task.seed for task in memory.tasks_by_id.values()][3:] == seeds


async def test_prompts_of_every_kind(client: openai.AsyncOpenAI, memory: MemoryOrchestrator) -> None:
    many = await client.completions.create(model="demo", prompt=["Once", "Twice"], n=2, max_tokens=1)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert [task.request.prompt for task in memory.tasks_by_id.values()] == ["Once", "Once", "Twice", "Twice"]
    assert many.usage is not None and (many.usage.prompt_tokens, many.usage.completion_tokens) == (8, 4)
    await client.completions.create(model="demo", prompt=[1, 2, 3])
    await client.completions.create(model="demo", prompt=[[1, 2], [3]])
    last = [task.request.prompt_token_ids for task in memory.tasks_by_id.values()][4:]
    assert last == [[1, 2, 3], [1, 2], [3]]
    assert {task.request.max_tokens for task in memory.tasks_by_id.values()} == {1, 16}


async def test_logprobs(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(
        model="demo", messages=MESSAGES, logprobs=True, top_logprobs=2, max_tokens=2
    )
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [(item.token, item.logprob) for item in logprobs.content] == [("Once", -0.5), (" upon", -0.5)]
    assert bytes(logprobs.content[0].bytes or []) == b"Once"
    assert [top.token for top in logprobs.content[0].top_logprobs] == ["Once", "alt1"]
    text = await client.completions.create(model="demo", prompt="x", logprobs=2, max_tokens=2)
    shown = text.choices[0].logprobs
    assert shown is not None
    assert (shown.tokens, shown.text_offset) == (["Once", " upon"], [0, 4])
    assert shown.top_logprobs == [{"Once": -0.5, "alt1": -1.5}, {" upon": -0.5, "alt1": -1.5}]
    streamed = await client.completions.create(model="demo", prompt="x", logprobs=0, max_tokens=2, stream=True)
    offsets = [c.choices[0].logprobs.text_offset async for c in streamed if c.choices and c.choices[0].logprobs]
    assert offsets == [[0], [4]]


@pytest.mark.parametrize("top_logprobs", [0, 3])
@pytest.mark.parametrize("reason", ["EOS", "STOP_SEQUENCE"])
async def test_logprobs_are_of_the_answers_tokens_alone(
    client: openai.AsyncOpenAI, memory: MemoryOrchestrator, top_logprobs: int, reason: Literal["EOS", "STOP_SEQUENCE"]
) -> None:
    """As a worker tells it: the last two tokens have texts of their own, and nothing of them is in the answer."""
    parts = [("Once", "Once"), (" upon", " upon"), ("EN", ""), ("D", "")] if reason != "EOS" else [
        ("Once", ""), (" upon", "Once upon"), ("<|end|>", "")
    ]  # fmt: skip
    memory.parts, memory.end_with = parts, reason

    async def tokens(**options: Any) -> tuple[str, list[str]]:
        reply = await client.chat.completions.create(
            model="demo", messages=MESSAGES, logprobs=True, top_logprobs=top_logprobs, **options
        )
        if not options:
            choice = reply.choices[0]
            return choice.message.content or "", [item.token for item in choice.logprobs.content]
        text, names = "", list[str]()
        async for chunk in reply:
            text += chunk.choices[0].delta.content or ""
            if chunk.choices[0].logprobs is not None:
                names += [item.token for item in chunk.choices[0].logprobs.content]
        return text, names

    for options in ({}, {"stream": True}):
        content, names = await tokens(**options)
        assert content == "Once upon" == "".join(names)
        assert len(names) == 2
        if top_logprobs:
            assert names == ["Once", " upon"]
    text = await client.completions.create(model="demo", prompt="x", logprobs=top_logprobs)
    shown = text.choices[0].logprobs
    assert shown is not None and shown.tokens is not None and shown.text_offset is not None
    assert "".join(shown.tokens) == text.choices[0].text == "Once upon"
    assert len(shown.text_offset) == len(shown.token_logprobs or ()) == 2


async def test_fields_reach_the_task(client: openai.AsyncOpenAI, memory: MemoryOrchestrator) -> None:
    await client.chat.completions.create(
        model="demo", messages=MESSAGES, stop="\n", temperature=0.5, top_p=0.9, seed=1, presence_penalty=0.1,
        frequency_penalty=-0.1, logit_bias={"5": -100}, user="u1", metadata={"k": "v"}, prompt_cache_key="s1",
        extra_body={"top_k": 5, "min_p": 0.1, "priority": "batch",
                    "placement": {"mode": "prefer", "prefer_pools": ["a"]},
                    "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [3], "deadline_ms": 60000,
                    "repetition_penalty": 1.1},
    )  # fmt: skip
    request = memory.tasks_by_id[TASK_ID].request
    assert request.stop == ["\n"] and request.logit_bias == {"5": -100} and request.priority == "batch"
    assert request.session_id == "s1" and request.metadata == {"k": "v"} and request.on_disconnect == "cancel"
    assert request.placement.prefer_pools == ["a"] and request.top_k == 5 and request.deadline_ms == 60000


async def test_messages_that_the_client_itself_made_are_taken_back(client: openai.AsyncOpenAI) -> None:
    first = await client.chat.completions.create(model="demo", messages=MESSAGES)
    said = first.choices[0].message
    again: list[Any] = [
        *MESSAGES,
        said,
        {**said.model_dump(), "annotations": [], "tool_calls": []},
        {"role": "user", "content": [{"type": "text", "text": "More"}]},
    ]
    assert (await client.chat.completions.create(model="demo", messages=again)).choices[0].message.content == STORY


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "a", "format": "wav"}}, "audio"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"store": True}, "store"),
        ({"best_of": 2}, "best_of"),
        ({"n": 0}, "n"),
        ({"n": 33}, "n"),
        ({"temperature": 9}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"temprature": 1}, "temprature"),
        ({"stop": list("abcdefghi")}, "stop"),
        ({"stop": 5}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages.0.content.0"),
        ({"prompt": "x"}, "prompt"),
    ],
)  # fmt: skip
async def test_what_is_not_there_is_refused_by_name(
    client: openai.AsyncOpenAI, memory: MemoryOrchestrator, changes: dict[str, Any], param: str
) -> None:
    body = {"model": "demo", "messages": MESSAGES, **changes}
    with pytest.raises(openai.BadRequestError) as caught:
        await client.post("/chat/completions", body=body, cast_to=object)
    assert (caught.value.param, caught.value.type, caught.value.code) == (
        param,
        "invalid_request_error",
        "invalid_value",
    ), caught.value.message
    assert param.split(".")[0] in caught.value.message
    assert memory.calls == 0


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"echo": True}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 128, "n": 2}, "n"),
        ({"prompt": [[-1]]}, "prompt.0"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"tools": [{}]}, "tools"),
        ({"messages": MESSAGES}, "messages"),
    ],
)
async def test_what_completions_have_not_is_refused_by_name(
    client: openai.AsyncOpenAI, memory: MemoryOrchestrator, changes: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.post("/completions", body={"model": "demo", "prompt": "x", **changes}, cast_to=object)
    assert caught.value.param == param, caught.value.message
    assert memory.calls == 0


async def test_values_that_ask_for_nothing_are_taken(client: openai.AsyncOpenAI) -> None:
    nothing = {
        "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"], "store": False,
        "service_tier": "auto", "audio": None, "functions": None, "seed": None, "stop": None, "n": None, "user": "me",
        "stream_options": None, "logit_bias": None, "parallel_tool_calls": None, "verbosity": "medium",
    }  # fmt: skip
    reply = await client.post(
        "/chat/completions", body={"model": "demo", "messages": MESSAGES, **nothing}, cast_to=object
    )
    assert isinstance(reply, dict)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("MODEL_NOT_FOUND", openai.NotFoundError),
        ("QUEUE_FULL", openai.RateLimitError),
        ("STORE_UNAVAILABLE", openai.InternalServerError),
        ("UNAUTHORIZED", openai.AuthenticationError),
        ("FORBIDDEN", openai.PermissionDeniedError),
        ("CONFLICT", openai.ConflictError),
    ],
)
async def test_refusals_become_the_clients_own_exceptions(
    client: openai.AsyncOpenAI, memory: MemoryOrchestrator, code: str, kind: type[openai.APIStatusError]
) -> None:
    memory.refuse_with = ApiError(ErrorCode(code), "no")
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(model="demo", messages=MESSAGES, stream=stream)
        assert caught.value.request_id
        assert ("retry-after" in caught.value.response.headers) is (code in ("QUEUE_FULL", "STORE_UNAVAILABLE"))


async def test_a_prompt_too_long_is_a_400_streamed_or_not(
    client: openai.AsyncOpenAI, memory: MemoryOrchestrator
) -> None:
    memory.fail_with = ErrorEvent(code="CONTEXT_LENGTH_EXCEEDED", message="the prompt has 9000 tokens", param="prompt")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="demo", messages=MESSAGES, stream=stream)
        assert caught.value.code == "context_length_exceeded"


async def test_one_failure_of_n_cancels_the_others(client: openai.AsyncOpenAI, memory: MemoryOrchestrator) -> None:
    memory.fail_with = ErrorEvent(code="VRAM_OOM", message="out of memory", retriable=True)
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model="demo", messages=MESSAGES, n=2)
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model="demo", messages=MESSAGES, n=2, stream=True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_client_that_leaves_cancels_its_tasks(
    client: openai.AsyncOpenAI, memory: MemoryOrchestrator, stream: bool, n: int
) -> None:
    memory.hold = True
    call = asyncio.ensure_future(client.chat.completions.create(model="demo", messages=MESSAGES, stream=stream, n=n))
    await until(lambda: len(memory.tasks_by_id) == n and all(task.readers for task in memory.tasks_by_id.values()))
    call.cancel()
    await until(lambda: all(task.cancelled and not task.readers for task in memory.tasks_by_id.values()))
    assert sorted(memory.left) == sorted(memory.tasks_by_id)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stopping_replica_says_so(client: openai.AsyncOpenAI, memory: MemoryOrchestrator, stream: bool) -> None:
    memory.hold = True
    call = asyncio.ensure_future(client.chat.completions.create(model="demo", messages=MESSAGES, stream=stream))
    await until(lambda: any(task.readers for task in memory.tasks_by_id.values()))
    memory.state = "draining"
    memory.tasks_by_id[TASK_ID].released.set()
    with pytest.raises(openai.InternalServerError) as caught:
        await call
    assert (caught.value.status_code, caught.value.code) == (503, "draining")
    await until(lambda: memory.left == [TASK_ID])


async def test_an_idempotency_key_makes_the_same_tasks(client: openai.AsyncOpenAI, memory: MemoryOrchestrator) -> None:
    ids = {
        (
            await client.chat.completions.create(
                model="demo", messages=MESSAGES, n=2, extra_headers={"Idempotency-Key": "k"}
            )
        ).id
        for _ in range(2)
    }
    assert len(ids) == 1 and len(memory.tasks_by_id) == 2


@pytest.mark.parametrize("path", ["embeddings", "responses", "files", "batches", "batches/b1/cancel", "audio/speech"])
async def test_endpoints_that_are_not_there_say_so(server: str, http: aiohttp.ClientSession, path: str) -> None:
    async with http.post(f"{server}/v1/{path}", json={}) as reply:
        error = (await reply.json())["error"]
        assert reply.status == 404 and error["type"] == "invalid_request_error" and error["message"]


async def test_bad_bodies_have_openais_shape(server: str, http: aiohttp.ClientSession) -> None:
    async with http.post(f"{server}/v1/chat/completions", data=b"{") as reply:
        assert reply.status == 400
        assert set((await reply.json())["error"]) == {"message", "type", "param", "code"}
    async with http.get(f"{server}/v1/chat/completions") as reply:
        assert reply.status == 405 and (await reply.json())["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("name", "path", "body"),
    [
        ("chat", "chat/completions", {"messages": MESSAGES, "stream_options": {"include_usage": True}}),
        ("chat_logprobs", "chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1}),
        ("completion", "completions", {"prompt": "x"}),
    ],
)
async def test_golden_transcripts(
    server: str, http: aiohttp.ClientSession, name: str, path: str, body: dict[str, Any]
) -> None:
    body = {"model": "demo", "stream": True, "max_tokens": 2, "seed": 1, **body}
    async with http.post(f"{server}/v1/{path}", json=body) as reply:
        transcript = await reply.read()
    assert transcript == golden(name, transcript)
    assert transcript.endswith(b"data: [DONE]\n\n")
    for line in transcript.decode().split("\n\n")[:-2]:
        json.loads(line.removeprefix("data: "))


@pytest.fixture
def sync_client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="anything", max_retries=0, timeout=20) as made:
        yield made


async def test_the_synchronous_client(sync_client: openai.OpenAI) -> None:
    def use() -> tuple[str, str]:
        whole = sync_client.chat.completions.create(model="demo", messages=MESSAGES, seed=1)
        streamed = sync_client.completions.create(model="demo", prompt="x", seed=1, stream=True)
        return whole.choices[0].message.content or "", "".join(chunk.choices[0].text for chunk in streamed)

    assert await asyncio.to_thread(use) == (STORY, STORY)
