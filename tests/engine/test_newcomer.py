"""A newcomer's first token while others decode a long text: its own prompt's steps, and no more than three others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.harness import prompts
from worker.engine.assemble import EngineOptions, build_engine
from worker.engine.newcomer import Stepper, measure_newcomers

BUDGET, BESIDE = 64, 16


@pytest.mark.parametrize("length", [1, 40, 48, 49, 500])
def test_a_newcomer_waits_for_its_own_prompt_and_not_for_the_others(tiny_model: Callable[[str], Path], length: int):
    channel = Stepper()
    options = EngineOptions(
        model_dir=tiny_model("llama3"),
        device="cpu",
        slots=BESIDE + 1,
        max_batch_tokens=BUDGET,
        kv_memory_bytes=64 * 2**20,
    )
    engine = build_engine(options, channel)
    long_texts = prompts(BESIDE, (600,))
    runs = measure_newcomers(engine.loop.step, channel, long_texts, prompts(2, (length,), seed=9), salt="")
    own_steps = -(-length // (BUDGET - BESIDE))
    for run in runs:
        assert run.steps <= 3 + own_steps
        assert run.steps == own_steps  # it is in the very next step, and each step takes as much of it as fits
    assert all(channel.tokens[f"running {n}"] > 2 * own_steps for n in range(BESIDE))  # nobody stood still meanwhile
