"""Which attention runs: an ordered probe, each candidate tried on a few tokens before it is trusted.

Read `choose_attention` first. `--attention NAME` is strict: that one, or a reason why not.

    flash_attn     CUDA, compute capability >= 8.0, bfloat16 or float16, the package flash-attn 2.x
    torch_varlen   the same, torch >= 2.12
    sdpa           everything else: older GPUs, float32, MPS, the CPU
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, Protocol

import torch

from worker.engine.attention_paged import PAGED_BLOCK_TOKENS, PagedAttention, flash_attn_kernel, torch_varlen_kernel
from worker.engine.attention_sdpa import SdpaAttention
from worker.engine.kv_cache import KVCache, KVShape
from worker.engine.loader import LoadError
from worker.engine.packed_batch import PackedBatch, Span
from worker.engine.scheduler import Chunk

logger = logging.getLogger("llorch.engine")


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
        """query [1, heads, rows, size], keys and values [1, kv heads, rows, size] → [1, rows, heads, size].

        The shapes in which transformers' models hand over and take back.
        """
        ...


@dataclass(frozen=True, slots=True)
class Backend:
    """An attention that passed its self-test, ready to be built over the real cache."""

    name: str
    notice: str
    block_tokens: int
    """Tokens a block that its kernel needs; 0 leaves the choice open."""
    wants_contiguous_blocks: bool
    batch_invariant: bool
    """False: the kernel cuts its sums by what else is in the batch, in ways that a short trial can't see."""
    build: Callable[[KVCache, int], Attention]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to attend, and where it can't be used."""

    name: str
    block_tokens: int
    wants_contiguous_blocks: bool
    batch_invariant: bool
    unavailable: Callable[[KVShape, torch.device], str | None]
    build: Callable[[KVCache, int, int], Attention]
    """(cache, heads, context length) → attention."""


def candidates(*, deterministic: bool = False) -> list[Candidate]:
    """All of them, the best first; `deterministic` takes the batch-invariant variant of each."""
    flash_attn = partial(_build_flash_attn, one_split=deterministic)
    return [
        Candidate("flash_attn", PAGED_BLOCK_TOKENS, False, deterministic, _flash_attn_unavailable, flash_attn),
        Candidate("torch_varlen", PAGED_BLOCK_TOKENS, False, True, _torch_varlen_unavailable, _build_torch_varlen),
        Candidate("sdpa", 0, True, True, lambda shape, device: None, _build_sdpa),
    ]


def choose_attention(
    name: str, heads: int, shape: KVShape, device: torch.device, *, deterministic: bool = False
) -> Backend:
    """The first candidate that runs here, or the one called `name`; `deterministic` as for `candidates`.

    Raises LoadError with the reason if none does, torch.AcceleratorError if one left the device unusable.
    """
    ordered = candidates(deterministic=deterministic)
    known = [candidate.name for candidate in ordered]
    if name not in ("auto", *known):
        raise LoadError("ATTENTION_UNAVAILABLE", f"--attention {name}: unknown; one of auto, {', '.join(known)}.")
    skipped: list[str] = []
    for candidate in ordered:
        if name not in ("auto", candidate.name):
            continue
        reason = candidate.unavailable(shape, device) or _self_test(candidate, heads, shape, device)
        if reason is None:
            return Backend(
                candidate.name,
                "; ".join(skipped),
                candidate.block_tokens,
                candidate.wants_contiguous_blocks,
                candidate.batch_invariant,
                lambda cache, context, chosen=candidate: chosen.build(cache, heads, context),
            )
        if name != "auto":
            raise LoadError("ATTENTION_UNAVAILABLE", f"--attention {name}: {reason}. Use --attention auto.")
        skipped.append(f"{candidate.name}: {reason}")
    raise LoadError("ATTENTION_UNAVAILABLE", f"no attention runs here: {'; '.join(skipped)}.")


def _self_test(candidate: Candidate, heads: int, shape: KVShape, device: torch.device) -> str | None:
    """Three sequences in one batch – a first token, a token far in, a chunk – against plain products; why not, or None.

    More than one sequence, because kernels have got the first one right and left the others unwritten.
    """
    one_layer = KVShape(1, shape.kv_heads, shape.head_dim, shape.dtype)
    size = candidate.block_tokens or 16
    try:
        cache = KVCache(one_layer, num_blocks=2048 // size, block_tokens=size, device=device)
        attention = candidate.build(cache, heads, 1024)
        worst = max(_error(attention, cache, heads, window) for window in (None, 100))
    except Exception as error:  # whatever a kernel does on a machine it wasn't made for
        if isinstance(error, torch.AcceleratorError) and not _still_works(device):
            logger.error("attention %s broke the device; `--attention` with another name avoids it", candidate.name)
            raise
        return f"its self-test failed ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]})"
    limit = 1e-4 if shape.dtype is torch.float32 else 5e-2
    return None if worst < limit else f"its self-test was off by {worst:.3g}"  # also for NaN


def _still_works(device: torch.device) -> bool:
    """Whether the device computes. After some errors (an illegal address) it doesn't, until the process is another."""
    try:
        return float(torch.ones(1, device=device).add(1).cpu()) == 2
    except RuntimeError:
        return False


def _error(attention: Attention, cache: KVCache, heads: int, window: int | None) -> float:
    shape, device = cache.shape, cache.pool.device
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, count: int) -> torch.Tensor:
        return torch.randn(rows, count, shape.head_dim, generator=generator).to(device=device, dtype=shape.dtype)

    lengths, new = (1, 600, 300), (1, 1, 5)
    free = list(range(cache.num_blocks))  # taken from the end, so that a kernel that ignores the table can't be right
    spans: list[Span] = []
    sequences = [(draw(n, heads), draw(n, shape.kv_heads), draw(n, shape.kv_heads)) for n in lengths]
    for index, (length, count) in enumerate(zip(lengths, new, strict=True)):
        blocks = [free.pop() for _ in range(-(-length // cache.block_tokens))]
        spans.append(Span(index, sum(new[:index]), length - count, count, blocks))
        rows = torch.tensor(cache.rows(spans[index].blocks, 0, length), device=device)
        cache.write(0, rows, _as_model(sequences[index][1]), _as_model(sequences[index][2]))
    batch = PackedBatch([0] * sum(new), [0] * sum(new), spans, sum(new), [], 2)
    query, keys, values = (
        _as_model(torch.cat([tensors[part][-count:] for tensors, count in zip(sequences, new, strict=True)]))
        for part in range(3)
    )
    scale = shape.head_dim**-0.5
    with torch.inference_mode():
        out = attention.attend(attention.plan(batch), 0, query, keys, values, scale, window)
        expected = torch.cat([_plain(*s, count, scale, window) for s, count in zip(sequences, new, strict=True)])
        return float((out[0].float() - expected).abs().max())


def _as_model(rows: torch.Tensor) -> torch.Tensor:
    """[rows, heads, size] → [1, heads, rows, size]."""
    return rows.transpose(0, 1).unsqueeze(0)


def _plain(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, new: int, scale: float, window: int | None
) -> torch.Tensor:
    """Attention of the last `new` tokens of one sequence by plain products, in float32."""
    length, groups = keys.shape[0], query.shape[1] // keys.shape[1]
    k, v = (tensor.float().repeat_interleave(groups, dim=1) for tensor in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query[-new:].float(), k) * scale
    position = torch.arange(length - new, length, device=query.device).unsqueeze(1)
    key = torch.arange(length, device=query.device)
    hidden = (key > position) | (key <= position - (window or length))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def _flash_unavailable(shape: KVShape, device: torch.device) -> str | None:
    """What both flash kernels need of a device and a model."""
    if device.type != "cuda":
        return "needs CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0, this GPU has {major}.{minor}"
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return "needs bfloat16 or float16"
    if shape.head_dim > 256 or shape.head_dim % 8:
        return f"needs a head size up to 256 that 8 divides, not {shape.head_dim}"
    return None


def _flash_attn_unavailable(shape: KVShape, device: torch.device) -> str | None:
    reason = _flash_unavailable(shape, device)
    if reason is not None:
        return reason
    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return "flash-attn isn't installed (pip install --no-build-isolation 'llorch[cuda]')"
    return None if version.startswith("2.") else f"needs flash-attn 2.x, not {version}"


def _torch_varlen_unavailable(shape: KVShape, device: torch.device) -> str | None:
    reason = _flash_unavailable(shape, device)
    if reason is not None:
        return reason
    try:
        torch_varlen_kernel()
    except ImportError as error:
        return str(error)
    return None


def _build_flash_attn(cache: KVCache, heads: int, context_length: int, *, one_split: bool) -> Attention:
    return PagedAttention(cache, flash_attn_kernel(one_split=one_split))


def _build_torch_varlen(cache: KVCache, heads: int, context_length: int) -> Attention:
    return PagedAttention(cache, torch_varlen_kernel())


def _build_sdpa(cache: KVCache, heads: int, context_length: int) -> Attention:
    return SdpaAttention(cache, num_heads=heads, context_length=context_length)
