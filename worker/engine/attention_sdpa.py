"""Attention through torch's scaled_dot_product_attention: for CPUs, and for any device without a paged kernel.

Read `SdpaAttention.attend` first. What a row of the batch gets must depend on its own sequence alone, down to the last
bit, or a seed would mean something else in another batch. Three habits give that on a CPU in float32:

    query rows are padded to a multiple of 4,   matrix products over fewer rows take another path
    or of 8, whichever is enough here
    key/value lengths are padded to `tails`     a shorter reduction may be cut into other pieces; which lengths are
                                                safe is measured at start, 512 (torch's own tile) always is
    a view begins at a multiple of 512          torch walks the keys in tiles of 512 from the view's beginning

Padding is masked with -inf and adds exact zeroes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from worker.engine.kv_cache import KVCache
from worker.engine.packed_batch import PackedBatch, Span

TILE = 512
ROWS = 8
QUERY_TILE = 64
"""Tokens of a prefill chunk that are attended together; keys past the tile's last token are left out."""


@dataclass(slots=True)
class _Read:
    """One call of the kernel: `count` tokens from `row` on, their keys and values of each layer, and the mask."""

    row: int
    count: int
    length: int
    mask: torch.Tensor
    views: tuple[torch.Tensor, ...] | None
    """Keys and values of layer 0, 1, ... where the blocks lie side by side; None where they have to be gathered."""
    runs: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])


class SdpaPlan:
    """What every layer of one forward pass shares, by window."""

    def __init__(self, batch: PackedBatch, rows: torch.Tensor) -> None:
        self.batch = batch
        self.rows = rows
        self.reads: dict[int | None, list[_Read]] = {}


class SdpaAttention:
    """Reads each sequence's keys and values where they lie if they are in one piece, and gathers them if not."""

    def __init__(self, cache: KVCache, *, num_heads: int, context_length: int) -> None:
        self._cache = cache
        self._groups = num_heads // cache.shape.kv_heads
        self._device = cache.pool.device
        if self._device.type == "cpu":
            rows, self._tails = safe_shapes(cache.shape.kv_heads, cache.shape.head_dim, cache.shape.dtype)
        else:
            rows, self._tails = 1, (64, 128, 256, TILE)
        self._query_rows = -(-self._groups // rows) * rows
        self._mask_length = -(-(context_length + 1) // TILE) * TILE
        self._masks: dict[int | None, torch.Tensor] = {}

    def plan(self, batch: PackedBatch) -> SdpaPlan:
        """Prepare a forward pass; layers add what depends on their window when they first need it."""
        rows = [row for span in batch.spans for row in self._cache.rows(span.blocks, span.start, span.count)]
        rows.extend([self._cache.spare_row] * (batch.num_rows - len(rows)))
        return SdpaPlan(batch, torch.tensor(rows, device=self._device))

    def attend(
        self,
        plan: SdpaPlan,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Store the new keys and values [rows, kv heads, head size], then attend `query` [rows, heads, head size].

        Returns [rows, heads, head size]; padding rows are zero.
        """
        self._cache.write(layer, plan.rows, keys, values)
        reads = plan.reads.get(window)
        if reads is None:
            reads = plan.reads[window] = [read for span in plan.batch.spans for read in self._reads(span, window)]
        rows, heads, size = query.shape
        grouped = query.view(rows, heads // self._groups, self._groups, size)
        decodes = plan.batch.num_decodes
        padded = F.pad(grouped[:decodes], (0, 0, 0, self._query_rows - self._groups))
        outputs: list[torch.Tensor] = []
        for index, read in enumerate(reads[:decodes]):
            k, v = self._keys_values(read, layer)
            outputs.append(
                F.scaled_dot_product_attention(padded[index : index + 1], k, v, attn_mask=read.mask, scale=scale)
            )
        attended = [torch.cat(outputs)[:, :, : self._groups]] if outputs else []
        for read in reads[decodes:]:
            attended.append(self._attend_chunk(read, layer, grouped, scale))
        attended.append(grouped.new_zeros((rows - plan.batch.num_tokens, *grouped.shape[1:])))
        return torch.cat(attended).view(rows, heads, size)

    def _attend_chunk(self, read: _Read, layer: int, grouped: torch.Tensor, scale: float) -> torch.Tensor:
        k, v = self._keys_values(read, layer)
        tile = grouped[read.row : read.row + read.count]
        kv_heads, size = tile.shape[1], tile.shape[3]
        rows = self._groups * read.count
        packed = tile.permute(1, 2, 0, 3).reshape(1, kv_heads, rows, size)
        packed = F.pad(packed, (0, 0, 0, -rows % ROWS))
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=read.mask, scale=scale)
        return out[0, :, :rows].view(kv_heads, self._groups, read.count, size).permute(2, 0, 1, 3)

    def _keys_values(self, read: _Read, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if read.views is not None:
            return read.views[2 * layer], read.views[2 * layer + 1]
        pair = self._cache.pool[layer]
        pieces = torch.cat([pair[:, first : first + length] for first, length in read.runs], dim=1)
        keys, values = pieces.transpose(1, 2).unsqueeze(1).unbind(0)
        return keys, values

    def _reads(self, span: Span, window: int | None) -> Iterator[_Read]:
        for start in range(span.start, span.end, QUERY_TILE):
            end = min(start + QUERY_TILE, span.end)
            first = 0 if window is None else max(0, start + 1 - window) // TILE * TILE
            length = padded_length(end - first, self._tails)
            row = span.row + start - span.start
            if span.count == 1:
                mask = self._decode_mask(end - first, length, window)
            else:
                mask = self._chunk_mask(start, end, first, length, window)
            yield self._read(row, end - start, span.blocks, first, end, length, mask)

    def _read(
        self, row: int, count: int, blocks: list[int], first: int, end: int, length: int, mask: torch.Tensor
    ) -> _Read:
        size = self._cache.block_tokens
        held = blocks[first // size : -(-end // size)]
        offset = first % size
        if held[-1] - held[0] == len(held) - 1 and all(b - a == 1 for a, b in pairwise(held)):
            return _Read(row, count, length, mask, self._views(held[0] * size + offset, length))
        runs: list[tuple[int, int]] = []
        for block in held:
            if runs and runs[-1][0] + runs[-1][1] == block * size:
                runs[-1] = (runs[-1][0], runs[-1][1] + size)
            else:
                runs.append((block * size, size))
        runs[0] = (runs[0][0] + offset, runs[0][1] - offset)
        excess = sum(n for _, n in runs) - length
        if excess > 0:
            runs[-1] = (runs[-1][0], runs[-1][1] - excess)
        elif excess < 0:
            runs.append((self._cache.spare_row, -excess))
        return _Read(row, count, length, mask, None, runs)

    def _views(self, row: int, length: int) -> tuple[torch.Tensor, ...]:
        pool = self._cache.pool
        layers, _, rows, heads, size = pool.shape
        shape = (layers * 2, 1, heads, length, size)
        strides = (rows * heads * size, heads * size * length, size, heads * size, 1)
        return pool.as_strided(shape, strides, row * heads * size).unbind(0)

    def _decode_mask(self, visible: int, length: int, window: int | None) -> torch.Tensor:
        """[1, 1, 1, length]: zero for the last `window` of `visible` keys, -inf elsewhere; a view, nothing is built."""
        line = self._masks.get(window)
        if line is None:
            line = torch.full((2 * self._mask_length,), -torch.inf, dtype=self._cache.shape.dtype, device=self._device)
            line[max(0, self._mask_length - (window or self._mask_length)) : self._mask_length] = 0
            self._masks[window] = line
        start = self._mask_length - visible
        return line[start : start + length].view(1, 1, 1, length)

    def _chunk_mask(self, start: int, end: int, first: int, length: int, window: int | None) -> torch.Tensor:
        """[1, 1, groups x tokens padded to 8, length]: causal, and within the window."""
        position = torch.arange(start, end, device=self._device).unsqueeze(1)
        key = torch.arange(first, first + length, device=self._device).unsqueeze(0)
        hidden = key > position
        if window is not None:
            hidden |= key <= position - window
        mask = torch.zeros(hidden.shape, dtype=self._cache.shape.dtype, device=self._device)
        mask = mask.masked_fill_(hidden, -torch.inf).repeat(self._groups, 1)
        return F.pad(mask, (0, 0, 0, -mask.shape[0] % ROWS)).view(1, 1, -1, length)


def padded_length(length: int, tails: tuple[int, ...]) -> int:
    """The shortest permitted key length >= `length`: whole tiles and one of the ascending `tails`."""
    whole, rest = divmod(length, TILE)
    if rest == 0:
        return length
    return whole * TILE + next(tail for tail in tails if tail >= rest)


def safe_shapes(kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[int, tuple[int, ...]]:
    """Query rows (4 or 8), and key lengths up to TILE, whose results equal those of any larger ones bit by bit here.

    A matrix library may cut a reduction over 256 numbers in other places than one over 512. It decides by size alone,
    so a handful of trials settles it.
    """
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, kv_heads, TILE, head_dim, generator=generator).to(dtype).unbind(0)
    query = torch.randn(1, kv_heads, 64, head_dim, generator=generator).to(dtype)

    def attend(rows: int, length: int, visible: int) -> torch.Tensor:
        mask = torch.zeros(1, 1, 1, length, dtype=dtype)
        mask[..., visible:] = -torch.inf
        return F.scaled_dot_product_attention(
            query[:, :, :rows], keys[:, :, :length], values[:, :, :length], attn_mask=mask
        )

    def safe(rows: int, tail: int) -> bool:
        return all(
            torch.equal(attend(rows, tail, visible), attend(64, TILE, visible)[:, :, :rows])
            for visible in (tail - 29, tail - 11, tail)
        )

    rows = 4 if safe(4, TILE) else ROWS
    return rows, (*(tail for tail in range(32, TILE, 32) if safe(rows, tail) and safe(64, tail)), TILE)
