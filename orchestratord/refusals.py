"""What a worker's words become. Pure. No word of a worker reaches a client if it quotes the prompt."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from llorch_wire.errors import RETRIABLE, ErrorCode
from llorch_wire.events import ErrorEvent
from orchestratord.outcomes import Faulted, Outcome, TurnedAway
from orchestratord.worker_client import WorkerRefusal

MAX_MESSAGE_CHARS = 400
QUOTE_CHARS = 16
"""So many characters in a row, found in the prompt too, make a message a quotation."""

_RETRIED = frozenset({ErrorCode.VRAM_OOM, ErrorCode.INTERNAL, ErrorCode.WORKER_LOST, ErrorCode.WORKER_TIMEOUT})

_PLAIN = {
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: "the prompt is too long for this model's context: shorten it",
    ErrorCode.INVALID_PARAMS: "the worker refused a parameter of this task: check it against the model",
}


class _Part(msgspec.Struct):
    text: str = ""


class _Message(msgspec.Struct):
    content: str | list[_Part] = ""


class _Quotable(msgspec.Struct):
    """The part of a payload that no message may quote."""

    prompt: str = ""
    messages: list[_Message] = []
    prompt_token_ids: list[int] = []
    stop: list[str] = []


def is_worth_a_retry(event: ErrorEvent) -> bool:
    """Whether another attempt may succeed where this one failed."""
    return event.retriable or event.code in _RETRIED


def ended_by_refusal(refusal: WorkerRefusal, payload: bytes) -> ErrorEvent:
    """The terminal event for a worker's 400: it won't be different elsewhere, so it isn't retried."""
    too_long = refusal.code == ErrorCode.CONTEXT_LENGTH_EXCEEDED or any(
        fault.constraint == "context_length" for fault in refusal.errors
    )
    code = ErrorCode.CONTEXT_LENGTH_EXCEEDED if too_long else ErrorCode.INVALID_PARAMS
    message = "; ".join(fault.message for fault in refusal.errors if fault.message) or refusal.message
    event = ErrorEvent(code=code, message=message, param=refusal.errors[0].field if refusal.errors else None)
    return without_quotes(event, payload)


def turned_away(status: int, refusal: WorkerRefusal) -> Outcome:
    """The outcome of any other answer that isn't 200."""
    if status in (401, 403):
        return TurnedAway("the worker refuses our key: LLORCH_WORKER_KEY must be the same on both sides", 5_000)
    if status == 409:
        return TurnedAway("the worker has fenced this attempt")
    if status in (429, 503):
        return TurnedAway(refusal.message or "the worker takes no more now", refusal.retry_after_ms)
    return Faulted(f"the worker answered {status}")


def without_quotes(event: ErrorEvent, payload: bytes) -> ErrorEvent:
    """The event, in words of our own where the worker's might quote the prompt, and in bounds."""
    message = event.message[:MAX_MESSAGE_CHARS]
    if not message or _quotes(message, payload):
        code = event.code
        known = next((text for known_code, text in _PLAIN.items() if known_code == code), None)
        message = known or f"the worker ended the task with {code}"
    retriable = event.retriable or any(code == event.code for code in RETRIABLE)
    param = event.param if event.param and len(event.param) <= 128 else None
    return msgspec.structs.replace(event, message=message, retriable=retriable, param=param)


def _quotes(message: str, payload: bytes) -> bool:
    """Whether a stretch of the message stands in the prompt, as it is or as JSON has it."""
    if len(message) < QUOTE_CHARS:
        return False
    stretches = [message[i : i + QUOTE_CHARS] for i in range(len(message) - QUOTE_CHARS + 1)]
    return any(stretch in text for text in _prompt_texts(payload) for stretch in stretches)


def _prompt_texts(payload: bytes) -> Iterator[str]:
    """What the client wrote for the model and where it ends: not the names of fields, which a refusal must name."""
    try:
        body = msgspec.json.decode(payload, type=_Quotable) if payload else _Quotable()
    except msgspec.MsgspecError:
        yield payload.decode("utf-8", "replace")
        return
    contents = [message.content for message in body.messages]
    parts = [part.text for content in contents if not isinstance(content, str) for part in content]
    texts = [body.prompt, *(content for content in contents if isinstance(content, str)), *parts, *body.stop]
    for text in texts:
        yield text
        yield msgspec.json.encode(text).decode()
        yield repr(text)
    yield from (", ".join(map(str, body.prompt_token_ids)), ",".join(map(str, body.prompt_token_ids)))
