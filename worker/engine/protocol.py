"""What the HTTP process and the engine process say to each other over their pipe, and the seam that both stand behind.

Frames are a 4-byte little-endian length and a msgpack message (`ToEngine` one way, `FromEngine` the other). An engine
is anything that speaks this: the torch engine in this package is the first, another (vLLM, say) would be the next.
No torch here.

    HTTP process                         engine process
    AddSequence, CancelSequence  ──▶     schedule → forward → sample
    StepOutput (a whole step)    ◀──     one message a step, every sequence's tokens in it
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from llorch_wire.events import Determinism

MAX_FRAME_BYTES = 64 * 2**20


class SamplingSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Validated sampling parameters, without what the HTTP process handles itself (stop strings, text)."""

    max_tokens: int
    """Most tokens in the whole answer; resumed tokens count."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    logit_bias: dict[int, float] = {}
    ignore_eos: bool = False
    min_tokens: int = 0
    seed: int = 0


class AddSequence(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Start a generation. `output_token_ids` are tokens already generated elsewhere (a resume).

    The engine continues at index len(output_token_ids); penalties, min_tokens and max_tokens see prompt and output as
    if all had happened here.
    """

    sequence_id: str
    prompt_token_ids: list[int]
    output_token_ids: list[int] = []
    sampling: SamplingSpec
    cache_salt: str = ""


class CancelSequence(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Stop a generation; answered by exactly one SequenceEnd (`CANCELLED`), unless it ended already."""

    sequence_id: str


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End the engine process at once."""


ToEngine: TypeAlias = AddSequence | CancelSequence | Shutdown


class EngineLoading(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Progress of a load: `phase` in words ("reading weights", "profiling"), `fraction` 0..1 of that phase."""

    phase: str
    fraction: float


class EngineCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine can do, as flags that the HTTP process and the orchestrator rely on."""

    token_in: bool = True
    token_out: bool = True
    seed_position_keyed: bool = True
    abort: bool = True
    logprobs: bool = True
    batch_invariant: bool = False


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model is loaded and takes work."""

    architecture: str
    vocab_size: int
    context_length: int
    """min(model maximum, --max-model-len, what the KV cache holds for one sequence)."""
    slots_total: int
    kv_blocks_total: int
    kv_block_tokens: int
    dtype: str
    device: str
    attention: str
    attention_notice: str
    """Which attention paths were skipped and why; one line."""
    determinism: Determinism
    eos_token_ids: list[int]
    vram_bytes: int
    capabilities: EngineCapabilities


class EngineLoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model can't be loaded. `permanent`: trying again changes nothing (bad files, unsupported, out of memory)."""

    code: str
    message: str
    permanent: bool


class TokenOut(msgspec.Struct, frozen=True, array_like=True):
    """One generated token of one sequence. `top`: (token id, logprob) alternatives, best first."""

    sequence_id: str
    index: int
    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


EndReason: TypeAlias = Literal["EOS", "STOP_TOKEN", "MAX_TOKENS", "CANCELLED", "ERROR"]


class SequenceEnd(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence left the engine; nothing of it follows. `error` set: it failed alone, with a code and what to do."""

    sequence_id: str
    reason: EndReason
    cached_tokens: int = 0
    prefill_time_ms: int = 0
    decode_time_ms: int = 0
    error_code: str | None = None
    error: str | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters and gauges of the engine. Counters only grow; times are microseconds."""

    steps: int = 0
    running: int = 0
    waiting: int = 0
    kv_blocks_free: int = 0
    kv_blocks_cached: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_prompt_tokens: int = 0
    preemptions: int = 0
    last_step_us: int = 0
    prefill_us: int = 0
    decode_us: int = 0
    step_failures: int = 0
    vram_bytes: int = 0


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Everything that one step produced. A sequence's last token comes in or before the message with its end."""

    tokens: list[TokenOut]
    ended: list[SequenceEnd]
    stats: EngineStats


FromEngine: TypeAlias = EngineLoading | EngineReady | EngineLoadFailed | StepOutput
