"""Drives a real engine loop step by step, without the process around it, and makes tiny models for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from worker.engine.assemble import EngineOptions, build_engine
from worker.engine.protocol import (
    AddSequence,
    CancelSequence,
    FromEngine,
    SamplingSpec,
    SequenceEnd,
    Shutdown,
    StepOutput,
    ToEngine,
    TokenOut,
)

VOCAB = 199
EOS = 1

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": 2,
    # Large weights: a tiny random model that contradicts itself at every token, with logits far apart.
    "initializer_range": 0.3,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama2": lambda: LlamaConfig(**{**_BASE, "num_key_value_heads": 4}),
    "llama3": lambda: LlamaConfig(**_BASE, rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_BASE, sliding_window=24, head_dim=24),
    "qwen2": lambda: Qwen2Config(**_BASE, use_sliding_window=True, sliding_window=20, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**_BASE, head_dim=32),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_BASE,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[1],
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **{**_BASE, "num_hidden_layers": 7},
        head_dim=24,
        sliding_window=16,
        sliding_window_pattern=6,
        query_pre_attn_scalar=40,
    ),
}
"""One per allowed architecture, with its features: grouped heads, ties, RoPE scaling, windows, q/k norms, experts."""

_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def _qwen3_moe(**changes: Any) -> Any:
    sizes = {"head_dim": 32, "num_experts": 8, "moe_intermediate_size": 48, "num_experts_per_tok": 2}
    return Qwen3MoeConfig(**{**_BASE, **sizes, **changes})


VARIANTS: dict[str, Callable[[], Any]] = {
    "llama_biases": lambda: LlamaConfig(**_BASE, attention_bias=True, mlp_bias=True),
    "llama_yarn": lambda: LlamaConfig(**_BASE, rope_parameters=_YARN),
    "llama_linear": lambda: LlamaConfig(**_BASE, rope_parameters=_LINEAR),
    "llama_one_kv_head": lambda: LlamaConfig(**{**_BASE, "num_key_value_heads": 1}),
    "qwen2_yarn": lambda: Qwen2Config(**_BASE, rope_parameters=_YARN),
    "qwen3_window_biases_ties": lambda: Qwen3Config(
        **_BASE,
        head_dim=32,
        attention_bias=True,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=20,
        max_window_layers=1,
    ),
    "qwen3_moe_raw_weights": lambda: _qwen3_moe(norm_topk_prob=False),
    "qwen3_moe_every_other_layer": lambda: _qwen3_moe(norm_topk_prob=True, decoder_sparse_step=2),
    "qwen3_moe_one_expert": lambda: _qwen3_moe(norm_topk_prob=True, num_experts_per_tok=1),
    "gemma3_linear": lambda: Gemma3TextConfig(
        **{**_BASE, "num_hidden_layers": 4},
        head_dim=24,
        sliding_window=16,
        query_pre_attn_scalar=40,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {**_LINEAR, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}
"""The same architectures with features that the ones above leave at their defaults."""


def write_tiny_model(config: Any, folder: Path) -> None:
    """Random weights from a fixed seed, saved as a Hugging Face folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # Small embeddings, or a model with tied ones would say its last token again and again.
        model.get_input_embeddings().weight.mul_(0.02)
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                weight.add_(torch.randn_like(weight), alpha=0.3)
    model.save_pretrained(folder)


def reference(folder: Path) -> Any:
    """The same model as transformers runs it by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model


def generate(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """transformers' greedy continuation of one prompt alone."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
        )
    assert out.shape[1] == len(prompt) + new_tokens
    return out[0, len(prompt) :].tolist()


def prompts(count: int, lengths: tuple[int, ...] = (5, 17, 40, 77, 9, 130, 3, 64), seed: int = 1) -> list[list[int]]:
    """Random prompts of varied lengths."""
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCAB) for _ in range(lengths[i % len(lengths)])] for i in range(count)]


def request(
    sequence_id: str, prompt: list[int], max_tokens: int, *, output: list[int] | None = None, salt: str = "", **sampling
) -> AddSequence:
    """A request that by default is greedy and goes on past EOS."""
    spec = SamplingSpec(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **sampling})
    return AddSequence(
        sequence_id=sequence_id,
        prompt_token_ids=prompt,
        output_token_ids=output or [],
        sampling=spec,
        cache_salt=salt,
    )


@dataclass
class Harness:
    """An engine without its process. `inbox` is what it reads next, `tokens` and `ends` what it said."""

    folder: Path
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    inbox: list[ToEngine] = field(default_factory=list)
    tokens: dict[str, list[TokenOut]] = field(default_factory=dict)
    ends: dict[str, SequenceEnd] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options: dict[str, Any] = {"device": "cpu", "kv_memory_bytes": 64 * 2**20, **self.options}
        self.engine = build_engine(EngineOptions(model_dir=self.folder, **options), self)
        self.loop = self.engine.loop
        self.ready = self.engine.ready

    def receive(self, *, wait: bool) -> list[ToEngine]:
        """Stands where the channel would; says Shutdown instead of waiting."""
        messages, self.inbox = self.inbox, []
        return messages or ([Shutdown()] if wait else [])

    def send(self, message: FromEngine) -> None:
        """Collects tokens and ends, and checks what every reader relies on."""
        assert isinstance(message, StepOutput)
        for token in message.tokens:
            assert token.sequence_id not in self.ends, "a token after the end"
            line = self.tokens.setdefault(token.sequence_id, [])
            assert not line or token.index == line[-1].index + 1, "a gap or a repeat"
            line.append(token)
        for end in message.ended:
            assert end.sequence_id not in self.ends, "two ends"
            self.ends[end.sequence_id] = end

    def run(self, *requests: AddSequence) -> dict[str, list[int]]:
        """Run the requests together to their ends; token ids by sequence id."""
        self.tokens, self.ends = {}, {}
        self.inbox.extend(requests)
        self.loop.run()
        self.loop._scheduler.check_integrity()
        for item in requests:
            assert item.sequence_id in self.ends
        return {item.sequence_id: self.ids(item.sequence_id) for item in requests}

    def ids(self, sequence_id: str) -> list[int]:
        """Token ids of a sequence so far."""
        return [token.token_id for token in self.tokens.get(sequence_id, [])]

    def cancel(self, sequence_id: str) -> None:
        """Queue a cancel for the next step."""
        self.inbox.append(CancelSequence(sequence_id=sequence_id))

    def has_work(self) -> bool:
        """Whether another step would compute something."""
        return self.loop._scheduler.has_work or bool(self.inbox)
