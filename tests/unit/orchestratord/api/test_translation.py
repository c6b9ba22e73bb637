"""`/v1` bodies → tasks, and the pure shapes of answers."""

from __future__ import annotations

from typing import Any

import pytest

from llorch_wire.errors import STATUS, ApiError, ErrorCode
from llorch_wire.events import EndEvent, TokenEvent, TopLogprob
from orchestratord.api.errors import error_object, error_response, from_event, openai_error_object
from orchestratord.api.openai.logprobs import Shown
from orchestratord.api.openai.requests import derived_seed, parse_chat, parse_completion
from orchestratord.api.openai.shapes import CompletionShape, Head, Part, finish_reason, usage_of

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def test_the_first_choice_has_the_requests_own_seed() -> None:
    seeds = [derived_seed(7, choice) for choice in range(32)]
    assert seeds[0] == 7 and len(set(seeds)) == 32 and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [derived_seed(7, choice) for choice in range(32)]
    assert [task.seed for task in parse_chat({**CHAT, "n": 3}).tasks] == [None, None, None]


def test_null_is_the_same_as_nothing() -> None:
    nulls = dict.fromkeys(("temperature", "n", "stop", "tools", "logprobs", "stream", "max_tokens", "whatever"))
    assert parse_chat({**CHAT, **nulls}) == parse_chat(CHAT)


def test_max_completion_tokens_is_max_tokens() -> None:
    assert parse_chat({**CHAT, "max_completion_tokens": 5}).tasks == parse_chat({**CHAT, "max_tokens": 5}).tasks


def test_prompt_cache_key_is_the_session_unless_one_is_named() -> None:
    assert parse_chat({**CHAT, "prompt_cache_key": "a"}).tasks[0].session_id == "a"
    assert parse_chat({**CHAT, "prompt_cache_key": "a", "session_id": "b"}).tasks[0].session_id == "b"


@pytest.mark.parametrize("value", [1, 1.0, "1", [1], {}, 0])
def test_harmless_values_are_compared_by_type(value: object) -> None:
    """`store: 0` and `false` are equal in Python, `best_of: true` and 1 as well."""
    with pytest.raises(ApiError):
        parse_chat({**CHAT, "store": value})
    with pytest.raises(ApiError):
        parse_completion({"model": "m", "prompt": "x", "best_of": True})


def test_an_unknown_field_isnt_quoted_when_it_is_no_name() -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat({**CHAT, "a secret\nprompt": 1})
    assert caught.value.param == "body" and "secret" not in caught.value.message


def test_usage_counts_a_prompt_once() -> None:
    ends = [EndEvent(stop_reason="EOS", tokens_in=10 + n // 2, tokens_out=n, cached_tokens=1) for n in range(4)]
    usage = usage_of(ends, 2)
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (21, 6, 27)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


@pytest.mark.parametrize(("reason", "word"), [("EOS", "stop"), ("STOP_SEQUENCE", "stop"), ("MAX_TOKENS", "length")])
def test_finish_reasons(reason: Any, word: str) -> None:
    assert finish_reason(EndEvent(stop_reason=reason, tokens_in=1, tokens_out=1)) == word


def test_offsets_go_on_from_chunk_to_chunk() -> None:
    top = (TopLogprob(id=1, t="x", logprob=-3.0),)
    tokens = [TokenEvent(t="é", i=0, id=9, logprob=-0.1, top=top), TokenEvent(t="!", i=1, id=4, logprob=-0.2)]
    shape = CompletionShape(logprobs=True)
    seen: list[Any] = []
    for token in tokens:
        chunk = shape.chunk(Head("id", 1, "m"), 0, Part(token.t, [Shown(token.t, token)]))
        seen.append(chunk["choices"][0]["logprobs"])
    assert [one["tokens"] for one in seen] == [["é"], ["!"]]
    assert [one["text_offset"] for one in seen] == [[0], [1]]
    assert seen[0]["top_logprobs"] == [{"x": -3.0}]


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_code_has_a_status_and_both_shapes(code: ErrorCode) -> None:
    error = ApiError(code, "words", param="field")
    for openai in (False, True):
        response = error_response(error, openai=openai)
        assert response.status_code == STATUS[code]
        assert ("Retry-After" in response.headers) is (STATUS[code] in (429, 503))
    assert error_object(error)["retriable"] is error.retriable
    assert set(openai_error_object(error)) == {"message", "type", "param", "code"}


def test_an_unknown_code_of_an_event_is_internal() -> None:
    from llorch_wire.events import ErrorEvent

    error = from_event(ErrorEvent(code="NEWER_THAN_THIS", message="words", retriable=True))
    assert (error.code, error.message) == (ErrorCode.INTERNAL, "words")


def test_retry_after_is_whole_seconds_rounded_up() -> None:
    for ms, seconds in ((1, "1"), (1000, "1"), (1001, "2"), (0, "1")):
        response = error_response(ApiError(ErrorCode.QUEUE_FULL, "full", retry_after_ms=ms), openai=False)
        assert (response.headers["Retry-After"], response.headers["X-Backoff-Ms"]) == (seconds, str(ms))
