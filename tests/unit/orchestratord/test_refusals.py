from __future__ import annotations

import pytest

from llorch_wire.events import ErrorEvent
from orchestratord.outcomes import Faulted, TurnedAway
from orchestratord.refusals import ended_by_refusal, is_worth_a_retry, turned_away, without_quotes
from orchestratord.worker_client import WorkerFault, WorkerRefusal

PAYLOAD = b'{"model":"m","prompt":"attack the northern castle at dawn","max_tokens":5}'


def test_a_too_long_prompt_keeps_its_figures() -> None:
    fault = WorkerFault("prompt", "context_length", "`prompt`: 900 tokens leave no room; send at most 511")
    event = ended_by_refusal(WorkerRefusal((fault,)), PAYLOAD)
    assert (event.code, event.param, event.retriable) == ("CONTEXT_LENGTH_EXCEEDED", "prompt", False)
    assert "900 tokens" in event.message


def test_no_message_quotes_the_prompt() -> None:
    fault = WorkerFault("prompt", "x", "can't encode 'the northern castle at dawn'")
    assert "castle" not in ended_by_refusal(WorkerRefusal((fault,)), PAYLOAD).message
    said = ErrorEvent(code="INTERNAL", message="failed on: attack the northern castle")
    assert without_quotes(said, PAYLOAD).message == "the worker ended the task with INTERNAL"
    assert len(without_quotes(ErrorEvent(code="INTERNAL", message="x" * 9_000), PAYLOAD).message) <= 400


def test_an_empty_refusal_still_says_something() -> None:
    event = ended_by_refusal(WorkerRefusal(), b"")
    assert event.code == "INVALID_PARAMS"
    assert event.message


@pytest.mark.parametrize(
    ("event", "retried"),
    [
        (ErrorEvent(code="VRAM_OOM", message=""), True),
        (ErrorEvent(code="INTERNAL", message=""), True),
        (ErrorEvent(code="SOMETHING_NEW", message="", retriable=True), True),
        (ErrorEvent(code="INVALID_PARAMS", message=""), False),
        (ErrorEvent(code="CONTEXT_LENGTH_EXCEEDED", message=""), False),
    ],
)
def test_which_errors_are_retried(event: ErrorEvent, retried: bool) -> None:
    assert is_worth_a_retry(event) is retried


def test_other_answers() -> None:
    assert turned_away(503, WorkerRefusal(retry_after_ms=700)) == TurnedAway("the worker takes no more now", 700)
    key = turned_away(401, WorkerRefusal())
    assert isinstance(key, TurnedAway)
    assert "LLORCH_WORKER_KEY" in key.why
    assert isinstance(turned_away(409, WorkerRefusal()), TurnedAway)
    assert turned_away(500, WorkerRefusal()) == Faulted("the worker answered 500")


def test_the_name_of_a_field_is_no_quotation() -> None:
    payload = b'{"model":"m","prompt_token_ids":[12345,67890,11111],"frequency_penalty":1.5,"max_tokens":5}'
    said = "`prompt_token_ids.1`: token 67890 is not in the vocabulary of `m`"
    assert ended_by_refusal(WorkerRefusal((WorkerFault("prompt_token_ids.1", "x", said),)), payload).message == said
    said = "`frequency_penalty`: must be at most 1"
    assert without_quotes(ErrorEvent(code="INVALID_PARAMS", message=said), payload).message == said


@pytest.mark.parametrize(
    "payload",
    [
        b'{"model":"m","messages":[{"role":"user","content":"attack the northern castle"}]}',
        b'{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"attack the northern castle"}]}]}',
        b'{"model":"m","prompt":"x","stop":["attack the northern castle"]}',
        b'{"model":"m","prompt":"attack the northern castle',
    ],
)
def test_the_prompt_is_found_wherever_it_stands(payload: bytes) -> None:
    said = ErrorEvent(code="INTERNAL", message="failed on: attack the northern castle")
    assert without_quotes(said, payload).message == "the worker ended the task with INTERNAL"


def test_the_prompt_is_found_escaped_and_as_token_ids() -> None:
    said = ErrorEvent(code="INTERNAL", message="failed on 'line\\nanother line\\nthird'")
    assert "another" not in without_quotes(said, b'{"model":"m","prompt":"line\\nanother line\\nthird"}').message
    said = ErrorEvent(code="INTERNAL", message="failed on [12345, 67890, 11111]")
    assert "67890" not in without_quotes(said, b'{"model":"m","prompt_token_ids":[12345,67890,11111]}').message
