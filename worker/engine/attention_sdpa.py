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

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from worker.engine.kv_cache import KVCache
from worker.engine.packed_batch import PackedBatch
from worker.engine.scheduler import Chunk
from worker.engine.sdpa_reads import ROWS, TILE, Read, SdpaReads


class SdpaPlan:
    """What every layer of one forward pass shares: where its rows go, its reads by window, and two buffers.

    `queries` [single tokens, kv heads, query rows, size] takes the single tokens' queries, `out` [rows, kv heads,
    groups, size] the results; each layer writes them anew, so the rows of padding stay zero.
    """

    def __init__(self, batch: PackedBatch, rows: torch.Tensor, queries: torch.Tensor, out: torch.Tensor) -> None:
        groups = out.shape[2]
        self.batch = batch
        self.rows = rows
        self.queries = queries
        self.queries_in = queries[:, :, :groups].permute(1, 2, 0, 3)
        self.out = out
        self.singles_out = out[: batch.num_decodes]
        self.result = out.flatten(1, 2).unsqueeze(0)
        self.singles: dict[int | None, list[tuple[torch.Tensor, Read]]] = {}
        self.chunks: dict[int | None, list[Read]] = {}


class SdpaAttention:
    """Gives every sequence the same numbers whoever else is in the batch, on a CPU in float32."""

    def __init__(
        self, cache: KVCache, *, num_heads: int, context_length: int, aligned_masks: bool | None = None
    ) -> None:
        shape = cache.shape
        self._cache = cache
        self._groups = num_heads // shape.kv_heads
        rows, tails = 1, (64, 128, 256, TILE)
        if cache.pool.device.type == "cpu":
            rows, tails = safe_shapes(shape.kv_heads, shape.head_dim, shape.dtype)
        self._query_rows = -(-self._groups // rows) * rows
        self._reads = SdpaReads(
            cache, groups=self._groups, tails=tails, context_length=context_length, aligned_masks=aligned_masks
        )

    def rank(self, chunk: Chunk) -> tuple[int, int]:
        """Sequences of a length stand together, in the order in which they lie in the cache."""
        return self._reads.padded_length(chunk.start + chunk.count), chunk.sequence.blocks[0]

    def plan(self, batch: PackedBatch) -> SdpaPlan:
        """Prepare a forward pass; layers add what depends on their window when they first need it."""
        rows = [row for span in batch.spans for row in self._cache.rows(span.blocks, span.start, span.count)]
        rows.extend([self._cache.spare_row] * (batch.num_rows - len(rows)))
        shape = self._cache.shape
        options: dict[str, Any] = {"dtype": shape.dtype, "device": self._cache.pool.device}
        return SdpaPlan(
            batch,
            torch.tensor(rows, device=self._cache.pool.device),
            torch.zeros(batch.num_decodes, shape.kv_heads, self._query_rows, shape.head_dim, **options),
            torch.zeros(batch.num_rows, shape.kv_heads, self._groups, shape.head_dim, **options),
        )

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
        """Store the new keys and values [1, kv heads, rows, size], then attend `query` [1, heads, rows, size].

        Returns [1, rows, heads, size], good until the next call; padding rows are zero.
        """
        self._cache.write(layer, plan.rows, keys, values)
        if window not in plan.singles:
            self._add_reads(plan, window)
        _, heads, rows, size = query.shape
        grouped = query.view(heads // self._groups, self._groups, rows, size)
        singles = plan.singles[window]
        if singles:
            count = plan.batch.num_decodes
            plan.queries_in.copy_(grouped if count == rows else grouped[:, :, :count])
            attended: list[torch.Tensor] = []
            for queries, read in singles:
                k, v = self._keys_values(read, layer)
                mask = self._reads.mask_of(read)
                attended.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=scale))
            whole = attended[0] if len(attended) == 1 else torch.cat(attended)
            plan.singles_out.copy_(whole[:, :, : self._groups])
        for read in plan.chunks[window]:
            plan.out[read.row : read.row + read.count] = self._attend_chunk(read, layer, grouped, scale)
        return plan.result

    def _add_reads(self, plan: SdpaPlan, window: int | None) -> None:
        reads = self._reads.of(plan.batch, window)
        plan.singles[window] = [(plan.queries[r.row : r.row + r.count], r) for r in reads if r.single]
        plan.chunks[window] = [read for read in reads if not read.single]

    def _attend_chunk(self, read: Read, layer: int, grouped: torch.Tensor, scale: float) -> torch.Tensor:
        k, v = self._keys_values(read, layer)
        tile = grouped[:, :, read.row : read.row + read.count]
        kv_heads, size = tile.shape[0], tile.shape[3]
        rows = self._groups * read.count
        packed = tile.reshape(1, kv_heads, rows, size)
        packed = F.pad(packed, (0, 0, 0, -rows % ROWS))
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=self._reads.mask_of(read), scale=scale)
        return out[0, :, :rows].view(kv_heads, self._groups, read.count, size).permute(2, 0, 1, 3)

    def _keys_values(self, read: Read, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if read.views is not None:
            return read.views[2 * layer], read.views[2 * layer + 1]
        pair = self._cache.pool[layer]
        pieces = torch.cat([pair[:, first : first + rows] for first, rows in read.runs], dim=1)
        keys, values = pieces.transpose(1, 2).unsqueeze(1).unbind(0)
        return keys, values


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
