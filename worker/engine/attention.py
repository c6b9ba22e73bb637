"""Which attention runs: an ordered probe, each candidate tried on one token before it is trusted.

Read `choose_attention` first. `--attention NAME` is strict: that one, or a reason why not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig

from worker.engine.attention_sdpa import SdpaAttention
from worker.engine.kv_cache import KVCache, KVShape
from worker.engine.loader import LoadError
from worker.engine.packed_batch import PackedBatch, Span
from worker.engine.scheduler import Chunk


class Attention(Protocol):
    """Stores a step's keys and values in the cache and attends to what each sequence has there."""

    def rank(self, chunk: Chunk) -> Any:
        """Chunks of a single token are laid out in the order of this key, whatever suits the kernel."""
        ...

    def plan(self, batch: PackedBatch) -> Any:
        """Prepare a forward pass over `batch`; the plan is handed to every layer's `attend`."""
        ...

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
        """query [rows, heads, size], keys and values [rows, kv heads, size] → [rows, heads, size]."""
        ...


@dataclass(frozen=True, slots=True)
class Backend:
    """An attention that passed its self-test, ready to be built over the real cache."""

    name: str
    notice: str
    block_tokens: int
    """Tokens a block that its kernel needs; 0 leaves the choice open."""
    wants_contiguous_blocks: bool
    build: Callable[[KVCache, int], Attention]


@dataclass(frozen=True, slots=True)
class _Candidate:
    name: str
    block_tokens: int
    wants_contiguous_blocks: bool
    unavailable: Callable[[KVShape, torch.device], str | None]
    build: Callable[[KVCache, int, int], Attention]


def _candidates() -> list[_Candidate]:
    return [
        _Candidate("sdpa", 0, True, _sdpa_unavailable, _build_sdpa),
    ]


def choose_attention(name: str, config: PreTrainedConfig, shape: KVShape, device: torch.device) -> Backend:
    """The first candidate that runs here, or the one called `name`. Raises LoadError with the reason if none does."""
    heads: int = config.num_attention_heads
    skipped: list[str] = []
    known = [candidate.name for candidate in _candidates()]
    if name not in ("auto", *known):
        raise LoadError("ATTENTION_UNAVAILABLE", f"--attention {name}: unknown; one of auto, {', '.join(known)}.")
    for candidate in _candidates():
        if name not in ("auto", candidate.name):
            continue
        reason = candidate.unavailable(shape, device) or _self_test(candidate, heads, shape, device)
        if reason is None:
            return Backend(
                candidate.name,
                "; ".join(skipped),
                candidate.block_tokens,
                candidate.wants_contiguous_blocks,
                lambda cache, context, chosen=candidate: chosen.build(cache, heads, context),
            )
        if name != "auto":
            raise LoadError("ATTENTION_UNAVAILABLE", f"--attention {name}: {reason}. Use --attention auto.")
        skipped.append(f"{candidate.name}: {reason}")
    raise LoadError("ATTENTION_UNAVAILABLE", f"no attention runs here: {'; '.join(skipped)}.")


def _self_test(candidate: _Candidate, heads: int, shape: KVShape, device: torch.device) -> str | None:
    """Attend to a single token, which must give back that token's value; the reason why not otherwise."""
    one_layer = KVShape(1, shape.kv_heads, shape.head_dim, shape.dtype)
    try:
        cache = KVCache(one_layer, num_blocks=1, block_tokens=candidate.block_tokens or 16, device=device)
        attention = candidate.build(cache, heads, 16)
        batch = PackedBatch([0], [0], [Span(0, 0, 0, 1, [0])], 1, [0], 1)
        query = torch.ones(1, heads, shape.head_dim, dtype=shape.dtype, device=device)
        values = torch.arange(shape.kv_heads, dtype=shape.dtype, device=device)
        values = values.view(1, -1, 1).expand(1, shape.kv_heads, shape.head_dim).contiguous()
        keys = torch.ones_like(values)
        with torch.inference_mode():
            out = attention.attend(attention.plan(batch), 0, query, keys, values, 1.0, None)
        expected = values.repeat_interleave(heads // shape.kv_heads, dim=1)
        if not torch.allclose(out.float(), expected.float(), rtol=1e-2, atol=1e-2):
            return "its self-test gave a wrong result"
    except Exception as error:  # whatever a kernel does on a machine it wasn't made for
        return f"its self-test failed ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]})"
    return None


def _sdpa_unavailable(shape: KVShape, device: torch.device) -> str | None:
    return None


def _build_sdpa(cache: KVCache, heads: int, context_length: int) -> Attention:
    return SdpaAttention(cache, num_heads=heads, context_length=context_length)
