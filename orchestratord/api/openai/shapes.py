"""What `/v1` answers look like: chunks, choices, log probabilities, usage. Pure; read `ChatShape` first.

A shape is one of the two kinds of completion. It keeps nothing about a task but what its own format needs between two
chunks (`text_offset`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from llorch_wire.errors import ApiError
from llorch_wire.events import EndEvent
from orchestratord.api.errors import openai_error_object
from orchestratord.api.openai.logprobs import Shown

DONE = b"data: [DONE]\n\n"
Json = dict[str, Any]


@dataclass(slots=True)
class Head:
    """What every chunk of an answer repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str | None = None


@dataclass(slots=True)
class ChoiceSoFar:
    """One choice of an unstreamed answer while it grows."""

    index: int
    text: list[str] = field(default_factory=list[str])
    shown: list[Shown] = field(default_factory=list[Shown])
    end: EndEvent | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """What one chunk says: text, the tokens clear by now, `opening` on a choice's first, `finish` on its last."""

    text: str = ""
    shown: Sequence[Shown] = ()
    finish: str | None = None
    opening: bool = False


class Shape(Protocol):
    """One of the two kinds of completion. `opens`: a choice's stream begins with a chunk that names the role."""

    opens: bool

    def chunk(self, head: Head, index: int, part: Part) -> Json:
        """One chunk of a stream."""
        ...

    def whole(self, head: Head, choices: Sequence[ChoiceSoFar], usage: Json) -> Json:
        """The unstreamed answer."""
        ...

    def empty(self, head: Head) -> Json:
        """A chunk without choices, for the usage at the end."""
        ...


def finish_reason(end: EndEvent) -> str:
    """OpenAI's word for why a generation ended."""
    return "length" if end.stop_reason == "MAX_TOKENS" else "stop"


def usage_of(ends: Sequence[EndEvent], choices_per_prompt: int) -> Json:
    """Token counts of an answer: a prompt counts once, whatever `n` is."""
    prompts = ends[::choices_per_prompt]
    tokens_in = sum(end.tokens_in for end in prompts)
    tokens_out = sum(end.tokens_out for end in ends)
    return {
        "prompt_tokens": tokens_in,
        "completion_tokens": tokens_out,
        "total_tokens": tokens_in + tokens_out,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in prompts)},
    }


def data_frame(body: Json) -> bytes:
    """One SSE frame as OpenAI sends them: data only."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


def error_frame(error: ApiError) -> bytes:
    """A failure inside a stream; OpenAI's client raises it as APIError."""
    return data_frame({"error": openai_error_object(error)})


class ChatShape:
    """`chat.completion` and its chunks."""

    opens = True

    def __init__(self, *, logprobs: bool) -> None:
        self._logprobs = logprobs

    def chunk(self, head: Head, index: int, part: Part) -> Json:
        """See Shape."""
        delta: Json = {}
        if part.opening:
            delta = {"role": "assistant", "content": "", "refusal": None}
        if part.text or part.shown:
            delta["content"] = part.text
        choice: Json = {"index": index, "delta": delta, "logprobs": None, "finish_reason": part.finish}
        if self._logprobs and part.shown:
            choice["logprobs"] = _chat_logprobs(part.shown)
        return {**_head(head, "chat.completion.chunk"), "choices": [choice]}

    def empty(self, head: Head) -> Json:
        """See Shape."""
        return {**_head(head, "chat.completion.chunk"), "choices": []}

    def whole(self, head: Head, choices: Sequence[ChoiceSoFar], usage: Json) -> Json:
        """See Shape."""
        shown = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
                "logprobs": _chat_logprobs(choice.shown) if self._logprobs else None,
                "finish_reason": finish_reason(choice.end) if choice.end else None,
            }
            for choice in choices
        ]
        return {**_head(head, "chat.completion"), "choices": shown, "usage": usage}


class CompletionShape:
    """`text_completion` and its chunks, which look alike."""

    opens = False

    def __init__(self, *, logprobs: bool) -> None:
        self._logprobs = logprobs
        self._offsets: dict[int, int] = {}

    def chunk(self, head: Head, index: int, part: Part) -> Json:
        """See Shape. `text_offset` goes on from the choice's last chunk."""
        choice: Json = {"index": index, "text": part.text, "logprobs": None, "finish_reason": part.finish}
        if self._logprobs and part.shown:
            offset = self._offsets.get(index, 0)
            choice["logprobs"] = _completion_logprobs(part.shown, offset)
            self._offsets[index] = offset + sum(len(text) for text, _ in part.shown)
        return {**_head(head, "text_completion"), "choices": [choice]}

    def empty(self, head: Head) -> Json:
        """See Shape."""
        return {**_head(head, "text_completion"), "choices": []}

    def whole(self, head: Head, choices: Sequence[ChoiceSoFar], usage: Json) -> Json:
        """See Shape."""
        shown = [
            {
                "index": choice.index,
                "text": "".join(choice.text),
                "logprobs": _completion_logprobs(choice.shown, 0) if self._logprobs else None,
                "finish_reason": finish_reason(choice.end) if choice.end else None,
            }
            for choice in choices
        ]
        return {**_head(head, "text_completion"), "choices": shown, "usage": usage}


def _head(head: Head, kind: str) -> Json:
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
    }


def _chat_logprobs(shown: Sequence[Shown]) -> Json:
    content = [
        {
            **_logprob(text, token.logprob),
            "top_logprobs": [_logprob(top.t, top.logprob) for top in token.top or ()],
        }
        for text, token in shown
    ]
    return {"content": content, "refusal": None}


def _logprob(text: str, logprob: float | None) -> Json:
    return {"token": text, "logprob": logprob if logprob is not None else 0.0, "bytes": list(text.encode())}


def _completion_logprobs(shown: Sequence[Shown], offset: int) -> Json:
    offsets: list[int] = []
    for text, _ in shown:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": [text for text, _ in shown],
        "token_logprobs": [token.logprob for _, token in shown],
        "top_logprobs": [{top.t: top.logprob for top in token.top or ()} for _, token in shown],
        "text_offset": offsets,
    }
