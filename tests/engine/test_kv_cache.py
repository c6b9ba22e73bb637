"""The cache's memory: zero everywhere, and on a CPU taken from the machine only where something is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from worker.engine.kv_cache import KVCache, KVShape
from worker.engine.packed_batch import PackedBatch, Span
from worker.engine.sdpa_reads import MAX_VIEWS, SdpaReads

CPU = torch.device("cpu")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_is_taken_when_it_is_written():
    shape = KVShape(layers=2, kv_heads=4, head_dim=64, dtype=torch.float32)
    before = resident_bytes()
    cache = KVCache(shape, num_blocks=8192, block_tokens=16, device=CPU)
    assert cache.pool.numel() * 4 > 2**29
    keys = torch.ones(1, 4, 1, 64)
    cache.write(1, torch.tensor([8191 * 16]), keys, keys)
    assert resident_bytes() - before < 2**25
    assert cache.pool[1, :, 8191 * 16].eq(1).all()
    assert not cache.pool[:, :, cache.spare_row].any()  # reading takes none either


def test_views_are_kept_up_to_a_bound():
    layers = 8
    shape = KVShape(layers=layers, kv_heads=1, head_dim=8, dtype=torch.float32)
    cache = KVCache(shape, num_blocks=4096, block_tokens=16, device=CPU)
    reads = SdpaReads(cache, groups=1, tails=(64, 512), context_length=512)
    for block in range(cache.num_blocks):
        batch = PackedBatch([0], [0], [Span(0, 0, 0, 1, [block])], 1, [0], 1)
        assert reads.of(batch, None)[0].views is not None
        assert len(reads._views) * layers * 2 <= MAX_VIEWS
