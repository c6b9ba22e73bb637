"""What the engine refuses before it becomes a sequence, each with a message that names the field."""

from __future__ import annotations

import math

import pytest

from llorch_wire.tasks import SamplingFields
from llorch_wire.worker import ExecuteRequest
from worker.engine.protocol import AddSequence, SamplingSpec
from worker.engine.request_check import check_request
from worker.validation import sampling_spec


def refusal(prompt: list[int] | None = None, output: list[int] | None = None, **sampling):
    request = AddSequence(
        sequence_id="s",
        prompt_token_ids=[1, 2] if prompt is None else prompt,
        output_token_ids=output or [],
        sampling=SamplingSpec(**{"max_tokens": 4, **sampling}),
    )
    return check_request(request, vocab_size=10, context_length=16)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [10]}, "prompt_token_ids"),
        ({"prompt": [-1]}, "prompt_token_ids"),
        ({"output": [10]}, "output_token_ids"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"frequency_penalty": math.inf}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_k": -1}, "top_k"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"logprobs": 5000}, "logprobs"),
        ({"stop_token_ids": (10,)}, "stop_token_ids"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logit_bias": {1: 1e9}}, "logit_bias"),
    ],
)
def test_bad_parameters_are_named(options, word):
    result = refusal(**options)
    assert result is not None
    assert result.code == "INVALID_PARAMS"
    assert word in result.message


def test_a_prompt_leaves_room_for_a_token():
    assert refusal(prompt=[1] * 15, max_tokens=1) is None
    result = refusal(prompt=[1] * 16)
    assert result is not None
    assert result.code == "CONTEXT_LENGTH_EXCEEDED"


def test_a_resume_may_fill_the_context_but_not_exceed_it():
    assert refusal(prompt=[1] * 15, output=[2]) is None
    assert refusal(prompt=[1] * 15, output=[2, 2]) is not None


def test_ordinary_requests_pass():
    assert refusal(temperature=0.0) is None
    assert refusal(seed=-(2**63), logit_bias={3: -100.0}, stop_token_ids=(9,), logprobs=0) is None


def _bounds():
    """Every number of a request at the lowest and the highest value that the wire lets through."""
    for name, field in SamplingFields.model_fields.items():
        for bound in field.metadata:
            for kind in ("ge", "gt", "le", "lt"):
                value = getattr(bound, kind, None)
                if value is not None:
                    step = {"ge": value, "le": value, "gt": math.nextafter(value, math.inf)}.get(kind)
                    yield name, math.nextafter(value, -math.inf) if step is None else step


BOUNDS = sorted(_bounds())


def test_the_wire_bounds_every_number():
    assert {name for name, _ in BOUNDS} >= {
        *("temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "logprobs"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    }


@pytest.mark.parametrize(("name", "value"), [*BOUNDS, ("seed", -(2**63)), ("seed", 2**63 - 1)])
def test_what_the_wire_lets_through_the_engine_takes(name, value):
    """Else it would be accepted, take a slot and fail in its stream."""
    _engine_takes(**{name: value})


@pytest.mark.parametrize("bias", [-100, 100])
def test_so_with_logit_bias(bias):
    _engine_takes(logit_bias={"0": bias, "9": bias})


def _engine_takes(**fields):
    body = {"task_id": "00000000-0000-4000-8000-000000000000", "attempt": 1, "prompt_token_ids": [1], "seed": 1}
    request = ExecuteRequest.model_validate({**body, **fields})
    add = AddSequence(sequence_id="s", prompt_token_ids=[1], sampling=sampling_spec(request, 15))
    assert check_request(add, vocab_size=10, context_length=16) is None
