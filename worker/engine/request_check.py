"""The last check before a request becomes a sequence: whatever would make a step fail for everybody is refused here.

The HTTP process has validated already; the engine doesn't rely on it. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llorch_wire.errors import ErrorCode
from worker.engine.protocol import AddSequence, SamplingSpec


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request can't run. The message never quotes the prompt."""

    code: str
    message: str


def check_request(request: AddSequence, *, vocab_size: int, context_length: int) -> Refusal | None:
    """None if the engine can run the request, otherwise the reason."""
    length = len(request.prompt_token_ids) + len(request.output_token_ids)
    if not request.prompt_token_ids:
        return Refusal(ErrorCode.INVALID_PARAMS, "the prompt has no tokens; send at least one")
    # A resume may already be as long as the context; it ends at once. A prompt leaves room for one token.
    if len(request.prompt_token_ids) >= context_length or length > context_length:
        return Refusal(
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            f"the request has {length} tokens; this worker takes fewer than {context_length}",
        )
    for name, ids in (("prompt_token_ids", request.prompt_token_ids), ("output_token_ids", request.output_token_ids)):
        if min(ids, default=0) < 0 or max(ids, default=0) >= vocab_size:
            return Refusal(ErrorCode.INVALID_PARAMS, f"{name} must lie between 0 and {vocab_size - 1}")
    problem = _sampling_problem(request.sampling, vocab_size)
    return None if problem is None else Refusal(ErrorCode.INVALID_PARAMS, problem)


def _sampling_problem(spec: SamplingSpec, vocab_size: int) -> str | None:
    ranges = (
        ("temperature", spec.temperature, 0.0, 100.0),
        ("top_p", spec.top_p, 0.0, 1.0),
        ("min_p", spec.min_p, 0.0, 1.0),
        ("repetition_penalty", spec.repetition_penalty, 1e-3, 1e3),
        ("presence_penalty", spec.presence_penalty, -100.0, 100.0),
        ("frequency_penalty", spec.frequency_penalty, -100.0, 100.0),
    )
    for name, value, low, high in ranges:
        if not (math.isfinite(value) and low <= value <= high):
            return f"{name} must be a number between {low:g} and {high:g}"
    if spec.max_tokens < 1 or spec.top_k < 0 or spec.min_tokens < 0 or not -(2**63) <= spec.seed < 2**64:
        return "max_tokens must be at least 1, top_k and min_tokens at least 0, seed a 64-bit number"
    if spec.top_p <= 0.0:
        return "top_p must be larger than 0"
    if spec.logprobs is not None and not 0 <= spec.logprobs <= 1024:
        return "logprobs must lie between 0 and 1024"
    for name, ids in (("stop_token_ids", spec.stop_token_ids), ("logit_bias", spec.logit_bias)):
        if any(not 0 <= token_id < vocab_size for token_id in ids):
            return f"{name} must only name tokens between 0 and {vocab_size - 1}"
    if not all(math.isfinite(value) and abs(value) <= 1e4 for value in spec.logit_bias.values()):
        return "logit_bias must hold numbers between -10000 and 10000"
    return None
