"""Attention in float64 over whole sequences: what every path is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker.engine.kv_cache import KVCache
from worker.engine.packed_batch import PackedBatch, Span


@dataclass
class Case:
    """Sequences with whole histories; the last `new` tokens of each are the batch."""

    lengths: list[int]
    new: list[int]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    window: int | None = None
    scale: float = 0.17


def reference(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, case: Case) -> torch.Tensor:
    """query [new, heads, size], keys and values [length, kv heads, size], in float64 → [new, heads, size]."""
    length, new = keys.shape[0], query.shape[0]
    groups = case.heads // case.kv_heads
    q = query.double()
    k = keys.double().repeat_interleave(groups, dim=1)
    v = values.double().repeat_interleave(groups, dim=1)
    position = torch.arange(length - new, length, device=q.device).unsqueeze(1)
    key = torch.arange(length, device=q.device).unsqueeze(0)
    hidden = key > position
    if case.window is not None:
        hidden |= key <= position - case.window
    scores = torch.einsum("qhd,khd->hqk", q, k) * case.scale
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def as_model(rows: torch.Tensor) -> torch.Tensor:
    """[rows, heads, size] → [1, heads, rows, size], as the models hand it over."""
    return rows.transpose(0, 1).unsqueeze(0)


def run_case(
    attention, cache: KVCache, case: Case, blocks: list[list[int]], seed: int = 0
) -> tuple[float, torch.Tensor]:
    """Store the histories, attend the new tokens together; the largest error, and the result [rows, heads, size]."""
    device, dtype = cache.pool.device, cache.shape.dtype
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    histories = [
        (
            draw(n, case.heads, case.head_dim),
            draw(n, case.kv_heads, case.head_dim),
            draw(n, case.kv_heads, case.head_dim),
        )
        for n in case.lengths
    ]
    spans: list[Span] = []
    row = 0
    for index in sorted(range(len(case.lengths)), key=lambda i: case.new[i] > 1):
        start = case.lengths[index] - case.new[index]
        rows = torch.tensor(cache.rows(blocks[index], 0, start), dtype=torch.int64, device=device)
        cache.write(0, rows, as_model(histories[index][1][:start]), as_model(histories[index][2][:start]))
        spans.append(Span(index, row, start, case.new[index], blocks[index]))
        row += case.new[index]
    singles = sum(1 for span in spans if span.count == 1)
    batch = PackedBatch([0] * row, [0] * row, spans, row, [], singles)

    def new_rows(part: int) -> torch.Tensor:
        return as_model(torch.cat([histories[span.chunk][part][span.start :] for span in spans]))

    with torch.inference_mode():
        out = attention.attend(
            attention.plan(batch), 0, new_rows(0), new_rows(1), new_rows(2), case.scale, case.window
        )[0].clone()
    expected = torch.cat(
        [reference(histories[s.chunk][0][s.start :], histories[s.chunk][1], histories[s.chunk][2], case) for s in spans]
    )
    return float((out.double() - expected).abs().max()), out


CASES = {
    "one token": Case([1], [1]),
    "decodes of many lengths": Case([1, 2, 31, 32, 33, 64, 100, 511, 512, 513, 700], [1] * 11),
    "equal decodes": Case([40] * 8, [1] * 8),
    "a prompt": Case([100], [100]),
    "a prompt over several tiles": Case([1100], [1100]),
    "chunks": Case([300, 70, 600], [44, 7, 130]),
    "everything": Case([10, 530, 90, 64, 300], [1, 1, 90, 64, 2]),
    "no grouping": Case([10, 70, 90], [1, 1, 90], heads=4, kv_heads=4),
    "one kv head": Case([10, 70, 90], [1, 1, 90], heads=6, kv_heads=1),
    "odd head size": Case([10, 70, 90], [1, 1, 90], head_dim=24),
    "head size 64": Case([10, 70, 300, 600], [1, 1, 90, 1], head_dim=64, heads=8),
    "head size 64, window": Case([10, 700, 300], [1, 1, 90], head_dim=64, heads=8, window=100),
    "head size 128, a prompt": Case([300, 1100], [1, 600], head_dim=128, heads=8),
    "head size 128": Case([10, 70, 300], [1, 1, 90], head_dim=128, heads=8),
    "window": Case([10, 70, 600, 1100, 90], [1, 1, 1, 1, 90], window=24),
    "window over a tile": Case([700, 1100, 900], [1, 200, 900], window=530),
    "window of one": Case([5, 40], [1, 12], window=1),
}
