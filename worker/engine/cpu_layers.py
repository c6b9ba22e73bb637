"""Layers for float32 on CPUs: weights that oneDNN has laid out once, activations that don't care where a row stands.

Read `prepare_for_cpu` first. Two things make a row's result depend on its neighbours on a CPU, and both go away here:

- A matrix product over few rows takes another path than one over many. oneDNN's packed layers take the same from two
  rows on (checked here, for each shape of the model); they also need about half the time of torch's plain linear for a
  step of few rows, because that packs the weights anew every time.
- torch's SiLU and GELU treat the last elements of a thread's share with scalar code that rounds differently. Written
  out with exp, which doesn't, they give every element the same.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

logger = logging.getLogger("llorch.engine")

_ROWS_HINT = 8
_TRIED_ROWS = (2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 33, 40, 63, 64)


@dataclass(frozen=True, slots=True)
class RowPadding:
    """A batch of rows is padded to at least `minimum` rows and to a multiple of `multiple`."""

    minimum: int
    multiple: int

    def missing(self, rows: int) -> int:
        """How many rows of padding a batch of `rows` needs."""
        return max(self.minimum - rows, -rows % self.multiple)


PLAIN_PADDING = RowPadding(8, 8)
"""What torch's plain linear layers need for a row not to depend on the others."""


class PackedLinear(nn.Module):
    """y = x W^T + b for x [..., in], with W packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_HINT)
        bias = cast("torch.Tensor | None", linear.bias)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class FusedLinear(nn.Module):
    """Several linear layers over the same input as one product; `parts` hand out the pieces.

    The model calls its query, key and value projections (or gate and up) one after the other with the same tensor. The
    first call computes them all, the others return their slice of it. Each call costs some 15 microseconds before any
    arithmetic, which is most of what a small model's step takes.
    """

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        biases = [cast("torch.Tensor | None", linear.bias) for linear in linears]
        joined = nn.Linear(
            linears[0].in_features, sum(linear.out_features for linear in linears), bias=biases[0] is not None
        )
        with torch.no_grad():
            joined.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
            if biases[0] is not None:
                joined.bias = nn.Parameter(torch.cat([b for b in biases if b is not None]), requires_grad=False)
        self.linear = joined
        self._sizes = [linear.out_features for linear in linears]
        self._input: torch.Tensor | None = None
        self._pieces: tuple[torch.Tensor, ...] = ()

    def piece(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Output of the layer `index` for x [..., in]."""
        if x is not self._input:
            self._pieces = self.linear(x).split(self._sizes, dim=-1)
            self._input = x
        result = self._pieces[index]
        if index == len(self._sizes) - 1:
            self._input, self._pieces = None, ()
        return result


class LinearPart(nn.Module):
    """One of the layers in a FusedLinear."""

    def __init__(self, fused: FusedLinear, index: int) -> None:
        super().__init__()
        self._fused = (fused,)  # in a tuple, so that it isn't registered several times
        self._index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        return self._fused[0].piece(self._index, x)


class EvenSiLU(nn.Module):
    """x * sigmoid(x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return x / x.neg().exp_().add_(1.0)


class EvenGELUTanh(nn.Module):
    """GELU in its tanh form: 0.5 x (1 + tanh(y)) = x / (1 + exp(-2 y)), y = sqrt(2/pi) (x + 0.044715 x^3)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        inner = (x * x * x).mul_(0.044715).add_(x).mul_(-2.0 * math.sqrt(2.0 / math.pi))
        return x / inner.exp_().add_(1.0)


_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": EvenSiLU, "gelu_pytorch_tanh": EvenGELUTanh}


def prepare_for_cpu(model: nn.Module, activation: str) -> RowPadding:
    """Replace the layers of a float32 model in place; returns the padding under which a row stands alone.

    Where this build of torch lacks the packed layers, or they aren't what they should be, the plain ones stay.
    """
    _fuse(model)
    even = _ACTIVATIONS.get(activation)
    shapes: dict[tuple[int, int], bool] = {}
    padding = RowPadding(2, 1)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name == "act_fn" and even is not None:
                setattr(module, name, even())
            elif type(child) is nn.Linear:
                packed = _packed(child, shapes)
                if packed is None:
                    padding = PLAIN_PADDING
                else:
                    setattr(module, name, packed)
            elif child.__class__.__name__.endswith(("Router", "Experts")):
                padding = PLAIN_PADDING  # they hold bare weights and call the plain product
    if not all(shapes.values()):
        logger.warning("oneDNN's packed linear layers don't work here; steps of few rows will be slower")
    return padding


_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _fuse(model: nn.Module) -> None:
    for module in list(model.modules()):
        for names in _FUSED:
            layers = [getattr(module, name, None) for name in names]
            if all(type(layer) is nn.Linear for layer in layers):
                fused = FusedLinear(cast("list[nn.Linear]", layers))
                module.add_module("_".join(names), fused)
                for index, name in enumerate(names):
                    setattr(module, name, LinearPart(fused, index))


def _packed(linear: nn.Linear, shapes: dict[tuple[int, int], bool]) -> PackedLinear | None:
    shape = (linear.in_features, linear.out_features)
    packed = None
    try:
        packed = PackedLinear(linear)
        if shape not in shapes:
            shapes[shape] = _stands_alone(packed, linear)
    except (AttributeError, RuntimeError):
        shapes[shape] = False
    return packed if shapes[shape] else None


def _stands_alone(packed: PackedLinear, linear: nn.Linear) -> bool:
    """Whether the packed layer computes the same as the plain one, and each row alike in any company."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, linear.in_features, generator=generator)
    with torch.inference_mode():
        whole = packed(x)
        if not torch.allclose(whole[:2], linear(x[:2]), rtol=1e-3, atol=1e-3):
            return False
        return all(torch.equal(packed(x[:rows]), whole[:rows]) for rows in _TRIED_ROWS)
