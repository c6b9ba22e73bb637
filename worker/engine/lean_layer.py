"""A decoder layer of the Llama family in a third of the calls, giving the very numbers of the layer it replaces.

A small model's step on a CPU is mostly calls: transformers' layer makes about ninety, nine of them through Module.
Here one layer is one function. It knows the form that Llama, Mistral, Qwen 2 and Qwen 3 share (norm, rotated attention,
norm, gated product); `lean_layer` tries it against the original, bit by bit, and leaves everything else as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from worker.engine.cpu_layers import FusedRMSNorm, LinearPart


class RopeTables:
    """cos and sin as every layer of a pass uses them: [rows, 1, size], sin with the sign of its half."""

    __slots__ = ("_cos", "_given", "_sin")

    def __init__(self) -> None:
        self._given: torch.Tensor | None = None
        self._cos = self._sin = torch.empty(0)

    def of(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables for what the model made for a pass, [1, rows, size] each."""
        if cos is not self._given:
            self._given = cos
            self._cos, self._sin = signed_tables(cos, sin)
        return self._cos, self._sin


def signed_tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From the model's [1, rows, size] each to [rows, 1, size] each, the first half of every sine negated."""
    half = sin.shape[-1] // 2
    return cos[0].unsqueeze(1), torch.cat((sin[0, :, :half].neg(), sin[0, :, half:]), dim=-1).unsqueeze(1)


class LeanLayer(nn.Module):
    """Takes the modules of a prepared decoder layer (see cpu_layers) and calls them without ceremony."""

    def __init__(self, layer: Any, rope: RopeTables) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.original = layer  # keeps the weights where the model's own methods look for them
        self._qkv = attention.q_proj.shared.layer.forward
        self._o = attention.o_proj.forward
        self._q_norm = getattr(attention, "q_norm", None)
        self._k_norm = getattr(attention, "k_norm", None)
        self._norms = layer.input_layernorm.forward, layer.post_attention_layernorm.forward
        self._heads: int = attention.config.num_attention_heads
        self._kv_heads: int = attention.config.num_key_value_heads
        self.head_dim: int = attention.head_dim
        self._scale: float = attention.scaling
        self._window: int | None = getattr(attention, "sliding_window", None)
        self._index: int = attention.layer_idx
        self._rope = rope
        self._mlp = mlp
        self._gate_up = mlp.gate_proj.shared.layer.forward if hasattr(mlp, "gate_proj") else None
        if self._gate_up is not None:
            self._act, self._down, self._inner = (
                mlp.act_fn.forward,
                mlp.down_proj.forward,
                mlp.gate_proj.shared.sizes[0],
            )
        if not hasattr(attention, "sliding_window"):  # Mistral reads it from its configuration, Llama has none
            self._window = getattr(attention.config, "sliding_window", None)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        packed_attention: Any,
        packed_plan: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[1, rows, hidden size] → the same; called as transformers calls a layer."""
        return self.step(hidden_states, *self._rope.of(*position_embeddings), packed_attention, packed_plan)

    def step(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Any, plan: Any
    ) -> torch.Tensor:
        """[1, rows, hidden size] → the same, with the tables of `signed_tables`."""
        first_norm, second_norm = self._norms
        rows = hidden.shape[1]
        query, keys, values = self._rotated(self._qkv(first_norm(hidden)), rows, cos, sin)
        out = attention.attend(plan, self._index, query, keys, values, self._scale, self._window)
        hidden = hidden + self._o(out.reshape(1, rows, self._heads * self.head_dim))
        x = second_norm(hidden)
        if self._gate_up is None:
            return hidden + self._mlp(x)
        both = self._gate_up(x)
        return hidden + self._down(self._act(both[..., : self._inner]) * both[..., self._inner :])

    def _rotated(
        self, qkv: torch.Tensor, rows: int, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[1, heads, rows, size] of queries, keys and values; the first two normalised and turned."""
        heads, half = self._heads, self.head_dim // 2
        each = qkv.view(rows, heads + 2 * self._kv_heads, self.head_dim)
        turned = each[:, : heads + self._kv_heads]
        if self._q_norm is not None and self._k_norm is not None:
            turned = torch.cat((self._q_norm(turned[:, :heads]), self._k_norm(turned[:, heads:])), dim=1)
        other = torch.cat((turned[..., half:], turned[..., :half]), dim=-1).mul_(sin)
        turned = (turned * cos).add_(other).transpose(0, 1).unsqueeze(0)
        values = each[:, heads + self._kv_heads :].transpose(0, 1).unsqueeze(0)
        return turned[:, :heads], turned[:, heads:], values


def make_lean(model: Any) -> int:
    """Replace the decoder layers of a prepared float32 model that a lean one equals; returns how many."""
    layers: nn.ModuleList = model.get_decoder().layers
    rope = RopeTables()
    made = 0
    for index, layer in enumerate(layers):
        lean = _lean_layer(layer, rope, model.config)
        if lean is not None:
            layers[index] = lean
            made += 1
    return made


_FORM = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def _lean_layer(layer: nn.Module, rope: RopeTables, config: Any) -> LeanLayer | None:
    """A lean layer if it gives the same numbers as `layer`, and asks for the same attention."""
    attention = getattr(layer, "self_attn", None)
    if (
        {name for name, _ in layer.named_children()} != _FORM
        or not isinstance(getattr(attention, "q_proj", None), LinearPart)
        or not isinstance(layer.input_layernorm, FusedRMSNorm)
    ):
        return None
    lean = LeanLayer(layer, rope)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 8, config.hidden_size, generator=generator)
    angles = torch.randn(2, 1, 8, lean.head_dim, generator=generator).unbind(0)
    asked: list[tuple[Any, ...]] = []
    results: list[torch.Tensor] = []
    for module in (layer, lean):
        stub = MixingAttention(asked)
        with torch.inference_mode():
            out = module(
                hidden, attention_mask=None, position_embeddings=angles, packed_attention=stub, packed_plan=None
            )
        results.append(out)
    same = torch.equal(results[0], results[1]) and asked[0] == asked[1]
    return lean if same else None


class MixingAttention:
    """For trials: mixes queries, keys and values so that any difference shows, and remembers what it was asked."""

    def __init__(self, asked: list[tuple[Any, ...]]) -> None:
        self._asked = asked

    def attend(
        self,
        plan: Any,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        self._asked.append((layer, scale, window, query.shape, keys.shape, values.shape))
        groups = query.shape[1] // keys.shape[1]
        mixed = query + 2 * keys.repeat_interleave(groups, 1) + 3 * values.repeat_interleave(groups, 1)
        return mixed.transpose(1, 2).contiguous()
