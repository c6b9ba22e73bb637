"""The tokens of one forward pass, laid end to end, and where each sequence's rows and blocks are.

rows:  │ decode │ decode │ prefill chunk of a sequence ... │ padding │
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from worker.engine.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [row, row + count) of the batch are tokens [start, start + count) of a sequence that holds `blocks`.

    `chunk` is the place of its chunk in the scheduler's order.
    """

    chunk: int
    row: int
    start: int
    count: int
    blocks: list[int]

    @property
    def end(self) -> int:
        """Tokens of the sequence that are in the cache after this pass."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One forward pass over `num_rows` rows, padding included."""

    token_ids: list[int]
    positions: list[int]
    spans: list[Span]
    num_rows: int
    sampled_rows: list[int]
    """Rows whose logits are wanted, in the order of the chunks that sample."""

    num_decodes: int
    """How many of the first spans are a single token."""

    sampled_chunks: list[int] = field(default_factory=list[int])
    """The chunk that each of `sampled_rows` belongs to."""

    @property
    def num_tokens(self) -> int:
        """Rows that are not padding."""
        return self.spans[-1].row + self.spans[-1].count


def pack(chunks: list[Chunk], rank: Callable[[Chunk], Any], padding_for: Callable[[int], int]) -> PackedBatch:
    """Lay chunks end to end: single tokens first, in the order of their `rank`, which the attention chooses.

    `padding_for` says how many rows of padding a number of rows needs.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    last_row = [0] * len(chunks)
    for index in sorted(range(len(chunks)), key=lambda i: (chunks[i].count > 1, rank(chunks[i]))):
        chunk = chunks[index]
        spans.append(Span(index, len(token_ids), chunk.start, chunk.count, chunk.sequence.blocks))
        token_ids.extend(chunk.sequence.tokens[chunk.start : chunk.start + chunk.count])
        positions.extend(range(chunk.start, chunk.start + chunk.count))
        last_row[index] = len(token_ids) - 1
    sampled = [index for index, chunk in enumerate(chunks) if chunk.samples]
    sampled_rows = [last_row[index] for index in sampled]
    padding = padding_for(len(token_ids))
    token_ids.extend([0] * padding)
    positions.extend([0] * padding)
    decodes = next((index for index, span in enumerate(spans) if span.count > 1), len(spans))
    return PackedBatch(token_ids, positions, spans, len(token_ids), sampled_rows, decodes, sampled)
