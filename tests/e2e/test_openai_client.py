"""The official openai client against a real stack: models, chat, completions, streams, usage, n, stop, errors."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.support.stack import Stack

pytestmark = pytest.mark.e2e

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me a story about a fox."}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    stack = Stack(tmp_path_factory.mktemp("stack"))
    stack.start()
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="unused", max_retries=0, timeout=60) as made:
        yield made
    stack.stop()


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def test_streamed_chat_equals_unstreamed_with_the_same_seed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=MESSAGES, seed=5, max_tokens=60)
    text, finish, usage, roles = "", None, None, []
    for chunk in client.chat.completions.create(
        model="demo", messages=MESSAGES, seed=5, max_tokens=60, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
            roles += [choice.delta.role] if choice.delta.role else []
    assert whole.choices[0].message.content == text
    assert text
    assert whole.choices[0].finish_reason == finish
    assert roles == ["assistant"]
    assert usage is not None and whole.usage is not None
    assert usage == whole.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_completions_stop_n_and_logprobs(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt="Once upon a time", seed=3, max_tokens=40, logprobs=2)
    streamed = client.completions.create(model="demo", prompt="Once upon a time", seed=3, max_tokens=40, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == whole.choices[0].text
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and whole.usage is not None
    assert len(logprobs.token_logprobs) == whole.usage.completion_tokens
    assert all(value <= 0 for value in logprobs.token_logprobs if value is not None)
    stopped = client.completions.create(model="demo", prompt="Once upon a time", seed=3, max_tokens=40, stop=["."])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == whole.choices[0].text.split(".")[0]
    several = client.chat.completions.create(model="demo", messages=MESSAGES, n=3, seed=9, max_tokens=20)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in several.choices}) == 3


def test_errors_are_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="known models: `demo`"):
        client.chat.completions.create(model="nothing-like-it", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as hot:
        client.chat.completions.create(model="demo", messages=MESSAGES, temperature=9)
    assert hot.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="demo", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="demo", prompt="Once upon a time. " * 3000, max_tokens=5)
    assert long.value.code == "context_length_exceeded"
