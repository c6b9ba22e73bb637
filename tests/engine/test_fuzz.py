"""Random arrivals, resumes, cancels and bad requests on a real engine with too little memory.

Whatever happens to the others, each sequence's tokens are those that it gets alone, and no block is lost. 500 sequences
by default; LLORCH_FUZZ_SEQUENCES=20000 (`make soak`) for a long run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.harness import EOS, VOCAB, Harness, prompts, request
from worker.engine.protocol import AddSequence

SEQUENCES = int(os.environ.get("LLORCH_FUZZ_SEQUENCES", "500"))
PER_EXAMPLE = 8
LONGEST = 30

KINDS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.8, "seed": -5, "top_k": 20, "presence_penalty": 0.7},
    {"temperature": 1.3, "seed": 2**62, "top_p": 0.9, "repetition_penalty": 1.2, "min_tokens": 9, "ignore_eos": False},
    {"temperature": 1.0, "seed": 4, "min_p": 0.05, "logit_bias": {7: 3.0}, "stop_token_ids": (8, 9, 10)},
    {"temperature": 0.0, "frequency_penalty": 1.0, "logprobs": 2},
]
# Two of them begin alike, over more than a block.
PROMPTS = [*prompts(5, (3, 20, 41, 9, 70)), [*prompts(5, (3, 20, 41, 9, 70))[4][:40], 5, 6]]
BAD = [
    {"prompt": []},
    {"prompt": [VOCAB]},
    {"prompt": [-1]},
    {"prompt": [3] * 4000},
    {"temperature": float("nan")},
    {"top_p": 0.0},
    {"logit_bias": {VOCAB: 1.0}},
]

Alone = Callable[[int, int], list[int]]
"""(prompt, kind) → the tokens of that request when nothing else runs."""

PLAN = st.fixed_dictionaries(
    {
        "prompt": st.integers(0, len(PROMPTS) - 1),
        "kind": st.integers(0, len(KINDS) - 1),
        "kept": st.integers(0, LONGEST),
        "at": st.integers(0, 25),
        "cancel_after": st.one_of(st.none(), st.integers(0, 30)),
        "bad": st.one_of(st.none(), st.none(), st.none(), st.integers(0, len(BAD) - 1)),
        "salt": st.integers(0, 1),
    }
)


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[[str], Path]) -> Harness:
    """One for all examples: what an earlier one left in the cache is part of the test. About 14 blocks of 16."""
    bytes_per_token = 3 * 2 * 2 * 16 * 4
    options = {"slots": 5, "max_batch_tokens": 24, "kv_memory_bytes": 14 * 16 * bytes_per_token}
    return Harness(tiny_model("llama3"), options)


@pytest.fixture(scope="module")
def alone(tiny_model: Callable[[str], Path]) -> Alone:
    harness = Harness(tiny_model("llama3"), {"slots": 1, "prefix_cache": False})
    known: dict[tuple[int, int], list[int]] = {}

    def tokens(prompt: int, kind: int) -> list[int]:
        if (prompt, kind) not in known:
            known[prompt, kind] = harness.run(request("a", PROMPTS[prompt], LONGEST, **KINDS[kind]))["a"]
        return known[prompt, kind]

    return tokens


@settings(
    max_examples=max(1, SEQUENCES // PER_EXAMPLE),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(plans=st.lists(PLAN, min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
def test_nobody_notices_the_others(engine: Harness, alone: Alone, plans: list[dict[str, int]]):
    engine.tokens, engine.ends = {}, {}
    waiting = {str(n): plan for n, plan in enumerate(plans)}
    asked: dict[str, AddSequence] = {}
    step = 0
    while waiting or engine.has_work():
        for name, plan in list(waiting.items()):
            if plan["at"] <= step:
                asked[name] = _request(name, waiting.pop(name), alone)
                engine.inbox.append(asked[name])
        for name in asked:
            after = plans[int(name)]["cancel_after"]
            if after is not None and plans[int(name)]["at"] + after == step:
                engine.cancel(name)
        if engine.has_work():
            engine.loop.step()
            engine.loop._scheduler.check_integrity()
        step += 1
        assert step < 3000
    for name, item in asked.items():
        _check(engine, name, item, plans[int(name)], alone)
    assert engine.loop._blocks.num_available == engine.ready.kv_blocks_total
    assert not engine.loop._sequences


def _request(name: str, plan: dict[str, int], alone: Alone) -> AddSequence:
    prompt, kind = PROMPTS[plan["prompt"]], KINDS[plan["kind"]]
    if plan["bad"] is not None:
        bad = BAD[plan["bad"]]
        return request(
            name, bad.get("prompt", prompt), LONGEST, **{**kind, **{k: v for k, v in bad.items() if k != "prompt"}}
        )
    done = alone(plan["prompt"], plan["kind"])
    return request(name, prompt, LONGEST, output=done[: plan["kept"]], salt=str(plan["salt"]), **kind)


def _check(engine: Harness, name: str, item: AddSequence, plan: dict[str, int], alone: Alone) -> None:
    end = engine.ends[name]
    if plan["bad"] is not None:
        assert end.reason == "ERROR" or (end.reason == "CANCELLED" and plan["cancel_after"] is not None)
        assert engine.ids(name) == []
        return
    expected = alone(plan["prompt"], plan["kind"])[len(item.output_token_ids) :]
    got = engine.ids(name)
    assert got == expected[: len(got)]
    if end.reason == "CANCELLED":
        assert plan["cancel_after"] is not None
    else:
        assert got == expected
        assert end.reason in ("MAX_TOKENS", "EOS", "STOP_TOKEN")
        if end.reason == "EOS":
            assert [*item.output_token_ids, *got][-1] == EOS
