"""Mixture-of-experts layers whose rows don't depend on each other.

An expert gets as many rows as tokens chose it, and over fewer than four rows a matrix product takes another path. So
each expert's rows are padded to a multiple of eight. Only what an expert returns for real rows is added up, in the
order of the experts' numbers, which is the same in every batch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS_NAME = "llorch_rows"
_ROWS = 8


def register_experts() -> None:
    """Tell transformers about this way to run experts; before the model is built."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, _run_experts)


def _run_experts(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """hidden [tokens, size], chosen and weights [tokens, experts a token] → [tokens, size]."""
    out = torch.zeros_like(hidden)
    for expert in cast("list[int]", chosen.unique().tolist()):
        token, rank = (chosen == expert).nonzero(as_tuple=True)
        rows = F.pad(hidden[token], (0, 0, 0, -token.numel() % _ROWS))
        gate, up = F.linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
        rows = F.linear(module.act_fn(gate) * up, module.down_proj[expert])[: token.numel()]
        out.index_add_(0, token, rows * weights[token, rank].unsqueeze(1).to(rows.dtype))
    return out
