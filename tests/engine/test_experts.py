"""Each way to run experts gives what transformers' own loop gives, and each device gets its way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from tests.engine.harness import CONFIGS, Harness, generate, prompts, reference, request, write_tiny_model
from worker.engine import experts
from worker.engine.experts import EXPERTS_NAME, fits_grouped, register_experts, run_by_rows, run_grouped

MOE = next(name for name, config in CONFIGS.items() if isinstance(config(), Qwen3MoeConfig))


def layer(implementation: str = "eager") -> Any:
    torch.manual_seed(0)
    config = CONFIGS[MOE]()
    config._experts_implementation = implementation
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.model.layers[0].mlp.experts


@pytest.mark.parametrize("way", [run_by_rows, run_grouped])
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_every_way_gives_what_transformers_own_gives(way, tokens):
    module = layer()
    count, size = module.num_experts, module.gate_up_proj.shape[-1]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, size, generator=generator)
    weights, chosen = torch.rand(tokens, count, generator=generator).topk(2, dim=-1)
    with torch.inference_mode():
        expected = module(hidden, chosen, weights)
        torch.testing.assert_close(way(module, hidden, chosen, weights), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "name"), [("cpu", EXPERTS_NAME), ("cuda", EXPERTS_NAME), ("mps", "eager")], ids=lambda value: value
)
def test_each_device_gets_its_way(device, name):
    assert register_experts(torch.device(device)) == name
    assert layer(name).config._experts_implementation == name, "transformers knows the name"


@pytest.mark.parametrize(
    ("columns", "dtype", "fits"),
    [(4, torch.float32, True), (6, torch.float32, False), (8, torch.bfloat16, True), (12, torch.bfloat16, False)],
)
def test_rows_that_begin_off_16_bytes_arent_grouped(columns, dtype, fits):
    module = layer()
    module.down_proj = torch.nn.Parameter(torch.zeros(2, 8, columns, dtype=dtype))
    assert fits_grouped(module) is fits


def test_an_engine_over_grouped_products_generates_the_same(monkeypatch, tmp_path):
    """What a CUDA device runs, on a CPU."""
    monkeypatch.setattr(experts, "run_by_rows", run_grouped)
    write_tiny_model(CONFIGS[MOE](), tmp_path)
    model, asked = reference(tmp_path), prompts(3)
    harness = Harness(tmp_path, {})
    got = harness.run(*(request(str(n), prompt, 12) for n, prompt in enumerate(asked)))
    assert [got[str(n)] for n in range(3)] == [generate(model, prompt, 12) for prompt in asked]
