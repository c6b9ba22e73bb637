"""What the paged kernels are told, checked with a kernel made of plain products that follows the same contract."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.engine.reference_attention import CASES, Case, reference, run_case
from worker.engine.attention_paged import PAGED_BLOCK_TOKENS, PagedAttention, Part, flash_attn_kernel
from worker.engine.kv_cache import KVCache, KVShape


def plain_kernel(query, keys, values, part: Part, scale, window):
    """Reads through the tables only, as flash-attn documents them."""
    assert part.block_table.dtype == part.lengths.dtype == part.query_starts.dtype == torch.int32
    outputs = []
    for index, length in enumerate(part.lengths.tolist()):
        first, last = part.query_starts[index : index + 2].tolist()
        assert int(part.key_starts[index + 1] - part.key_starts[index]) == length
        table = part.block_table[index].long()
        k, v = (pages[table].flatten(0, 1)[:length] for pages in (keys, values))
        case = CASES["one token"].__class__(
            [length], [last - first], query.shape[1], keys.shape[2], query.shape[2], None, scale
        )
        case.window = None if window[0] == -1 else window[0] + 1
        assert window[1] == (-1 if window[0] == -1 and part.longest_query == 1 else 0)
        outputs.append(reference(query[first:last], k, v, case).float())
    assert part.longest_keys == int(part.lengths.max())
    return torch.cat(outputs)


@pytest.mark.parametrize("name", CASES)
def test_tables_lead_to_the_right_tokens(name):
    case = CASES[name]
    shape = KVShape(1, case.kv_heads, case.head_dim, torch.float32)
    cache = KVCache(shape, num_blocks=64, block_tokens=PAGED_BLOCK_TOKENS, device=torch.device("cpu"))
    blocks = []
    free = list(range(63, -1, -1))
    for length in case.lengths:
        count = -(-length // PAGED_BLOCK_TOKENS)
        blocks.append(free[:count])
        del free[:count]
    error, _ = run_case(PagedAttention(cache, plain_kernel), cache, case, blocks)
    assert error < 1e-5


def recorded(window: int | None) -> list[tuple[int, tuple[int, int]]]:
    """(longest query, window) of every kernel call for two single tokens and a chunk."""
    case = Case([10, 70, 300], [1, 1, 90], window=window)
    cache = KVCache(KVShape(1, 2, 32, torch.float32), num_blocks=8, block_tokens=256, device=torch.device("cpu"))
    calls: list[tuple[int, tuple[int, int]]] = []

    def kernel(query, keys, values, part: Part, scale, window):
        calls.append((part.longest_query, window))
        return plain_kernel(query, keys, values, part, scale, window)

    run_case(PagedAttention(cache, kernel), cache, case, [[7], [6], [5, 4]])
    return calls


def test_single_tokens_have_no_window_so_that_grouped_heads_share_their_keys():
    assert recorded(None) == [(1, (-1, -1)), (90, (-1, 0))]
    assert recorded(24) == [(1, (23, 0)), (90, (23, 0))]


def flash_attn_calls(monkeypatch, *, one_split: bool, knows_splits: bool) -> list[tuple[str, dict[str, Any]]]:
    """What flash-attn's two functions are told besides tensors; a module of that name answers with zeroes."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def with_kvcache(q, k, v, cache_seqlens, block_table, num_splits=0, **options):
        calls.append(("single", {"num_splits": num_splits, **options}))
        return torch.zeros_like(q)

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, block_table, **options):
        calls.append(("several", options))
        return torch.zeros_like(q)

    def varlen_with_splits(q, k, v, cu_q, cu_k, max_q, max_k, block_table, num_splits=0, **options):
        return varlen(q, k, v, cu_q, cu_k, max_q, max_k, block_table, num_splits=num_splits, **options)

    module: Any = ModuleType("flash_attn")
    module.flash_attn_with_kvcache = with_kvcache
    module.flash_attn_varlen_func = varlen_with_splits if knows_splits else varlen
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    case = Case([10, 70, 300], [1, 1, 90])
    cache = KVCache(KVShape(1, 2, 32, torch.float32), num_blocks=8, block_tokens=256, device=torch.device("cpu"))
    run_case(PagedAttention(cache, flash_attn_kernel(one_split=one_split)), cache, case, [[7], [6], [5, 4]])
    return calls


@pytest.mark.parametrize("one_split", [False, True])
def test_flash_attn_splits_single_tokens_unless_it_must_not(monkeypatch, one_split):
    common = {"softmax_scale": 0.17, "causal": True}
    assert flash_attn_calls(monkeypatch, one_split=one_split, knows_splits=True) == [
        ("single", {"num_splits": int(one_split), "window_size": (-1, -1), **common}),
        ("several", {"num_splits": 1, "window_size": (-1, 0), **common}),
    ]
    calls = flash_attn_calls(monkeypatch, one_split=one_split, knows_splits=False)
    assert calls[1] == ("several", {"window_size": (-1, 0), **common})
