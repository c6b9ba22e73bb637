"""What a client may ask for: `TaskRequest`, and the sampling fields that travel unchanged down to the worker.

Validation lives in these models, so that the same words meet a bad value at orchestratord and at a worker. Read
`TaskRequest` first; `problems` turns a pydantic error into (field, constraint, message) triples without ever quoting
a prompt.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, NamedTuple, TypeAlias

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

Priority: TypeAlias = Literal["interactive", "batch"]
TaskStatus: TypeAlias = Literal["queued", "running", "completed", "failed", "cancelled"]
OnDisconnect: TypeAlias = Literal["continue", "cancel"]

MAX_STOPS = 8
MAX_STOP_CHARS = 256
MAX_METADATA = 16
INT64_MAX = 2**63 - 1

UUID_PATTERN = r"^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$"
BIAS_KEY_PATTERN = r"^(0|[1-9][0-9]{0,8})$"
"""One spelling for each token id: two keys of an object never mean the same token."""
URL_PATTERN = r"^https?://"


def _clean_text(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain NUL characters; remove them and send it again")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode: it holds a lone surrogate") from None
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


CleanText = Annotated[str, AfterValidator(_clean_text)]
PromptText = Annotated[str, StringConstraints(min_length=1), AfterValidator(_clean_text)]
Identifier = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_clean_text)]
TaskId = Annotated[str, StringConstraints(pattern=UUID_PATTERN, to_lower=True)]
Float = Annotated[float, AfterValidator(_finite)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Model(BaseModel):
    """Base of every message: immutable, unknown fields refused, no coercion, values never echoed in errors.

    Strict, because lax mode would read `max_tokens: true` as 1 and `"5"` as 5.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, hide_input_in_errors=True, populate_by_name=True
    )


class TextPart(Model):
    """One text part of a message's content."""

    type: Literal["text"]
    text: CleanText


class ChatMessage(Model):
    """One message of a chat. Content is text or a list of text parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: CleanText | list[TextPart]
    name: Identifier | None = None

    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(Model):
    """Structured output. Only plain text is available; anything else is refused by name."""

    type: Literal["text"]


class SamplingFields(Model):
    """How tokens are chosen and when generation stops: the same fields on `/v2/tasks` and on a worker's `/execute`."""

    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: Float = Field(1.0, ge=0, le=2)
    top_p: Float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="0 switches it off")
    min_p: Float = Field(0.0, ge=0, le=1)
    repetition_penalty: Float = Field(1.0, ge=0.001, le=10)
    presence_penalty: Float = Field(0.0, ge=-2, le=2)
    frequency_penalty: Float = Field(0.0, ge=-2, le=2)
    stop: list[
        Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS), AfterValidator(_clean_text)]
    ] = Field(default_factory=list, max_length=MAX_STOPS)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=64)
    logprobs: int | None = Field(None, ge=0, le=20, description="how many alternatives; 0: only the chosen token's")
    logit_bias: dict[
        Annotated[str, StringConstraints(pattern=BIAS_KEY_PATTERN)], Annotated[Float, Field(ge=-100, le=100)]
    ] = Field(default_factory=dict, max_length=300)
    response_format: ResponseFormat | None = None
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=2**31 - 1)

    @model_validator(mode="after")
    def _min_below_max(self) -> SamplingFields:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens must not be larger than max_tokens")
        return self


class Placement(Model):
    """Where a task may run. A pin never falls back silently: it waits, or is refused where it can't ever be met."""

    mode: Literal["auto", "prefer", "pin"] = "auto"
    pin_pool: Identifier | None = None
    pin_worker: Identifier | None = None
    prefer_pools: list[Identifier] = Field(default_factory=list, max_length=64)
    avoid_pools: list[Identifier] = Field(default_factory=list, max_length=64)
    allow_fallback: bool = True

    @model_validator(mode="after")
    def _mode_has_its_fields(self) -> Placement:
        if self.mode == "pin" and not (self.pin_pool or self.pin_worker):
            raise ValueError("mode `pin` needs pin_pool or pin_worker")
        if self.mode != "pin" and (self.pin_pool or self.pin_worker):
            raise ValueError("pin_pool and pin_worker need mode `pin`")
        if self.mode == "prefer" and not self.prefer_pools:
            raise ValueError("mode `prefer` needs prefer_pools")
        return self


class TaskRequest(SamplingFields):
    """Body of `POST /v2/tasks`. Exactly one of prompt, messages, prompt_token_ids and inputs."""

    model: Identifier = Field(validation_alias=AliasChoices("model", "model_ref"))
    prompt: PromptText | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=4096)
    prompt_token_ids: list[TokenId] | None = Field(None, min_length=1, max_length=2**20)
    inputs: list[PromptText] | None = Field(None, min_length=1, max_length=2048)
    workload: Literal["completion", "embedding"] = "completion"
    seed: int | None = Field(None, ge=-(2**63), le=INT64_MAX)
    priority: Priority = "interactive"
    deadline_ms: int | None = Field(None, ge=1, le=30 * 24 * 3600 * 1000)
    session_id: Identifier | None = None
    placement: Placement = Field(default_factory=Placement)
    on_disconnect: OnDisconnect = "continue"
    task_id: TaskId | None = None
    callback_url: Annotated[str, StringConstraints(min_length=8, max_length=2048, pattern=URL_PATTERN)] | None = None
    metadata: dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64), AfterValidator(_clean_text)],
        Annotated[str, StringConstraints(max_length=512), AfterValidator(_clean_text)],
    ] = Field(default_factory=dict, max_length=MAX_METADATA)

    @model_validator(mode="after")
    def _exactly_one_input(self) -> TaskRequest:
        given = [name for name in INPUT_FIELDS if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) if given else "none of them"
            raise ValueError(f"exactly one of prompt, messages, prompt_token_ids and inputs is needed; got {got}")
        if self.workload == "embedding" or self.inputs is not None:
            raise ValueError("workload `embedding` and `inputs` are not available in this version")
        return self


INPUT_FIELDS = ("prompt", "messages", "prompt_token_ids", "inputs")


class Problem(NamedTuple):
    """One thing wrong with a request. `field` is dotted; `value` is given only for short scalars outside of prompts."""

    field: str | None
    constraint: str
    message: str


def problems(error: ValidationError) -> list[Problem]:
    """What is wrong, in order, without any value that the client sent. Of the names that it made up, only short plain
    ones are told: elsewhere the field is the one that holds it, or `body`."""
    found: list[Problem] = []
    for item in error.errors(include_url=False, include_input=False):
        field, whole = _path(item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "string_pattern_mismatch":
            message = _PATTERN_WORDS.get(item.get("ctx", {}).get("pattern", ""), message)
        if item["type"] == "extra_forbidden" and field == "model_ref":
            message = "`model` and `model_ref` are the same; send one"
        elif item["type"] == "extra_forbidden" and not whole:
            field = field or "body"
            message = f"unknown field in `{field}`: remove it or check its spelling"
        elif item["type"] == "extra_forbidden":
            message = f"unknown field `{field}`: remove it or check its spelling"
        elif item["type"] == "missing":
            message = f"`{field}` is required"
        elif not field:
            field = _field_named_in(message)
        else:
            message = f"`{field}`: {message[:1].lower()}{message[1:]}"
        found.append(Problem(field or None, item["type"], message))
    return found


_NAMED = re.compile(r"\w[\w-]{0,63}")


def _path(location: tuple[int | str, ...]) -> tuple[str, bool]:
    """A location, dotted, up to the first name that isn't a short plain one; and whether that was all of it."""
    told: list[str] = []
    for part in map(str, location):
        if part.startswith("function-") or part in _UNION_TAGS:
            continue
        if not _NAMED.fullmatch(part):
            return ".".join(told), False
        told.append(part)
    return ".".join(told), True


_PATTERN_WORDS = {
    UUID_PATTERN: "must be a UUID: 32 hexadecimal digits in groups of 8-4-4-4-12, with hyphens between them",
    BIAS_KEY_PATTERN: "must be a token id: a decimal number of at most 9 digits, without leading zeros",
    URL_PATTERN: "must begin with http:// or https://",
}
# Pydantic names the member of a union in an error's location; a client never wrote these words.
_UNION_TAGS = frozenset({"str", "list[TextPart]", "constrained-str", "[key]"})
_CROSS_FIELD = {
    "exactly one of prompt": "prompt",
    "min_tokens": "min_tokens",
    "workload": "workload",
}


def _field_named_in(message: str) -> str:
    return next((field for start, field in _CROSS_FIELD.items() if message.startswith(start)), "")
