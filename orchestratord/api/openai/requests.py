"""From a `/v1` body to task requests. Read `parse_chat` and `parse_completion` first.

Three kinds of fields: those with the same meaning here (passed on and validated by `TaskRequest`, one place for every
bound), those of OpenAI alone (`ChatOptions`, `CompletionOptions`), and those that aren't available (`_HARMLESS`): they
are refused by name unless their value asks for nothing. A `null` is the same as leaving the field out.

    divergence from OpenAI                               reason
    `n` × prompts at most 128, `n` at most 32            each choice is a task of its own
    `stop` up to 8 strings                               what `/v2` takes
    completions: `logprobs` up to 20                     what `/v2` takes
    `prompt_cache_key` is the session (`session_id`)     it is what the router calls stickiness
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, cast

import orjson
from pydantic import Field, ValidationError

from llorch_wire.errors import ApiError
from llorch_wire.tasks import Identifier, Model, TaskRequest
from orchestratord.api.body import parse_model
from orchestratord.api.errors import from_validation, invalid

MAX_CHOICES = 128
OPENAI_COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for `/v1/completions`."""

PASSED_ON = frozenset(
    {
        "model", "temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "metadata",
        # not OpenAI's: `extra_body` of its client carries them
        "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "priority", "session_id",
        "placement", "deadline_ms",
    }
)  # fmt: skip

# field → values that ask for nothing; any other value is refused by name.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
}
_HARMLESS_COMPLETION: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
}
_MESSAGE_FIELDS = ("tool_calls", "tool_call_id", "function_call", "audio", "refusal")


class StreamOptions(Model):
    """What a stream carries besides its chunks."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class SharedOptions(Model):
    """OpenAI's own fields that both kinds of completion have."""

    n: int = Field(1, ge=1, le=32)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] = Field(default_factory=list[str])
    max_tokens: int | None = None
    user: Identifier | None = None
    safety_identifier: Identifier | None = None
    prompt_cache_key: Identifier | None = None


class ChatOptions(SharedOptions):
    """OpenAI's own fields of `/v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)


class CompletionOptions(SharedOptions):
    """OpenAI's own fields of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)


@dataclass(frozen=True, slots=True)
class Translated:
    """What a `/v1` body asks for: one task a choice, in the order of the choices' indexes."""

    tasks: tuple[TaskRequest, ...]
    choices_per_prompt: int
    stream: bool
    include_usage: bool
    logprobs: bool
    fingerprint: str
    """Of the whole body: what an idempotency key stands for."""


def parse_chat(body: dict[str, Any]) -> Translated:
    """Translate a body of `/v1/chat/completions`. Raises ApiError 400."""
    given = _known(body, ChatOptions, _HARMLESS)
    options = _options(ChatOptions, given)
    if options.max_tokens is not None and options.max_completion_tokens is not None:
        raise invalid("`max_tokens` and `max_completion_tokens` are the same; send one", "max_completion_tokens")
    if options.top_logprobs is not None and not options.logprobs:
        raise invalid("`top_logprobs` needs `logprobs: true`", "top_logprobs")
    fields = _task_fields(given, options)
    fields["messages"] = [_message(number, message) for number, message in enumerate(options.messages)]
    renamed = {}
    if options.max_completion_tokens is not None:
        fields["max_tokens"] = options.max_completion_tokens
        renamed["max_tokens"] = "max_completion_tokens"
    if options.logprobs:
        fields["logprobs"] = options.top_logprobs or 0
    return _translated([_task(fields, renamed)], options, options.logprobs, _fingerprint("chat", body))


def parse_completion(body: dict[str, Any]) -> Translated:
    """Translate a body of `/v1/completions`. Raises ApiError 400."""
    given = _known(body, CompletionOptions, _HARMLESS_COMPLETION)
    if "prompt" not in given:
        raise invalid("`prompt` is required", "prompt")
    prompts = _prompts(given["prompt"])
    options = _options(CompletionOptions, {**given, "prompt": ""})
    fields = _task_fields(given, options)
    fields.setdefault("max_tokens", OPENAI_COMPLETION_MAX_TOKENS)
    if options.logprobs is not None:
        fields["logprobs"] = options.logprobs
    if len(prompts) * options.n > MAX_CHOICES:
        raise invalid(f"`n` times the number of prompts must be at most {MAX_CHOICES}", "n")
    requests = [_task({**fields, **prompt}, {"prompt_token_ids": "prompt"}) for prompt in prompts]
    return _translated(requests, options, options.logprobs is not None, _fingerprint("completion", body))


def derived_seed(seed: int, choice: int) -> int:
    """Seed of one of `n` choices: the first has the request's own, so that `n` doesn't change it."""
    if choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}:{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def openapi_schema(options: type[SharedOptions]) -> dict[str, Any]:
    """JSON schema of a body: OpenAI's own fields and those passed on."""
    ref = "#/components/schemas/{model}"
    own = options.model_json_schema(ref_template=ref)
    task = TaskRequest.model_json_schema(ref_template=ref)
    own["properties"] |= {name: task["properties"][name] for name in sorted(PASSED_ON)}
    own["required"] = ["model", *own.get("required", [])]
    own.pop("$defs", None)
    own["properties"]["stream_options"] = StreamOptions.model_json_schema()
    return own


def _known(
    body: dict[str, Any], options: type[SharedOptions], harmless: dict[str, tuple[object, ...]]
) -> dict[str, Any]:
    """The fields that mean something. Raises ApiError 400 for one that isn't available or that nobody knows."""
    given: dict[str, Any] = {}
    for name, value in body.items():
        if value is None:
            continue
        if name in options.model_fields or name in PASSED_ON:
            given[name] = value
        elif name in harmless:
            if not any(_same(value, accepted) for accepted in harmless[name]):
                raise invalid(f"`{name}` is not available in this version with this value; leave it out", name)
        elif name in _HARMLESS or name in _HARMLESS_COMPLETION:
            raise invalid(f"`{name}` is not a field of this endpoint; leave it out", name)
        else:
            shown = name if name.isidentifier() and len(name) <= 64 else "body"
            raise invalid(f"unknown field `{shown}`: remove it or check its spelling", shown)
    return given


def _same(value: object, accepted: object) -> bool:
    return type(value) is type(accepted) and value == accepted


def _options(model: type[SharedOptions], given: dict[str, Any]) -> Any:
    return parse_model(model, {name: value for name, value in given.items() if name in model.model_fields})


def _task_fields(given: dict[str, Any], options: SharedOptions) -> dict[str, Any]:
    if options.stream_options is not None and not options.stream:
        raise invalid("`stream_options` needs `stream: true`", "stream_options")
    fields = {name: value for name, value in given.items() if name in PASSED_ON}
    fields["stop"] = [options.stop] if isinstance(options.stop, str) else options.stop
    fields["on_disconnect"] = "cancel"
    if options.max_tokens is not None:
        fields["max_tokens"] = options.max_tokens
    if options.prompt_cache_key is not None:
        fields.setdefault("session_id", options.prompt_cache_key)
    return fields


def _task(fields: dict[str, Any], renamed: dict[str, str]) -> TaskRequest:
    """Validate; an error names the field as the client called it."""
    try:
        return TaskRequest.model_validate(fields)
    except ValidationError as error:
        refusal = from_validation(error)
        for ours, theirs in renamed.items():
            if refusal.param is not None and refusal.param.split(".")[0] == ours:
                param = theirs + refusal.param.removeprefix(ours)
                raise ApiError(refusal.code, refusal.message.replace(ours, theirs), param=param) from None
        raise refusal from None


def _fingerprint(kind: str, body: dict[str, Any]) -> str:
    """Equal for bodies that say the same, whatever the order of their fields. A `null` says nothing."""
    said = {name: value for name, value in body.items() if value is not None}
    return hashlib.sha256(kind.encode() + orjson.dumps(said, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _translated(requests: list[TaskRequest], options: SharedOptions, logprobs: bool, fingerprint: str) -> Translated:
    tasks: list[TaskRequest] = []
    for request in requests:
        for choice in range(options.n):
            seed = None if request.seed is None else derived_seed(request.seed, choice)
            tasks.append(request.model_copy(update={"seed": seed}))
    include_usage = options.stream_options is not None and options.stream_options.include_usage
    return Translated(tuple(tasks), options.n, options.stream, include_usage, logprobs, fingerprint)


def _message(number: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message without the empty fields that the client's own objects carry."""
    where = f"messages.{number}"
    kept = {name: value for name, value in message.items() if value is not None}
    if kept.get("annotations") == []:
        del kept["annotations"]
    if kept.get("role") in ("tool", "function"):
        raise invalid(f"`{where}.role`: tools are not available in this version", f"{where}.role")
    for name in _MESSAGE_FIELDS:
        if name in kept:
            if kept[name] == []:
                del kept[name]
                continue
            raise invalid(f"`{where}.{name}` is not available in this version", f"{where}.{name}")
    content = kept.get("content")
    if isinstance(content, list):
        for index, part in enumerate(cast("list[object]", content)):
            kind = cast("dict[str, object]", part).get("type") if isinstance(part, dict) else None
            if kind in ("image_url", "input_audio", "file", "refusal"):
                param = f"{where}.content.{index}"
                raise invalid(f"`{param}`: content of type {kind} is not available; send text", param)
    return kept


def _prompts(prompt: object) -> list[dict[str, Any]]:
    """Each prompt as the field of a task: text, or token ids. Raises ApiError 400."""
    if isinstance(prompt, str):
        return [{"prompt": prompt}]
    if isinstance(prompt, list) and prompt:
        items = cast("list[object]", prompt)
        if len(items) > MAX_CHOICES and not isinstance(items[0], int):
            raise invalid(f"`prompt` must hold at most {MAX_CHOICES} prompts", "prompt")
        if all(isinstance(item, str) for item in items):
            return [{"prompt": item} for item in items]
        if all(type(item) is int for item in items):
            return [{"prompt_token_ids": items}]
        if all(isinstance(item, list) for item in items):
            return [{"prompt_token_ids": item} for item in items]
    raise invalid("`prompt` must be text, a list of texts, a list of token ids, or a list of such lists", "prompt")
