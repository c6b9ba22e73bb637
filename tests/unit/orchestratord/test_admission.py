from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch_wire.errors import ApiError, ErrorCode
from llorch_wire.tasks import TaskRequest
from llorch_wire.worker import ExecuteRequest
from orchestratord.admission import (
    AdmissionPolicy,
    Drawn,
    admit,
    body_hash,
    estimate_prompt_tokens,
    prefix_hashes,
    refusal,
)
from orchestratord.forecast import Forecast
from orchestratord.settings import Tenant
from orchestratord.store.types import NewTask, QueueLimits, Refused, WorkerView
from tests.unit.orchestratord.makers import worker

SECRET = "the spanish inquisition"
DRAWN = Drawn(task_id="11111111-1111-4111-8111-111111111111", seed=99, now_ms=5_000, correlation_id="c")


def request(**fields: Any) -> TaskRequest:
    return TaskRequest(**{"model": "m", "prompt": SECRET, **fields})


def accept(
    task: TaskRequest,
    *,
    policy: AdmissionPolicy | None = None,
    workers: list[WorkerView] | None = None,
    forecast: Forecast | None = None,
    ms_per_token: float | None = None,
) -> NewTask:
    return admit(
        task,
        Tenant("acme", 2.0),
        policy or AdmissionPolicy(),
        DRAWN,
        known_models={"m", "other"},
        workers=[worker("w1")] if workers is None else workers,
        forecast=forecast,
        ms_per_token=ms_per_token,
    )


def refused(task: TaskRequest, **how: Any) -> ApiError:
    with pytest.raises(ApiError) as raised:
        accept(task, **how)
    assert SECRET not in raised.value.message
    return raised.value


def test_what_is_not_given_is_drawn_or_defaulted() -> None:
    task = accept(request())
    assert (task.task_id, task.seed, task.max_tokens, task.weight) == (DRAWN.task_id, 99, 1_024, 2.0)
    assert task.deadline_at_ms is None
    given_ones = accept(request(seed=-3, max_tokens=7, deadline_ms=250))
    assert (given_ones.seed, given_ones.max_tokens, given_ones.deadline_at_ms) == (-3, 7, 5_250)
    assert accept(request(seed=0)).seed == 0


def test_the_payload_is_an_execute_request_less_the_attempt() -> None:
    task = accept(request(temperature=0.5, stop=["x"], logit_bias={"5": 1.5}, session_id="s", metadata={"k": "v"}))
    body = msgspec.json.decode(task.payload) | {"task_id": task.task_id, "attempt": 1, "seed": task.seed}
    execute = ExecuteRequest.model_validate_json(msgspec.json.encode(body))
    assert (execute.prompt, execute.temperature, execute.stop) == (SECRET, 0.5, ["x"])
    assert (execute.max_tokens, execute.logit_bias, execute.model) == (1_024, {"5": 1.5}, "m")
    assert execute.cache_salt
    assert b"metadata" not in task.payload


def test_the_same_request_has_the_same_hash_whatever_names_it() -> None:
    one = request(metadata={"a": "1", "b": "2"})
    two = request(metadata={"b": "2", "a": "1"}, task_id="22222222-2222-4222-8222-222222222222", temperature=1.0)
    assert body_hash(one) == body_hash(two)
    for change in ({"seed": 1}, {"temperature": 0.9}, {"prompt": "other"}, {"priority": "batch"}):
        assert body_hash(request(metadata={"a": "1", "b": "2"}, **change)) != body_hash(one)


def test_an_unknown_model_names_the_known_ones() -> None:
    error = refused(request(model="nope"))
    assert (error.code, error.param) == (ErrorCode.MODEL_NOT_FOUND, "model")
    assert "`m`, `other`" in error.message


def test_no_live_worker_waits_or_is_refused_by_policy() -> None:
    lost = [worker("w1", state="lost")]
    assert accept(request(), workers=lost).model == "m"
    error = refused(request(), workers=lost, policy=AdmissionPolicy(wait_for_workers=False))
    assert (error.code, error.param) == (ErrorCode.NO_WORKERS, "model")
    assert error.retry_after_ms
    pinned = request(placement={"mode": "pin", "pin_worker": "w2"})
    error = refused(pinned, policy=AdmissionPolicy(wait_for_workers=False))
    assert (error.code, error.param) == (ErrorCode.NO_WORKERS, "placement")


def test_a_pin_that_can_never_be_met_is_refused() -> None:
    workers = [worker("w1"), worker("w9", model="other")]
    wrong_model = refused(request(placement={"mode": "pin", "pin_worker": "w9"}), workers=workers)
    assert (wrong_model.code, wrong_model.param) == (ErrorCode.INVALID_PARAMS, "placement.pin_worker")
    wrong_pool = refused(request(placement={"mode": "pin", "pin_worker": "w1", "pin_pool": "far"}), workers=workers)
    assert wrong_pool.param == "placement.pin_pool"


def test_a_hopeless_deadline_is_refused_with_figures() -> None:
    forecast = Forecast(p50_ms=9_000, p90_ms=20_000)
    error = refused(request(deadline_ms=5_000), forecast=forecast)
    assert (error.code, error.param) == (ErrorCode.DEADLINE_UNMET, "deadline_ms")
    accept(request(deadline_ms=10_000), forecast=forecast)
    surely_long = request(deadline_ms=10_000, max_tokens=1_000, ignore_eos=True)
    assert refused(surely_long, forecast=forecast, ms_per_token=10.0).code is ErrorCode.DEADLINE_UNMET
    accept(request(deadline_ms=1))  # nothing measured yet: nothing is known to be hopeless


def test_a_deadline_refusal_says_what_takes_so_long() -> None:
    long = request(deadline_ms=5_000, max_tokens=10_000, ignore_eos=True)
    tokens = refused(long, forecast=Forecast(p50_ms=0, p90_ms=0), ms_per_token=20.0)
    assert "10000 tokens take about 200000 ms" in tokens.message
    assert "queue" not in tokens.message
    waiting = refused(request(deadline_ms=5_000), forecast=Forecast(p50_ms=9_000, p90_ms=20_000))
    assert "the queue is too long: about 9000 ms" in waiting.message
    both = request(deadline_ms=5_000, max_tokens=100, ignore_eos=True)
    together = refused(both, forecast=Forecast(p50_ms=4_000, p90_ms=9_000), ms_per_token=20.0)
    assert "4000 ms until it starts, and 2000 ms for 100 tokens" in together.message
    for error in (tokens, waiting, together):
        assert (error.retriable, error.retry_after_ms) == (False, None)


def test_as_many_tokens_as_by_default_are_too_few_for_min_tokens() -> None:
    policy = AdmissionPolicy(default_max_tokens=512)
    error = refused(request(min_tokens=600), policy=policy)
    assert (error.code, error.param) == (ErrorCode.INVALID_PARAMS, "min_tokens")
    assert "512" in error.message
    assert accept(request(min_tokens=600, max_tokens=700), policy=policy).max_tokens == 700
    assert accept(request(min_tokens=512), policy=policy).max_tokens == 512


def test_a_part_of_a_larger_request_is_the_same_only_in_the_same_one() -> None:
    assert body_hash(request(), "one") == body_hash(request(), "one")
    assert len({body_hash(request()), body_hash(request(), "one"), body_hash(request(), "two")}) == 3


def test_a_prompt_larger_than_the_bound() -> None:
    error = refused(request(), policy=AdmissionPolicy(max_prompt_bytes=16))
    assert (error.code, error.param) == (ErrorCode.PAYLOAD_TOO_LARGE, "prompt")


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("conflict", ErrorCode.CONFLICT),
        ("conflict_pair", ErrorCode.CONFLICT),
        ("conflict_keys", ErrorCode.CONFLICT),
        ("queue_full_total", ErrorCode.QUEUE_FULL),
        ("queue_full_model", ErrorCode.QUEUE_FULL),
        ("queue_full_tenant", ErrorCode.QUEUE_FULL),
        ("memory", ErrorCode.STORE_UNAVAILABLE),
        ("model_unknown", ErrorCode.MODEL_NOT_FOUND),
    ],
)
def test_what_the_store_refuses(reason: Any, code: ErrorCode) -> None:
    error = refusal(Refused(reason=reason, limit=3), QueueLimits(), {"m"}, 2_000, "gone")
    assert error.code is code
    if error.status in (429, 503):
        assert error.retry_after_ms is not None
        assert error.retry_after_ms >= 1_000


def test_estimates() -> None:
    assert estimate_prompt_tokens(request(prompt="x" * 300)) == 100
    assert estimate_prompt_tokens(TaskRequest(model="m", prompt_token_ids=[1, 2, 3])) == 3
    assert estimate_prompt_tokens(TaskRequest(model="m", messages=[{"role": "user", "content": "x" * 30}])) == 14


@given(
    st.text(alphabet="ab", min_size=1, max_size=3_000),
    st.text(alphabet="ab", max_size=900),
    st.text("ab", max_size=900),
)
def test_prompts_share_hashes_exactly_as_far_as_they_are_equal(head: str, one: str, two: str) -> None:
    hashes = [prefix_hashes(request(prompt=head + tail + "."), salt="t") for tail in (one, two)]
    ends = [*range(256, 2_049, 256), 3_072, 4_096]
    texts = [head + one + ".", head + two + "."]
    shared = sum(1 for end in ends if len(texts[0]) >= end <= len(texts[1]) and texts[0][:end] == texts[1][:end])
    same = [a == b for a, b in zip(*hashes, strict=False)]
    assert same == [True] * shared + [False] * (len(same) - shared)
    assert not set(hashes[0]) & set(prefix_hashes(request(prompt=texts[0]), salt="other"))
