"""Which models this engine runs right, and the reason why another is refused. No torch: it reads `config.json` alone.

An architecture is on the list when its greedy output equals transformers' own `generate` in the tests, with every
feature of its real configurations. Anything that attention would have to know about and doesn't is refused by name:
a model that almost works is worse than one that doesn't start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SUPPORTED: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma3ForCausalLM": "gemma3_text",
}
"""Architecture → the `model_type` it must have."""

_REASONS: Mapping[str, str] = {
    "Gemma2ForCausalLM": "its attention soft-caps scores, which the attention kernels here don't do",
    "GptOssForCausalLM": "its attention has sinks, which the attention kernels here don't do",
    "Gemma3ForConditionalGeneration": "it takes images; use a text-only checkpoint (Gemma3ForCausalLM)",
    "Phi3ForCausalLM": "its long-context variants change RoPE with the length of the sequence",
    "Qwen2MoeForCausalLM": "it hasn't been checked against transformers' generate",
    "MixtralForCausalLM": "it hasn't been checked against transformers' generate",
}

STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""RoPE scalings that depend on the position alone. `dynamic` and `longrope` depend on the sequence's length, so keys in
the cache would become wrong as it grows."""


class UnsupportedModelError(Exception):
    """The model can't be run right by this engine. The message says why and what runs."""


def check_supported(config: Mapping[str, Any]) -> str:
    """The architecture's name if the engine runs this `config.json` right; raises UnsupportedModelError otherwise."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name is None:
        raise UnsupportedModelError("config.json names no architecture (`architectures`); is this a model folder?")
    if name not in SUPPORTED or config.get("model_type") != SUPPORTED[name]:
        reason = _REASONS.get(name, "it isn't on the list of checked architectures")
        raise UnsupportedModelError(f"{name} is not supported: {reason}. Supported: {', '.join(sorted(SUPPORTED))}.")
    if "quantization_config" in config:
        raise UnsupportedModelError("quantized weights are not supported; use a float32, bfloat16 or float16 model.")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key) is not None:
            raise UnsupportedModelError(f"`{key}` is set in config.json; soft-capping is not supported.")
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModelError("`use_bidirectional_attention` is set in config.json; only causal models generate.")
    _check_rope(config)
    return name


def _check_rope(config: Mapping[str, Any]) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if not isinstance(value, Mapping):
            continue
        nested: list[Mapping[str, Any]] = [part for part in value.values() if isinstance(part, Mapping)]
        for rope in nested or [value]:
            kind = rope.get("rope_type", rope.get("type", "default"))
            if not isinstance(kind, str):
                raise UnsupportedModelError(
                    f"config.json: the `rope_type` in `{key}` is not a string; correct it, or download the model again."
                )
            if kind not in STATIC_ROPE:
                raise UnsupportedModelError(
                    f"RoPE scaling `{kind}` is not supported: it depends on the sequence's length. "
                    f"Remove `{key}` from config.json to run within the original context."
                )
