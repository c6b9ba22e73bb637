"""Memory for keys and values: one tensor, cut into blocks by number.

    pool:  [layers, 2 (keys, values), rows, kv heads, head size]      rows = blocks x tokens a block, + spare rows

A token of block b at offset o lives in row b * block_tokens + o of every layer. The spare rows at the end take the
writes of padding and let a read that is padded past the last block stay inside the tensor; they are finite, always.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from dataclasses import dataclass

import torch

SPARE_ROWS = 1024


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a model keeps for one token: `layers` x 2 x `kv_heads` x `head_dim` numbers of `dtype`."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in the cache."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


class KVCache:
    """The pool and its addressing. Raises torch.OutOfMemoryError, RuntimeError or OSError where there is no memory."""

    def __init__(self, shape: KVShape, *, num_blocks: int, block_tokens: int, device: torch.device) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.spare_row = num_blocks * block_tokens
        rows = self.spare_row + SPARE_ROWS
        # Zeroes: what lies behind a sequence's end is read (and masked), so it must be finite.
        self.pool = _zeroes((shape.layers, 2, rows, shape.kv_heads, shape.head_dim), shape.dtype, device)
        # As the model hands keys and values over: [1, kv heads, rows, head size].
        self._layers = [pair.unbind(0) for pair in self.pool.transpose(2, 3).unsqueeze(2).unbind(0)]

    def rows(self, blocks: list[int], start: int, count: int) -> list[int]:
        """Rows of the tokens [start, start + count) of a sequence that holds `blocks`."""
        size = self.block_tokens
        if count == 1:
            return [blocks[start // size] * size + start % size]
        first = start // size
        held = blocks[first : (start + count - 1) // size + 1]
        rows = [row for block in held for row in range(block * size, (block + 1) * size)]
        offset = start - first * size
        return rows[offset : offset + count]

    def write(self, layer: int, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values, each [1, kv heads, tokens, head size], in `rows` [tokens]."""
        into_keys, into_values = self._layers[layer]
        into_keys.index_copy_(2, rows, keys)
        into_values.index_copy_(2, rows, values)

    def paged(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer as [blocks, tokens a block, kv heads, head size], without the spare rows."""
        shape = (self.num_blocks, self.block_tokens, self.shape.kv_heads, self.shape.head_dim)
        keys, values = self.pool[layer].narrow(1, 0, self.spare_row).unbind(0)
        return keys.view(shape), values.view(shape)

    def scrub(self, blocks: list[int]) -> None:
        """Overwrite blocks with zeroes: a sequence whose numbers went bad leaves nothing behind."""
        for block in blocks:
            self.pool[:, :, block * self.block_tokens : (block + 1) * self.block_tokens] = 0


def _zeroes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of zeroes; on a CPU one whose pages are only taken from the machine when they are first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
