"""How much memory a model needs, from its files alone: safetensors headers and config.json. Pure but for reading them.

    weights        tensor bytes as the headers say (safetensors format: 8-byte length, JSON header, data)
    + KV cache     2 · layers · KV heads · head size · bytes per number, per token; for one sequence of up to 8,192
                   tokens, or 512 tokens for each slot, whichever is more
    + logits       a row of vocabulary · 4 bytes for each slot
    + context      1 GiB for CUDA (libraries, activations), 0.25 GiB on a CPU

The engine takes more for its cache when there is more; this is what it can't do without.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from llorch_pool.errors import PoolError

GIB = 1 << 30
_MAX_HEADER_BYTES = 100 << 20
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
DEFAULT_SLOTS = 8
"""Slots assumed where --slots isn't given."""


def gib(value: int) -> str:
    """Bytes as people read them."""
    return f"{value / GIB:.1f} GiB" if value >= GIB // 10 else f"{value / (1 << 20):.1f} MiB"


@dataclass(frozen=True)
class Need:
    """Memory by part, in bytes."""

    weights_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    logits_bytes: int
    notes: list[str] = field(default_factory=list[str])

    def context_bytes(self, kind: Literal["cuda", "cpu"]) -> int:
        """What the libraries take before anything is loaded."""
        return GIB if kind == "cuda" else GIB // 4

    def total(self, kind: Literal["cuda", "cpu"]) -> int:
        """Everything together on that kind of device."""
        cache = self.kv_bytes_per_token * self.kv_tokens
        return self.weights_bytes + cache + self.logits_bytes + self.context_bytes(kind)

    def lines(self, kind: Literal["cuda", "cpu"]) -> list[str]:
        """The sum, spelled out."""
        cache = self.kv_bytes_per_token * self.kv_tokens
        return [
            f"weights {gib(self.weights_bytes)} + KV cache {gib(cache)} "
            f"({self.kv_tokens} tokens of {self.kv_bytes_per_token / 1024:.1f} KiB) + logits {gib(self.logits_bytes)} "
            f"+ context {gib(self.context_bytes(kind))} = {gib(self.total(kind))}",
            *self.notes,
        ]


@dataclass(frozen=True)
class Weights:
    """What the headers of a model's safetensors files say."""

    bytes: int
    dtype: str


def read_header(path: Path) -> dict[str, Any]:
    """JSON header of a safetensors file. Raises PoolError for a file that isn't one or is cut off."""
    broken = f"{path.name} is not a whole safetensors file"
    next_step = "`llorch-pool model verify` shows what is damaged; `model download` brings it again."
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MAX_HEADER_BYTES:
                raise PoolError(broken, next_step=next_step, code="damaged")
            header = msgspec.json.decode(stream.read(length), type=dict[str, Any])
    except (struct.error, msgspec.DecodeError) as error:
        raise PoolError(broken, next_step=next_step, code="damaged") from error
    ends = [item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"]
    if 8 + length + max(ends, default=0) != path.stat().st_size:
        raise PoolError(broken, next_step=next_step, code="damaged")
    return header


def read_weights(folder: Path) -> Weights:
    """Bytes and most common dtype of all tensors. Raises PoolError when there is no safetensors file."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise PoolError(
            f"no .safetensors file in {folder}",
            next_step="Models are served from safetensors files; pickled weights are refused. Choose a repository that "
            "has them, or convert with transformers' `save_pretrained`.",
            code="format",
        )
    total, by_dtype = 0, dict[str, int]()
    for path in files:
        for name, tensor in read_header(path).items():
            if name == "__metadata__":
                continue
            size = tensor["data_offsets"][1] - tensor["data_offsets"][0]
            total += size
            by_dtype[tensor["dtype"]] = by_dtype.get(tensor["dtype"], 0) + size
    common = max(by_dtype, key=lambda dtype: by_dtype[dtype], default="")
    return Weights(total, _NAMES.get(common, common.lower()))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with the text model's part lifted up for models that hold several. Raises PoolError."""
    path = folder / "config.json"
    try:
        config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise PoolError(
            f"no config.json in {folder}", next_step="Give the folder of a Hugging Face model.", code="format"
        ) from None
    except msgspec.DecodeError as error:
        raise PoolError(f"{path} is not JSON: {error}", next_step="Bring the model again.", code="damaged") from error
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def context_length(config: dict[str, Any]) -> int:
    """Most tokens of a sequence, 0 where the config doesn't say."""
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return 0


def estimate(folder: Path, slots: int | None) -> Need:
    """What a worker for the model in `folder` needs. Raises PoolError for files that can't be read."""
    config, weights = read_config(folder), read_weights(folder)
    slots = slots or DEFAULT_SLOTS
    notes: list[str] = []

    def number(*keys: str, default: int = 0) -> int:
        return next((int(config[key]) for key in keys if isinstance(config.get(key), int)), default)

    layers, heads = number("num_hidden_layers", "n_layer"), number("num_attention_heads", "n_head", default=1)
    kv_heads = number("num_key_value_heads", default=heads)
    head_size = number("head_dim", default=number("hidden_size", "n_embd") // max(heads, 1))
    if not (layers and head_size):
        notes.append("config.json doesn't give layers and head size: the KV cache is not in this sum")
    width = 4 if weights.dtype == "float32" else 2
    context = context_length(config) or 8192
    return Need(
        weights_bytes=weights.bytes,
        kv_bytes_per_token=2 * layers * kv_heads * head_size * width,
        kv_tokens=max(min(context, 8192), slots * 512),
        logits_bytes=slots * number("vocab_size") * 4,
        notes=notes,
    )
