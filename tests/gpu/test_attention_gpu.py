"""Each attention path on its own hardware against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from tests.engine.reference_attention import CASES, run_case
from worker.engine.attention import candidates, choose_attention
from worker.engine.kv_cache import KVCache, KVShape

pytestmark = pytest.mark.gpu

LIMITS = {torch.float32: 2e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def build(name: str, case, dtype: torch.dtype, device: torch.device):
    shape = KVShape(1, case.kv_heads, case.head_dim, dtype)
    reason = next(c for c in candidates() if c.name == name).unavailable(shape, device)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")  # only for what this GPU or this installation can't have
    backend = choose_attention(name, case.heads, shape, device)  # a self-test that fails fails the test
    size = backend.block_tokens or 16
    cache = KVCache(shape, num_blocks=8192 // size, block_tokens=size, device=device)
    return backend.build(cache, 2048), cache


def scattered(case, cache: KVCache) -> list[list[int]]:
    free = list(range(cache.num_blocks - 1, -1, -1))
    blocks = []
    for length in case.lengths:
        count = -(-length // cache.block_tokens)
        blocks.append(free[:count])
        del free[:count]
    return blocks


@pytest.mark.parametrize("case_name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["flash_attn", "torch_varlen", "sdpa"])
def test_equals_the_reference(cuda, name, dtype, case_name):
    case = CASES[case_name]
    attention, cache = build(name, case, dtype, cuda)
    error, _ = run_case(attention, cache, case, scattered(case, cache))
    assert error < LIMITS[dtype]


@pytest.mark.parametrize("case_name", CASES)
def test_sdpa_in_float32(cuda, case_name):
    case = CASES[case_name]
    attention, cache = build("sdpa", case, torch.float32, cuda)
    error, _ = run_case(attention, cache, case, scattered(case, cache))
    assert error < LIMITS[torch.float32]


@pytest.mark.parametrize("name", ["flash_attn", "torch_varlen"])
def test_a_prompt_in_pieces(cuda, name):
    whole = CASES["a prompt over several tiles"]
    attention, cache = build(name, whole, torch.bfloat16, cuda)
    blocks = scattered(whole, cache)
    _, expected = run_case(attention, cache, whole, blocks)
    for new in (1, 2, 100, 1099):
        part = whole.__class__(whole.lengths, [new])
        _, out = run_case(attention, cache, part, blocks)
        assert float((out - expected[-new:]).abs().max()) < LIMITS[torch.bfloat16]
