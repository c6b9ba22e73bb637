"""Half precision has a largest number. Whoever goes beyond it is told so; the others' tokens don't change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.harness import Harness, prompts, request


@pytest.fixture
def harness(tiny_model: Callable[[str], Path]) -> Harness:
    return Harness(tiny_model("qwen3"), {"dtype": "float16", "slots": 4})


def overflow_behind(harness: Harness, prompt: list[int], token: int) -> None:
    """Change the output layer so that one logit behind `prompt`, and hardly any other, is beyond float16."""
    head = harness.loop._runner._head
    seen: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].clone()))
    harness.run(request("look", prompt, 1))
    handle.remove()
    state = seen[0].float()
    with torch.no_grad():
        head.weight[token] = (90_000 * state / state.square().sum()).half()
    assert (head.weight.float() @ state).max() > torch.finfo(torch.float16).max


@pytest.mark.parametrize("logprobs", [None, 3])
def test_an_output_layer_that_overflows_costs_one_request(harness: Harness, logprobs: int | None):
    guilty, *others = prompts(4, (33, 12, 20, 7))
    overflow_behind(harness, guilty, token=70)
    asked = [request(str(n), prompt, 6, logprobs=logprobs) for n, prompt in enumerate(others)]
    alone: dict[str, list[int]] = {}
    for item in asked:
        alone.update(harness.run(item))
    got = harness.run(request("guilty", guilty, 6, logprobs=logprobs), *asked)
    assert got.pop("guilty") == []
    end = harness.ends["guilty"]
    assert (end.reason, end.error_code) == ("ERROR", "INTERNAL")
    assert "try another dtype (float32 or bfloat16)" in (end.error or "")
    assert got == alone
    assert all(harness.ends[name].reason == "MAX_TOKENS" for name in alone)
    for line in harness.tokens.values():
        for token in line:
            values = [token.logprob, *(value for _, value in token.top or [])]
            assert logprobs is None or all(value is not None and value <= 0 for value in values)


def test_the_same_request_runs_in_float32(harness: Harness, tiny_model: Callable[[str], Path]):
    guilty = prompts(1, (33,))[0]
    exact = Harness(tiny_model("qwen3"), {"slots": 4})
    with torch.no_grad():
        exact.loop._runner._head.weight[70] *= 1e6
    got = exact.run(request("fine", guilty, 6, logprobs=2))
    assert len(got["fine"]) == 6
