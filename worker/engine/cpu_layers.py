"""Layers for float32 on CPUs: the same numbers for a row whoever stands beside it, and less time for few rows.

Read `prepare_for_cpu` first. Two things make a row's result depend on its neighbours on a CPU, and both go away here:

- A matrix product over few rows takes another path than one over many. Rows are padded, and for each shape of the
  model it is tried out here from how many rows on the path stays the same.
- torch's SiLU and GELU treat the last elements of a thread's share with scalar code that rounds differently. Written
  out with exp, which doesn't, they give every element the same. (With one or two threads a share ends where a row
  does, and they can stay.)

And three make it faster: layers over the same input become one; large weights are laid out once by oneDNN, where
torch's plain product packs them anew in every step; RMSNorm is one call.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import nn

logger = logging.getLogger("llorch.engine")

_ROWS_HINT = 8
_TRIED_ROWS = (2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 34, 40, 44, 62, 64)
_PACKED_FROM = 2**18
"""Weights of fewer numbers stay with torch's plain product: oneDNN takes 15 microseconds to begin, several times that
between other work, when its code has left the cache."""


@dataclass(frozen=True, slots=True)
class RowPadding:
    """A batch of rows is padded to at least `minimum` rows and to a multiple of `multiple`."""

    minimum: int
    multiple: int

    def missing(self, rows: int) -> int:
        """How many rows of padding a batch of `rows` needs."""
        return max(self.minimum - rows, -rows % self.multiple)


PADDINGS = (RowPadding(4, 4), RowPadding(8, 8))
"""Tried in this order. oneDNN could do with two rows, but reads large weights faster for four; plain products need
four, and eight where that turns out to be too few."""


class PackedLinear(nn.Module):
    """y = x W^T + b for x [..., in], with W packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_HINT)
        bias = cast("torch.Tensor | None", linear.bias)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class _Shared:
    """What the parts of a fused layer have in common. No Module: assigning to one's attributes takes microseconds."""

    __slots__ = ("input", "layer", "pieces", "sizes")

    def __init__(self, linears: list[nn.Linear]) -> None:
        self.sizes = [linear.out_features for linear in linears]
        self.layer: nn.Module = _joined(linears)
        self.input: torch.Tensor | None = None
        self.pieces: tuple[torch.Tensor, ...] = ()


class LinearPart(nn.Module):
    """One of several linear layers over the same input, which are computed as one.

    The model calls its query, key and value projections (or gate and up) one after the other with the same tensor. The
    first computes them all, the others hand out their slices of it.
    """

    def __init__(self, shared: _Shared, index: int) -> None:
        super().__init__()
        self.shared = shared
        self._index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        shared = self.shared
        if x is not shared.input:
            shared.pieces = shared.layer.forward(x).split(shared.sizes, dim=-1)
            shared.input = x
        result = shared.pieces[self._index]
        if self._index == len(shared.sizes) - 1:
            shared.input, shared.pieces = None, ()
        return result


def _joined(linears: list[nn.Linear]) -> nn.Linear:
    biases = [cast("torch.Tensor | None", linear.bias) for linear in linears]
    joined = nn.Linear(linears[0].in_features, sum(x.out_features for x in linears), bias=biases[0] is not None)
    with torch.no_grad():
        joined.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        if biases[0] is not None:
            joined.bias = nn.Parameter(torch.cat([b for b in biases if b is not None]), requires_grad=False)
    return joined


class FusedRMSNorm(nn.Module):
    """x / rms(x) * weight, in one call; the same numbers as the model's own, which takes eight."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] → [..., size]."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.epsilon)


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
    """Replace layers of a float32 model in place; returns the padding under which a row stands alone."""
    needed = _Needed()
    for shared in _fuse(model):
        shared.layer = needed.by(cast("nn.Linear", shared.layer))
    even = _ACTIVATIONS.get(activation)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, needed.by(child))
            elif name == "act_fn" and even is not None and not _ends_with_rows(module):
                setattr(module, name, even())
            elif child.__class__.__name__.endswith(("Router", "Experts")):
                needed.padding = PADDINGS[-1]  # they hold bare weights and call the plain product
            elif (norm := _fused_norm(child)) is not None:
                setattr(module, name, norm)
    return needed.padding


def _ends_with_rows(module: nn.Module) -> bool:
    """Whether an activation can stay: its input is a slice of a wider row, and two threads share an even number."""
    return torch.get_num_threads() <= 2 and isinstance(getattr(module, "gate_proj", None), LinearPart)


class _Needed:
    """The largest padding that any linear layer so far needs. Each shape is tried once."""

    def __init__(self) -> None:
        self.padding = PADDINGS[0]
        self._packed_right: dict[tuple[int, int], bool] = {}
        self._tried: set[tuple[int, int]] = set()

    def by(self, linear: nn.Linear) -> nn.Module:
        """The layer to use in place of `linear`."""
        shape = (linear.in_features, linear.out_features)
        layer: nn.Module = linear
        if linear.in_features * linear.out_features >= _PACKED_FROM and self._packed_right.get(shape, True):
            layer = _packed(linear, check=shape not in self._packed_right) or linear
            self._packed_right[shape] = layer is not linear
            if layer is linear:
                logger.warning("oneDNN's packed linear layers don't work here; steps of few rows will be slower")
        if shape not in self._tried:
            self._tried.add(shape)
            while self.padding is not PADDINGS[-1] and not _stands_alone(layer, linear.in_features, self.padding):
                self.padding = PADDINGS[PADDINGS.index(self.padding) + 1]
        return layer


_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _fuse(model: nn.Module) -> list[_Shared]:
    made: list[_Shared] = []
    for module in list(model.modules()):
        for names in _FUSED:
            layers = [getattr(module, name, None) for name in names]
            if all(type(layer) is nn.Linear for layer in layers):
                made.append(_Shared(cast("list[nn.Linear]", layers)))
                for index, name in enumerate(names):
                    setattr(module, name, LinearPart(made[-1], index))
    return made


def _fused_norm(module: nn.Module) -> FusedRMSNorm | None:
    """A norm that gives the very numbers of `module`, if that is a plain RMSNorm (Gemma's adds one to its weight)."""
    epsilon = getattr(module, "variance_epsilon", None)
    weight = getattr(module, "weight", None)
    if not module.__class__.__name__.endswith("RMSNorm") or epsilon is None or not isinstance(weight, torch.Tensor):
        return None
    fused = FusedRMSNorm(weight.detach(), epsilon)
    x = torch.randn(1, 24, weight.shape[0], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return fused if torch.equal(fused(x), module(x)) else None


def _packed(linear: nn.Linear, *, check: bool) -> PackedLinear | None:
    try:
        packed = PackedLinear(linear)
        if check:
            x = torch.randn(2, linear.in_features, generator=torch.Generator().manual_seed(0))
            with torch.inference_mode():
                if not torch.allclose(packed(x), linear(x), rtol=1e-3, atol=1e-3):
                    return None
    except (AttributeError, RuntimeError):
        return None
    return packed


def _stands_alone(layer: nn.Module, in_features: int, padding: RowPadding) -> bool:
    """Whether each row comes out the same in every number of rows that `padding` lets through."""
    x = torch.randn(128, in_features, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = layer(x)
        return all(torch.equal(layer(x[:n]), whole[:n]) for n in _TRIED_ROWS if not padding.missing(n))
