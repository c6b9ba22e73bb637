"""From request to job: what the engine gets, what is clipped, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from llorch_wire.worker import ExecuteRequest
from tests.support import tokenizers as small
from worker.engine.protocol import EngineCapabilities, EngineReady
from worker.generation import Job
from worker.refusals import Refused
from worker.tokenizer import ModelTokenizer
from worker.validation import Validator, parse_execute

TASK = "00000000-0000-4000-8000-000000000001"
READY = EngineReady(
    architecture="x",
    vocab_size=300,
    context_length=64,
    slots_total=4,
    kv_blocks_total=1,
    kv_block_tokens=16,
    dtype="float32",
    device="cpu",
    attention="x",
    attention_notice="",
    determinism="exact",
    eos_token_ids=[2],
    vram_bytes=0,
    capabilities=EngineCapabilities(),
)


async def prepare(**fields: Any) -> Job:
    if not {"prompt", "prompt_token_ids", "messages"} & set(fields):
        fields["prompt"] = "hello"
    request = ExecuteRequest(task_id=TASK, attempt=1, **fields)
    return await Validator(ModelTokenizer(small.byte_level(), {}, None), None, "m").prepare(request, READY)


async def test_everything_reaches_the_engine() -> None:
    job = await prepare(
        prompt_token_ids=[5, 6],
        resume_token_ids=[7],
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        stop_token_ids=[8],
        logprobs=3,
        logit_bias={"9": -1.5},
        ignore_eos=True,
        min_tokens=4,
        seed=-5,
        cache_salt="tenant",
        model="m",
    )
    sequence, sampling = job.sequence, job.sequence.sampling
    assert (sequence.prompt_token_ids, sequence.output_token_ids, sequence.cache_salt) == ([5, 6], [7], "tenant")
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (9, 0.5, 0.9, 40)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.presence_penalty) == (0.1, 1.2, 0.1)
    assert (sampling.frequency_penalty, sampling.stop_token_ids, sampling.logprobs) == (-0.1, (8,), 3)
    assert (sampling.logit_bias, sampling.ignore_eos, sampling.min_tokens) == ({9: -1.5}, True, 4)
    assert sampling.seed == -5
    assert job.text.num_tokens == 1


async def test_sequence_ids_never_repeat() -> None:
    validator = Validator(ModelTokenizer(small.byte_level(), {}, None), None, "m")
    request = ExecuteRequest(task_id=TASK, attempt=1, prompt="a")
    ids = {(await validator.prepare(request, READY)).sequence.sequence_id for _ in range(10)}
    assert len(ids) == 10


@pytest.mark.parametrize(("max_tokens", "expected"), [(None, 60), (10, 10), (60, 60), (61, 60), (2**31 - 1, 60)])
async def test_max_tokens_is_clipped_to_the_context(max_tokens: int | None, expected: int) -> None:
    job = await prepare(prompt_token_ids=[5] * 4, max_tokens=max_tokens)
    assert job.sequence.sampling.max_tokens == expected


async def test_an_answer_longer_than_this_workers_context_is_complete() -> None:
    """A worker with more room may have gone further; refusing its tokens would fail the task."""
    job = await prepare(prompt_token_ids=[5] * 4, resume_token_ids=[6] * 80)
    assert job.text.finished == "MAX_TOKENS"
    assert job.text.num_tokens == 80


@pytest.mark.parametrize(
    ("fields", "field", "code"),
    [
        ({"prompt_token_ids": [5] * 64}, "prompt_token_ids", "CONTEXT_LENGTH_EXCEEDED"),
        ({"prompt": "q" * 100}, "prompt", "CONTEXT_LENGTH_EXCEEDED"),
        ({"prompt": "q" * 100_000}, "prompt", "CONTEXT_LENGTH_EXCEEDED"),
        ({"prompt_token_ids": [5, 300]}, "prompt_token_ids.1", "INVALID_PARAMS"),
        ({"resume_token_ids": [300]}, "resume_token_ids.0", "INVALID_PARAMS"),
        ({"resume_token_ids": [5, 2, 5]}, "resume_token_ids", "INVALID_PARAMS"),
        ({"stop_token_ids": [5, 300]}, "stop_token_ids.1", "INVALID_PARAMS"),
        ({"logit_bias": {"300": 1.0}}, "logit_bias.300", "INVALID_PARAMS"),
        ({"model": "another"}, "model", "INVALID_PARAMS"),
    ],
)
async def test_refusals_name_the_field(fields: dict[str, Any], field: str, code: str) -> None:
    with pytest.raises(Refused) as refusal:
        await prepare(**fields)
    assert (refusal.value.status, refusal.value.code) == (400, code)
    assert refusal.value.errors[0].field == field


def test_several_problems_are_all_reported() -> None:
    with pytest.raises(Refused) as refusal:
        parse_execute(b'{"task_id": "x", "attempt": 0, "prompt": "a", "temperature": 9, "colour": 1}')
    assert [error.field for error in refusal.value.errors] == ["temperature", "task_id", "attempt", "colour"]
