"""The sizes in config.json, before anything is built from them. No torch.

transformers takes many wrong values without a word and fails far from the field that is wrong, or divides by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from worker.engine.load_error import wrong_field

MAX_LAYERS = 10_000
_REQUIRED = ("vocab_size", "max_position_embeddings")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NULLABLE = (
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "num_experts_per_tok",
    "num_experts",
    "num_local_experts",
    "moe_intermediate_size",
    "decoder_sparse_step",
)
_ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def check_config(config: Mapping[str, Any]) -> None:
    """Raise LoadError that names the first field with a value that no model can have."""
    for key in (*_REQUIRED, *_SIZES, *_NULLABLE):
        if key in config or key in _REQUIRED:
            value = config.get(key)
            if not (_is_positive(value) or (value is None and key in _NULLABLE)):
                raise wrong_field(key, value, "a whole number of at least 1")
    if config.get("num_hidden_layers", 1) > MAX_LAYERS:
        raise wrong_field("num_hidden_layers", config["num_hidden_layers"], f"at most {MAX_LAYERS}")
    if config["max_position_embeddings"] < 2:
        raise wrong_field("max_position_embeddings", 1, "at least 2, a token of prompt and one of answer")
    _check_heads(config)
    _check_experts(config)
    _check_padding(config)
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(key), Mapping):
            _check_rope(key, config[key])
    _check_number("rope_theta", config.get("rope_theta"))


def _check_heads(config: Mapping[str, Any]) -> None:
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads is not None and kv_heads is not None and heads % kv_heads:
        raise wrong_field("num_key_value_heads", kv_heads, f"a divisor of `num_attention_heads`, {heads}")
    size = config.get("hidden_size")
    if heads is not None and size is not None and config.get("head_dim") is None and size % heads:
        raise wrong_field("num_attention_heads", heads, f"a divisor of `hidden_size`, {size}")


def _check_experts(config: Mapping[str, Any]) -> None:
    chosen = config.get("num_experts_per_tok")
    experts = config.get("num_experts") or config.get("num_local_experts")
    if chosen is not None and experts is not None and chosen > experts:
        raise wrong_field("num_experts_per_tok", chosen, f"at most `num_experts`, {experts}")


def _check_padding(config: Mapping[str, Any]) -> None:
    padding, vocab_size = config.get("pad_token_id"), config["vocab_size"]
    if isinstance(padding, int) and not -vocab_size <= padding < vocab_size:
        raise wrong_field("pad_token_id", padding, f"a token id below `vocab_size`, {vocab_size}, or null")


def _check_rope(key: str, rope: Mapping[str, Any]) -> None:
    for name, value in rope.items():
        if isinstance(value, Mapping):
            _check_rope(f"{key}.{name}", cast("Mapping[str, Any]", value))
        elif name in _ROPE_NUMBERS:
            _check_number(f"{key}.{name}", value)


def _check_number(key: str, value: Any) -> None:
    if value is not None and not (isinstance(value, int | float) and not isinstance(value, bool) and value > 0):
        raise wrong_field(key, value, "a number larger than 0")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
