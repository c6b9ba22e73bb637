"""Mixture-of-experts layers, each device in its own way.

    CPU     one expert after another, each over its own rows; rows don't depend on each other (below)
    CUDA    transformers' grouped products: all experts in one call, without waiting for the GPU to say who was chosen
    MPS     transformers' own loop; the grouped products have not been tried there

On a CPU an expert gets as many rows as tokens chose it, and over fewer than four rows a matrix product takes another
path. So each expert's rows are padded to a multiple of eight. Only what an expert returns for real rows is added up, in
the order of the experts' numbers, which is the same in every batch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS_NAME = "llorch_rows"
EAGER_NAME = "eager"
_ROWS = 8
_GROUPED_ALIGNMENT = 16


def register_experts(device: torch.device) -> str:
    """Tell transformers about this way to run experts, before the model is built; the name to ask for on `device`."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, _run_experts)
    return EAGER_NAME if device.type == "mps" else EXPERTS_NAME


def _run_experts(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """hidden [tokens, size], chosen and weights [tokens, experts a token] → [tokens, size]."""
    if hidden.is_cuda and fits_grouped(module):
        return run_grouped(module, hidden, chosen, weights)
    return run_by_rows(module, hidden, chosen, weights)


def fits_grouped(module: Any) -> bool:
    """Whether torch's grouped product takes these weights: every row of them has to begin at a multiple of 16 bytes."""
    return all(
        weight.shape[-1] * weight.dtype.itemsize % _GROUPED_ALIGNMENT == 0
        for weight in (module.gate_up_proj, module.down_proj)
    )


def run_grouped(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """All experts in a grouped product; as `_run_experts`. On GPUs before compute capability 8.0 transformers loops."""
    grouped = cast("Any", ALL_EXPERTS_FUNCTIONS["grouped_mm"])
    return grouped(module, hidden, chosen, weights)


def run_by_rows(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One expert after another; as `_run_experts`. Waits for the device before each, which costs nothing on a CPU."""
    out = torch.zeros_like(hidden)
    for expert in cast("list[int]", chosen.unique().tolist()):
        token, rank = (chosen == expert).nonzero(as_tuple=True)
        rows = F.pad(hidden[token], (0, 0, 0, -token.numel() % _ROWS))
        gate, up = F.linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
        rows = F.linear(module.act_fn(gate) * up, module.down_proj[expert])[: token.numel()]
        out.index_add_(0, token, rows * weights[token, rank].unsqueeze(1).to(rows.dtype))
    return out
