"""What the paged kernels are told, checked with a kernel made of plain products that follows the same contract."""

from __future__ import annotations

import pytest
import torch

from tests.engine.reference_attention import CASES, reference, run_case
from worker.engine.attention_paged import PAGED_BLOCK_TOKENS, PagedAttention, Part
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
        case.window = None if window == (-1, 0) else window[0] + 1
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
