"""The whole engine on a CUDA device: float32 against `generate`, half precision to the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.harness import CONFIGS, Harness, generate, prompts, reference, request, write_tiny_model

pytestmark = pytest.mark.gpu

PROMPTS = prompts(8)
NEW = 16


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_float32_equals_generate(cuda, tmp_path: Path, name):
    write_tiny_model(CONFIGS[name](), tmp_path)
    model = reference(tmp_path)
    expected = [generate(model, prompt, NEW) for prompt in PROMPTS]
    harness = Harness(tmp_path, {"device": "cuda", "dtype": "float32", "slots": 8})
    got = harness.run(*(request(str(n), p, NEW) for n, p in enumerate(PROMPTS)))
    assert [got[str(n)] for n in range(len(PROMPTS))] == expected


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_bfloat16_runs_to_the_end_with_the_best_attention(cuda, tmp_path: Path, name):
    write_tiny_model(CONFIGS[name](), tmp_path)
    harness = Harness(tmp_path, {"device": "cuda", "dtype": "bfloat16", "slots": 8})
    got = harness.run(*(request(str(n), p, NEW, temperature=1.0, seed=n) for n, p in enumerate(PROMPTS)))
    assert all(len(line) == NEW for line in got.values())
    assert harness.ready.vram_bytes > 0


def test_the_cache_is_sized_by_what_is_free(cuda, tmp_path: Path):
    write_tiny_model(CONFIGS["llama3"](), tmp_path)
    harness = Harness(tmp_path, {"device": "cuda", "dtype": "bfloat16", "slots": 4, "kv_memory_bytes": 0})
    assert harness.ready.context_length == 2048
    assert harness.ready.kv_blocks_total * harness.ready.kv_block_tokens >= 2048
    assert torch.cuda.memory_reserved() < torch.cuda.get_device_properties(0).total_memory
