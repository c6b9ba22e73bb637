"""Attention through kernels that read the blocks themselves: flash-attn 2.x, or torch's own variable-length attention.

Read `PagedAttention.attend` first. Single tokens and prompt chunks go to the kernel in two calls, because the kernels
have a faster way for batches in which every query is one token.

Both kernels align a causal mask to the end of the keys, take a window as (tokens to the left, tokens to the right),
not counting the token itself and -1 for no limit, and want blocks of a multiple of 256 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from worker.engine.kv_cache import KVCache
from worker.engine.packed_batch import PackedBatch, Span
from worker.engine.scheduler import Chunk

PAGED_BLOCK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Part:
    """The rows that one kernel call serves, with what it has to know about their sequences; int32 on the device."""

    first_row: int
    last_row: int
    query_starts: torch.Tensor
    """[sequences + 1]: rows of each sequence, counted from `first_row`."""
    key_starts: torch.Tensor
    """[sequences + 1]: running sum of the sequences' lengths."""
    lengths: torch.Tensor
    """[sequences]: tokens of each that are in the cache."""
    block_table: torch.Tensor
    """[sequences, blocks]: where they are; unused places hold 0."""
    longest_query: int
    longest_keys: int


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """What every layer of a forward pass shares."""

    rows: torch.Tensor
    parts: list[Part]


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Part, float, tuple[int, int]], torch.Tensor]
"""(query [rows, heads, size], keys and values [blocks, tokens, kv heads, size], part, scale, window) → like query."""


class PagedAttention:
    """Writes new keys and values into their blocks and lets a kernel read them through a table of blocks."""

    def __init__(self, cache: KVCache, kernel: Kernel) -> None:
        self._cache = cache
        self._kernel = kernel
        self._pages = [cache.paged(layer) for layer in range(cache.shape.layers)]

    def rank(self, chunk: Chunk) -> int:
        """Any order suits."""
        return 0

    def plan(self, batch: PackedBatch) -> PagedPlan:
        """Copy the batch's tables to the device, once for all layers."""
        rows = [row for span in batch.spans for row in self._cache.rows(span.blocks, span.start, span.count)]
        rows.extend([self._cache.spare_row] * (batch.num_rows - len(rows)))
        halves = (batch.spans[: batch.num_decodes], batch.spans[batch.num_decodes :])
        return PagedPlan(self._tensor(rows, torch.int64), [self._part(spans) for spans in halves if spans])

    def attend(
        self,
        plan: PagedPlan,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Store the new keys and values [1, kv heads, rows, size], then attend `query` [1, heads, rows, size].

        Returns [1, rows, heads, size].
        """
        self._cache.write(layer, plan.rows, keys, values)
        pages_k, pages_v = self._pages[layer]
        query = query[0].transpose(0, 1).contiguous()
        outputs = [
            self._kernel(
                query[part.first_row : part.last_row], pages_k, pages_v, part, scale, _sides(window, part.longest_query)
            )
            for part in plan.parts
        ]
        padding = query.shape[0] - plan.parts[-1].last_row
        if padding:
            outputs.append(query.new_zeros((padding, *query.shape[1:])))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)

    def _part(self, spans: list[Span]) -> Part:
        size = self._cache.block_tokens
        first = spans[0].row
        widest = max(-(-span.end // size) for span in spans)
        tables = [span.blocks[: -(-span.end // size)] for span in spans]
        key_starts = [0]
        for span in spans:
            key_starts.append(key_starts[-1] + span.end)
        last = spans[-1].row + spans[-1].count
        return Part(
            first_row=first,
            last_row=last,
            query_starts=self._tensor([span.row - first for span in spans] + [last - first]),
            key_starts=self._tensor(key_starts),
            lengths=self._tensor([span.end for span in spans]),
            block_table=self._tensor([table + [0] * (widest - len(table)) for table in tables]),
            longest_query=max(span.count for span in spans),
            longest_keys=max(span.end for span in spans),
        )

    def _tensor(self, values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._cache.pool.device)


def _sides(window: int | None, longest_query: int) -> tuple[int, int]:
    """The window as the kernels take it.

    A single query is the last token, so nothing stands to its right. Only with no limit on either side do the kernels
    treat the query heads of a key head as rows of one query, and read its keys once instead of once for each of them.
    """
    if window is None:
        return (-1, -1) if longest_query == 1 else (-1, 0)
    return (window - 1, 0)


def flash_attn_kernel(*, one_split: bool) -> Kernel:
    """flash-attn 2.x. Raises ImportError where it isn't installed or doesn't match this torch.

    Left to itself it divides a sequence's keys into as many pieces as keep the GPU busy, by the number of sequences
    and the longest of them. `one_split`: it doesn't, so company changes no bits, and few long sequences are slower.
    """
    import inspect

    from flash_attn import (  # pyright: ignore[reportMissingImports] (an optional extra)
        flash_attn_varlen_func,
        flash_attn_with_kvcache,
    )

    single: Any = flash_attn_with_kvcache
    several: Any = flash_attn_varlen_func
    singles_splits = {"num_splits": 1} if one_split else {}
    # Where it can be said at all, chunks get one piece in any case: for sequences of different lengths over blocks,
    # the kernel puts the pieces together wrongly (flash-attention issue 1217).
    several_splits = {"num_splits": 1} if "num_splits" in inspect.signature(several).parameters else {}

    def run(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        part: Part,
        scale: float,
        window: tuple[int, int],
    ) -> torch.Tensor:
        common: dict[str, Any] = {
            "softmax_scale": scale,
            "causal": True,
            "window_size": window,
            "block_table": part.block_table,
        }
        if part.longest_query == 1:
            out = single(query.unsqueeze(1), keys, values, cache_seqlens=part.lengths, **common, **singles_splits)
            return out.squeeze(1)
        starts = part.query_starts, part.key_starts, part.longest_query, part.longest_keys
        return several(query, keys, values, *starts, **common, **several_splits)

    return run


def torch_varlen_kernel() -> Kernel:
    """torch.nn.attention.varlen. Raises ImportError where this torch has no paged one (before 2.12)."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    if not {"block_table", "num_splits", "seqused_k"} <= inspect.signature(varlen_attn).parameters.keys():
        raise ImportError(f"torch {torch.__version__} has no paged varlen_attn; it came with 2.12")

    def run(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        part: Part,
        scale: float,
        window: tuple[int, int],
    ) -> torch.Tensor:
        # num_splits=1: torch's own choice leaves rows of a paged batch unwritten (pytorch issue 194167), and a split
        # that depends on the longest sequence would let one sequence change another's low bits.
        out = varlen_attn(
            query,
            keys,
            values,
            part.query_starts,
            part.key_starts,
            part.longest_query,
            part.longest_keys,
            scale=scale,
            window_size=window,
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=part.lengths,
            block_table=part.block_table,
            num_splits=1,
        )
        assert isinstance(out, torch.Tensor)  # a tuple only with return_aux
        return out

    return run
