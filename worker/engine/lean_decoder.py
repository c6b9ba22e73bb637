"""A whole decoder of the Llama family as one loop over lean layers, giving the very numbers of transformers' model.

transformers' own forward takes half a millisecond around the layers of a step: wrappers that record outputs, a mask
that nobody needs, cosines computed anew. Read `lean_decoder`: it tries the loop against the original, bit by bit.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import nn

from worker.engine.lean_layer import LeanLayer, MixingAttention, signed_tables

_FIRST_TABLE = 1024
_LARGEST_TABLE = 32_768
"""Positions for which cosines and sines are kept (32 MB for heads of 128); beyond, they are computed for each step."""


class RotaryTable:
    """cos and signed sin by position, made by the model's own rotary embedding as far as positions have come."""

    def __init__(self, rotary: Any, head_dim: int, most_positions: int) -> None:
        self._rotary = rotary
        self._head_dim = head_dim
        self._most = min(most_positions, _LARGEST_TABLE)
        self._tables = self._compute(torch.arange(min(_FIRST_TABLE, self._most)))

    def of(self, positions: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, 1, size] each, for positions [rows] up to `largest`."""
        if largest >= self._most:
            return self._compute(positions)
        if largest >= self._tables[0].shape[0]:
            size = min(max(2 * self._tables[0].shape[0], largest + 1), self._most)
            self._tables = self._compute(torch.arange(size))
        cos, sin = self._tables
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def _compute(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        like = torch.empty(1, positions.shape[0], self._head_dim)  # read for its type and device only
        return signed_tables(*self._rotary(like, positions.unsqueeze(0)))


class LeanDecoder:
    """Embedding, layers, norm."""

    def __init__(self, decoder: Any, most_positions: int) -> None:
        self._embedding: torch.Tensor = decoder.embed_tokens.weight
        self._layers = [cast("LeanLayer", layer).step for layer in decoder.layers]
        self._norm = decoder.norm.forward
        self._rotary = RotaryTable(decoder.rotary_emb, decoder.layers[0].head_dim, most_positions)

    def __call__(self, token_ids: list[int], positions: list[int], attention: Any, plan: Any) -> torch.Tensor:
        """Hidden states [rows, hidden size] behind the last norm."""
        cos, sin = self._rotary.of(torch.tensor(positions), max(positions))
        hidden = F.embedding(torch.tensor([token_ids]), self._embedding)
        for layer in self._layers:
            hidden = layer(hidden, cos, sin, attention, plan)
        return self._norm(hidden)[0]


def lean_decoder(model: Any, most_positions: int) -> LeanDecoder | None:
    """The loop, if every layer of the prepared model is lean and the whole gives the same numbers as the model."""
    decoder: Any = model.get_decoder()
    parts = [name for name, _ in decoder.named_children()]
    layers: nn.ModuleList = decoder.layers
    if sorted(parts) != ["embed_tokens", "layers", "norm", "rotary_emb"] or not all(
        isinstance(layer, LeanLayer) for layer in layers
    ):
        return None
    last = most_positions - 1
    positions = [min(position, last) for position in (0, 1, 2, 63, 500, 1023, 1024, last)]
    token_ids = [token % model.config.vocab_size for token in (0, 1, 2, 3, 50, 101, 102, 103)]
    with torch.inference_mode():
        lean = LeanDecoder(decoder, most_positions)
        ours = lean(token_ids, positions, MixingAttention([]), None)
        theirs = decoder(
            input_ids=torch.tensor([token_ids]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            packed_attention=MixingAttention([]),
            packed_plan=None,
        ).last_hidden_state[0]
    return lean if torch.equal(ours, theirs) else None
