"""The messages between the programs: what they take, what they refuse, and that a refusal quotes nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llorch_wire.errors import RETRIABLE, STATUS, ErrorCode
from llorch_wire.events import (
    EndEvent,
    ErrorEvent,
    TokenEvent,
    decode_task_event,
    decode_worker_event,
    encode_data,
    parse_position,
    start_position,
    terminal_position,
    token_position,
)
from llorch_wire.sse import KEEP_ALIVE, SseOverflowError, SseParser, frame
from llorch_wire.tasks import TaskRequest, problems
from llorch_wire.worker import ExecuteRequest, WorkerRegistration

SECRET = "my very private prompt"


def first_problem(body: dict[str, Any]) -> tuple[str | None, str]:
    with pytest.raises(ValidationError) as caught:
        TaskRequest.model_validate(body)
    found = problems(caught.value)
    assert all(SECRET not in problem.message for problem in found)
    return found[0].field, found[0].message


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"messages": [{"role": "user", "content": SECRET}]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"seed": 1.0}, "seed"),
        ({"stop": ["a"] * 9}, "stop"),
        ({"stop": ["a\0"]}, "stop.0"),
        ({"prompt": SECRET + "\0"}, "prompt"),
        ({"prompt": SECRET + "\ud800"}, "prompt"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias.a"),
        ({"logit_bias": {"1": 101.0}}, "logit_bias.1"),
        ({"logit_bias": {"5": 100.0, "05": -100.0}}, "logit_bias.05"),
        ({"repetition_penalty": 0.0009}, "repetition_penalty"),
        ({"metadata": {"k": SECRET * 100}}, "metadata.k"),
        ({"placement": {"mode": "prefer"}}, "placement"),
        ({"callback_url": "ftp://" + "a" * 9}, "callback_url"),
        ({"task_id": "not-a-uuid"}, "task_id"),
        ({"promt": SECRET}, "promt"),
        ({"priority": "urgent"}, "priority"),
    ],
)
def test_a_bad_field_is_named_and_nothing_is_quoted(changes: dict[str, Any], field: str) -> None:
    assert first_problem({"model": "m", "prompt": SECRET, **changes})[0] == field


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task_id": "not-a-uuid"}, "`task_id`: must be a UUID"),
        ({"logit_bias": {"05": 1.0}}, "`logit_bias.05`: must be a token id"),
        ({"callback_url": "ftp://" + "a" * 9}, "`callback_url`: must begin with http:// or https://"),
    ],
)
def test_a_pattern_is_told_in_words(changes: dict[str, Any], words: str) -> None:
    message = first_problem({"model": "m", "prompt": SECRET, **changes})[1]
    assert message.startswith(words) and "^" not in message


@pytest.mark.parametrize("key", ["\u0663", "1\n", "-1", "+1", "1_0", "", "1234567890"])
def test_a_token_id_is_spelled_in_one_way(key: str) -> None:
    field = first_problem({"model": "m", "prompt": SECRET, "logit_bias": {key: 1.0}})[0]
    assert field is not None and field.startswith("logit_bias")


def test_model_ref_is_model() -> None:
    assert TaskRequest.model_validate({"model_ref": "m", "prompt": "x"}).model == "m"


def test_every_input_is_taken() -> None:
    for one in (
        {"prompt": "x"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        {"prompt_token_ids": [1]},
    ):
        TaskRequest.model_validate({"model": "m", **one})


@given(st.integers(1, 2**53 - 2), st.integers(0, 2**31))
def test_positions_order_as_events_do(attempt: int, index: int) -> None:
    start, token, end = start_position(attempt, index), token_position(attempt, index), terminal_position(attempt)
    assert parse_position("0-1") < parse_position(start) < parse_position(token) < parse_position(end)
    assert parse_position(end) < parse_position(start_position(attempt + 1))


@given(st.text(max_size=40))
def test_what_is_no_position_is_a_value_error(text: str) -> None:
    try:
        attempt, number = parse_position(text)
    except ValueError:
        return
    assert 0 <= attempt < 2**53 and 0 <= number < 2**64


events_of_a_stream = st.lists(
    st.tuples(
        st.builds(
            TokenEvent,
            t=st.text(),
            i=st.integers(0, 2**31),
            id=st.integers(0, 2**31),
            logprob=st.none() | st.floats(-100, 0),
        ),
        st.none() | st.just("1-5"),
    ),
    max_size=8,
)


@given(events_of_a_stream, st.lists(st.integers(1, 50), min_size=1), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_frames_survive_any_chunking_and_any_line_end(
    events: list[tuple[TokenEvent, str | None]], cuts: list[int], newline: bytes
) -> None:
    wire = b"".join(frame("token", encode_data(event), position) + KEEP_ALIVE for event, position in events)
    wire = wire.replace(b"\n", newline)
    parser, read, at, turn = SseParser(), [], 0, 0
    while at < len(wire):
        step = cuts[turn % len(cuts)]
        read += parser.feed(wire[at : at + step])
        at, turn = at + step, turn + 1
    if newline == b"\r":
        read += parser.feed(b"")
    assert [decode_task_event(f.event, f.data) for f in read] == [event for event, _ in events]


def test_an_endless_event_is_refused() -> None:
    parser = SseParser(max_event_bytes=100)
    with pytest.raises(SseOverflowError):
        parser.feed(b"data: " + b"x" * 200)
    parser = SseParser(max_event_bytes=100)
    with pytest.raises(SseOverflowError):
        for _ in range(30):
            parser.feed(b"data: xxxxxxxx\n")


def test_unknown_events_are_none_and_known_ones_come_back() -> None:
    assert decode_task_event("from_the_future", b"{}") is None
    assert decode_worker_event("from_the_future", b"{}") is None
    end = EndEvent(stop_reason="EOS", tokens_in=1, tokens_out=2)
    assert decode_task_event("end", encode_data(end)) == end
    error = encode_data(ErrorEvent(code="INTERNAL", message="m"))
    assert b'"retriable":false' in error, "clients rely on this field being there"


def test_every_code_has_a_status() -> None:
    assert set(STATUS) == set(ErrorCode) and set(ErrorCode) >= RETRIABLE
    assert all(STATUS[code] >= 429 for code in RETRIABLE)


def test_a_newer_worker_may_say_more_but_a_request_may_not() -> None:
    registration = {
        "worker_id": "w", "instance_id": "i", "url": "http://h:1", "model": "m", "model_digest": "d", "dtype": "f",
        "device": "cpu", "context_length": 1, "slots_total": 1, "from_the_future": 1,
    }  # fmt: skip
    assert WorkerRegistration.model_validate(registration).pool == "local"
    for url in ("h:1", "http://h/path", "http://a b", "file:///x"):
        with pytest.raises(ValidationError):
            WorkerRegistration.model_validate({**registration, "url": url})
    with pytest.raises(ValidationError):
        ExecuteRequest.model_validate(
            {"task_id": "6a1f0c5e-3f0a-4f6e-9a51-2f4f6a1f9d10", "attempt": 1, "prompt": "x", "new": 1}
        )


def test_attaching_needs_no_input() -> None:
    body: dict[str, Any] = {"task_id": "6a1f0c5e-3f0a-4f6e-9a51-2f4f6a1f9d10", "attempt": 1}
    with pytest.raises(ValidationError):
        ExecuteRequest.model_validate(body)
    assert ExecuteRequest.model_validate({**body, "attach_instance_id": "i"}).attach_instance_id == "i"
