"""What one call of scaled_dot_product_attention reads: which rows of the cache, as which tensors, under which mask.

Read `SdpaReads.of` first. Blocks that lie side by side are read where they are, as a strided view of the pool; several
sequences whose places are evenly spaced, by one call. Blocks that are scattered (a prefix shared with another sequence,
a full cache) are gathered. All three give the same numbers, bit by bit: they only differ in what is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from worker.engine.kv_cache import KVCache
from worker.engine.packed_batch import PackedBatch, Span

TILE = 512
"""torch walks the keys of a call in tiles of this many."""
ROWS = 8
QUERY_TILE = 64
"""Tokens of a prefill chunk that are attended together; keys past the tile's last token are left out."""

KEPT_MASK_BYTES = 64 * 2**20
"""Masks of prefill chunks that a pass keeps for all its layers; what goes beyond is made anew by each layer, tile by
tile, so that a long context doesn't take as much memory for masks as for its keys."""

MAX_VIEWS = 32_768
"""Tensors kept at most (about 15 MB): two a layer for each place and length."""


@dataclass(frozen=True, slots=True)
class Causal:
    """Which mask a tile of a chunk needs: tokens [start, end) over keys [first, first + length)."""

    start: int
    end: int
    first: int
    length: int
    window: int | None


@dataclass(slots=True)
class Read:
    """One call: `count` tokens from row `row` on, or `count` sequences' single tokens (`single`)."""

    row: int
    count: int
    single: bool
    mask: torch.Tensor | Causal
    """As a `Causal` where it isn't kept: `SdpaReads.mask_of` gives the tensor."""
    views: tuple[torch.Tensor, ...] | None
    """Keys and values of layer 0, 1, ...; None where they have to be gathered from `runs` (first row, rows)."""
    runs: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])


@dataclass(slots=True)
class _Place:
    """Where a span's visible keys are: `length` rows from `row` on, or scattered over `runs`."""

    row: int
    length: int
    visible: int
    runs: list[tuple[int, int]] | None


class SdpaReads:
    """Makes the reads of a batch. Keeps masks and views, which are the same again and again.

    `aligned_masks`: every mask in memory of its own. CUDA's memory-efficient kernel reads a mask 16 bytes at a time
    and refuses, or misreads, one that begins elsewhere. On a CPU, where any place will do, the masks of single tokens
    are slices of one line.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        groups: int,
        tails: tuple[int, ...],
        context_length: int,
        aligned_masks: bool | None = None,
    ) -> None:
        self._cache = cache
        self._groups = groups
        self._aligned_masks = cache.pool.device.type != "cpu" if aligned_masks is None else aligned_masks
        self._tails = tails
        self._mask_length = -(-(context_length + 1) // TILE) * TILE
        self._masks: dict[int | None, torch.Tensor] = {}
        self._scratch: torch.Tensor | None = None
        self._views: dict[tuple[int, int, int, int], tuple[torch.Tensor, ...]] = {}

    def of(self, batch: PackedBatch, window: int | None) -> list[Read]:
        """The reads of all rows but the padding, single tokens first."""
        reads = list(self._singles(batch.spans[: batch.num_decodes], window))
        room = KEPT_MASK_BYTES
        for span in batch.spans[batch.num_decodes :]:
            for read in self._chunk(span, window):
                assert isinstance(read.mask, Causal)
                size = self._chunk_rows(read.count) * read.mask.length
                room -= size * self._cache.shape.dtype.itemsize
                if room >= 0:
                    read.mask = self._chunk_mask(read.mask, self._cache.pool.new_zeros(size))
                reads.append(read)
        return reads

    def mask_of(self, read: Read) -> torch.Tensor:
        """The mask of a read: the one it keeps, or one that is good until the next call."""
        if isinstance(read.mask, torch.Tensor):
            return read.mask
        size = self._chunk_rows(read.count) * read.mask.length
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = None  # the old one goes before the new one comes
            self._scratch = self._cache.pool.new_empty(size)
        return self._chunk_mask(read.mask, self._scratch[:size].zero_())

    def padded_length(self, length: int) -> int:
        """The shortest permitted number of keys that is at least `length`: whole tiles and one of the tails."""
        whole, rest = divmod(length, TILE)
        return length if rest == 0 else whole * TILE + next(tail for tail in self._tails if tail >= rest)

    def _singles(self, spans: list[Span], window: int | None) -> Iterator[Read]:
        places = [self._place(span, span.start, span.end, window) for span in spans]
        index = 0
        while index < len(places):
            count = _evenly_spaced(places, index)
            group, first = places[index : index + count], places[index]
            mask = self._single_masks([place.visible for place in group], first.length, window)
            if first.runs is not None:
                yield Read(spans[index].row, 1, True, mask, None, first.runs)
            else:
                stride = group[1].row - first.row if count > 1 else 0
                yield Read(spans[index].row, count, True, mask, self._view(first.row, stride, count, first.length))
            index += count

    def _chunk(self, span: Span, window: int | None) -> Iterator[Read]:
        for start in range(span.start, span.end, QUERY_TILE):
            end = min(start + QUERY_TILE, span.end)
            place = self._place(span, start, end, window)
            mask = Causal(start, end, end - place.visible, place.length, window)
            views = self._view(place.row, 0, 1, place.length) if place.runs is None else None
            yield Read(span.row + start - span.start, end - start, False, mask, views, place.runs or [])

    def _place(self, span: Span, start: int, end: int, window: int | None) -> _Place:
        """The keys that tokens [start, end) may see, from a whole tile on."""
        first = 0 if window is None else max(0, start + 1 - window) // TILE * TILE
        length = self.padded_length(end - first)
        size = self._cache.block_tokens
        held = span.blocks[first // size : -(-end // size)]
        if held[-1] - held[0] == len(held) - 1 and all(b - a == 1 for a, b in pairwise(held)):
            return _Place(held[0] * size + first % size, length, end - first, None)
        return _Place(-1, length, end - first, self._runs(held, first % size, length))

    def _runs(self, held: list[int], offset: int, length: int) -> list[tuple[int, int]]:
        """Rows of scattered blocks in order, as (first row, rows), cut or filled up to `length`."""
        size = self._cache.block_tokens
        runs: list[tuple[int, int]] = []
        for block in held:
            if runs and runs[-1][0] + runs[-1][1] == block * size:
                runs[-1] = (runs[-1][0], runs[-1][1] + size)
            else:
                runs.append((block * size, size))
        runs[0] = (runs[0][0] + offset, runs[0][1] - offset)
        excess = sum(rows for _, rows in runs) - length
        if excess > 0:
            runs[-1] = (runs[-1][0], runs[-1][1] - excess)
        elif excess < 0:
            runs.append((self._cache.spare_row, -excess))
        return runs

    def _view(self, row: int, stride: int, count: int, length: int) -> tuple[torch.Tensor, ...]:
        """Keys and values of every layer, each [count, kv heads, length, size], `stride` rows between sequences."""
        key = (row, stride, count, length)
        found = self._views.get(key)
        if found is None:
            pool = self._cache.pool
            layers, _, rows, heads, size = pool.shape
            if len(self._views) * layers * 2 >= MAX_VIEWS:
                self._views.clear()
            shape = (layers * 2, count, heads, length, size)
            strides = (rows * heads * size, stride * heads * size, size, heads * size, 1)
            found = self._views[key] = pool.as_strided(shape, strides, row * heads * size).unbind(0)
        return found

    def _single_masks(self, visible: list[int], length: int, window: int | None) -> torch.Tensor:
        """[sequences, 1, 1, length]: zero for the last `window` of each one's visible keys, -inf elsewhere."""
        line = self._masks.get(window)
        if line is None:
            options: dict[str, Any] = {"dtype": self._cache.shape.dtype, "device": self._cache.pool.device}
            line = torch.full((2 * self._mask_length,), -torch.inf, **options)
            line[max(0, self._mask_length - (window or self._mask_length)) : self._mask_length] = 0
            self._masks[window] = line
        if min(visible) == max(visible) and not self._aligned_masks:
            start = self._mask_length - visible[0]
            return line[start : start + length].expand(len(visible), 1, 1, length)
        starts = [self._mask_length - count for count in visible]
        return torch.stack([line[start : start + length] for start in starts]).view(-1, 1, 1, length)

    def _chunk_rows(self, tokens: int) -> int:
        """Query rows of a tile: groups x tokens, padded to 8."""
        return -(-self._groups * tokens // ROWS) * ROWS

    def _chunk_mask(self, causal: Causal, zeroes: torch.Tensor) -> torch.Tensor:
        """[1, 1, rows, length], made in `zeroes` [rows x length]: causal, and within the window.

        Written over only where some of the tokens don't see the keys: right of the first token, and left of the last
        one's window.
        """
        start, end, first, length, window = causal.start, causal.end, causal.first, causal.length, causal.window
        device = zeroes.device
        mask = zeroes.view(-1, length)
        by_token = mask[: self._groups * (end - start)].view(self._groups, end - start, length)
        position = torch.arange(start, end, device=device).unsqueeze(1)
        later = torch.arange(start + 1, first + length, device=device)
        by_token[:, :, start + 1 - first :].masked_fill_(later > position, -torch.inf)
        if window is not None and end - window > first:
            earlier = torch.arange(first, end - window, device=device)
            by_token[:, :, : end - window - first].masked_fill_(earlier <= position - window, -torch.inf)
        return mask.view(1, 1, -1, length)


def _evenly_spaced(places: list[_Place], index: int) -> int:
    """How many places from `index` on lie at equal distances and are equally long."""
    first = places[index]
    if first.runs is not None:
        return 1
    count, stride = 1, 0
    for before, place in pairwise(places[index:]):
        step = place.row - before.row
        if place.runs is not None or place.length != first.length or step <= 0 or (stride and step != stride):
            break
        stride = step
        count += 1
    return count
