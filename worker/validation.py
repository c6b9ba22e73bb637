"""Turns the body of `/execute` into a `Job` for the engine, or refuses it with the field and the next step.

Read `Validator.prepare` first: nothing behind it checks again. Tokenizing and templates run off the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

from pydantic import ValidationError

from llorch_wire.errors import ErrorCode
from llorch_wire.tasks import ChatMessage
from llorch_wire.worker import ExecuteRequest
from worker.answer_text import AnswerText, EndRules
from worker.chat_template import ChatTemplateError
from worker.engine.protocol import AddSequence, EngineReady, SamplingSpec
from worker.generation import Job
from worker.refusals import FieldError, Refused, context_exceeded, invalid, invalid_body
from worker.stop_strings import StopMatcher
from worker.template_renderer import TemplateRenderer
from worker.tokenizer import ModelTokenizer

INLINE_CHARS = 2048
"""Shorter prompts are tokenized where they stand: handing them to a thread costs more."""
# No tokenizer of the supported families makes less than one token of this many characters. Far longer texts are
# refused before they cost anything.
MAX_CHARS_PER_TOKEN = 256


def parse_execute(body: bytes) -> ExecuteRequest:
    """Raises Refused (400) for what isn't JSON, for unknown and wrong fields."""
    try:
        return ExecuteRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid_body(error) from None


class Validator:
    """Checks requests against one model. `renderer` is None where the model has no chat template."""

    def __init__(self, tokenizer: ModelTokenizer, renderer: TemplateRenderer | None, model_name: str) -> None:
        self._tokenizer = tokenizer
        self._renderer = renderer
        self._model_name = model_name
        self._numbers = itertools.count(1)

    async def prepare(self, request: ExecuteRequest, engine: EngineReady) -> Job:
        """A job whose text has taken in the resumed tokens. Raises Refused (400)."""
        if request.model is not None and request.model != self._model_name:
            raise invalid(
                "model", "model", f"`model`: this worker serves {self._model_name}; leave it out or send that"
            )
        field, prompt_ids = await self._prompt_ids(request, engine)
        self._check_ids(field, prompt_ids, engine.vocab_size)
        if len(prompt_ids) >= engine.context_length:
            raise context_exceeded(field, len(prompt_ids), engine.context_length)
        self._check_sampling_ids(request, engine.vocab_size)
        resumed = request.resume_token_ids
        self._check_ids("resume_token_ids", resumed, engine.vocab_size)
        sampling = sampling_spec(request, engine.context_length - len(prompt_ids))
        text = self._answer_text(request, prompt_ids, sampling, engine)
        if len(resumed) > INLINE_CHARS:
            await asyncio.to_thread(_replay, text, resumed)
        else:
            _replay(text, resumed)
        sequence = AddSequence(
            sequence_id=f"{request.task_id}.{request.attempt}.{next(self._numbers)}",
            prompt_token_ids=prompt_ids,
            output_token_ids=list(resumed),
            sampling=sampling,
            cache_salt=request.cache_salt,
        )
        return Job(request.task_id, request.attempt, sequence, text)

    async def _prompt_ids(self, request: ExecuteRequest, engine: EngineReady) -> tuple[str, list[int]]:
        if request.prompt_token_ids is not None:
            return "prompt_token_ids", list(request.prompt_token_ids)
        if request.messages is not None:
            rendered = await self._render(request.messages)
            _check_chars("messages", rendered, engine.context_length)
            ids = await _off_loop(self._tokenizer.encode_rendered, rendered)
            field = "messages"
        else:
            text = request.prompt or ""
            _check_chars("prompt", text, engine.context_length)
            ids = await _off_loop(self._tokenizer.encode_prompt, text)
            field = "prompt"
        if not ids:
            raise invalid(field, "empty", f"`{field}`: makes no tokens; send some text")
        return field, ids

    async def _render(self, messages: Sequence[ChatMessage]) -> str:
        if self._renderer is None:
            raise invalid(
                "messages",
                "chat_template",
                "`messages`: this model has no chat template; send `prompt` with the text as the model expects it, "
                "or add chat_template.jinja to the model folder",
            )
        template = self._tokenizer.chat_template or ""
        try:
            return await self._renderer.render([_as_template_message(message, template) for message in messages])
        except ChatTemplateError as error:
            raise invalid("messages", "chat_template", f"`messages`: {error}") from None

    def _check_ids(self, field: str, ids: Sequence[int], vocab_size: int) -> None:
        if ids and max(ids) >= vocab_size:
            position = next(i for i, token_id in enumerate(ids) if token_id >= vocab_size)
            raise invalid(
                f"{field}.{position}",
                "vocabulary",
                f"`{field}.{position}`: the model's token ids end at {vocab_size - 1}",
                ids[position],
            )

    def _check_sampling_ids(self, request: ExecuteRequest, vocab_size: int) -> None:
        self._check_ids("stop_token_ids", request.stop_token_ids, vocab_size)
        for key in request.logit_bias:
            if int(key) >= vocab_size:
                message = f"`logit_bias.{key}`: the model's token ids end at {vocab_size - 1}"
                raise invalid(f"logit_bias.{key}", "vocabulary", message, int(key))

    def _answer_text(
        self, request: ExecuteRequest, prompt_ids: list[int], sampling: SamplingSpec, engine: EngineReady
    ) -> AnswerText:
        rules = EndRules(
            # A worker with more room may have gone further than this one could: the answer is complete then.
            max_tokens=max(sampling.max_tokens, len(request.resume_token_ids)),
            eos_token_ids=frozenset(engine.eos_token_ids),
            stop_token_ids=frozenset(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
            min_tokens=request.min_tokens,
        )
        return AnswerText(self._tokenizer.detokenizer(prompt_ids), StopMatcher(request.stop), rules)


def sampling_spec(request: ExecuteRequest, room: int) -> SamplingSpec:
    """What the engine needs of a request; `max_tokens` clipped to the `room` that the context leaves."""
    return SamplingSpec(
        max_tokens=room if request.max_tokens is None else min(request.max_tokens, room),
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        stop_token_ids=tuple(request.stop_token_ids),
        logprobs=request.logprobs,
        logit_bias={int(key): bias for key, bias in request.logit_bias.items()},
        ignore_eos=request.ignore_eos,
        min_tokens=request.min_tokens,
        seed=request.seed,
    )


def _replay(text: AnswerText, resumed: Sequence[int]) -> None:
    for position, token_id in enumerate(resumed):
        if text.finished is not None:
            raise invalid(
                "resume_token_ids",
                "complete",
                f"`resume_token_ids`: the answer was complete after {position} tokens; send no more than those",
                len(resumed),
            )
        text.push(token_id)


def _as_template_message(message: ChatMessage, template: str) -> dict[str, str]:
    # "developer" is newer than most templates; to them it is a system message.
    role = "system" if message.role == "developer" and "developer" not in template else message.role
    plain = {"role": role, "content": message.text()}
    return plain if message.name is None else {**plain, "name": message.name}


def _check_chars(field: str, text: str, context_length: int) -> None:
    if len(text) > context_length * MAX_CHARS_PER_TOKEN:
        message = f"`{field}`: {len(text)} characters are far more than this model's context of {context_length} tokens"
        error = FieldError(field, "context_length", message, len(text))
        raise Refused(400, ErrorCode.CONTEXT_LENGTH_EXCEEDED, error)


async def _off_loop(encode: Callable[[str], list[int]], text: str) -> list[int]:
    return encode(text) if len(text) <= INLINE_CHARS else await asyncio.to_thread(encode, text)
