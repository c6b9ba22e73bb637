"""From options to an engine that is ready: device, model, memory for the cache, attention.

Read `build_engine` first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from worker.engine.attention import Backend, choose_attention
from worker.engine.block_manager import BlockManager
from worker.engine.cache_size import StepLoad, allocate, blocks_that_fit
from worker.engine.cpu_layers import PADDINGS, RowPadding, prepare_for_cpu
from worker.engine.exactness import forward_is_exact, forward_is_finite
from worker.engine.experts import register_experts
from worker.engine.kv_cache import KVCache, KVShape
from worker.engine.lean_decoder import lean_decoder
from worker.engine.lean_layer import make_lean
from worker.engine.loader import LoadedModel, LoadError, load_model, not_finite
from worker.engine.loop import Channel, EngineLoop
from worker.engine.model_runner import ATTENTION_NAME, ModelRunner, register_attention
from worker.engine.protocol import EngineCapabilities, EngineReady
from worker.engine.sampler import Sampler
from worker.engine.scheduler import Scheduler
from worker.engine.thread_choice import ThreadChoice, thread_numbers

logger = logging.getLogger("llorch.engine")

CPU_BLOCK_TOKENS = 16
DEFAULT_SLOTS = {"cpu": 16, "mps": 16, "cuda": 64}
DEFAULT_BATCH_TOKENS = {"cpu": 256, "mps": 512, "cuda": 4096}
LARGE_MODEL_PARAMETERS = 10**9
"""On a CPU, models from here on always get all threads: beside their products a barrier is nothing, and trying out
fewer threads would take minutes."""
SMALL_MODEL_PARAMETERS = 10**8
SMALL_MODEL_BATCH_TOKENS = 512
"""On a CPU, for models of fewer parameters than that: what surrounds their matrix products is spread over more tokens,
and a step still takes a fraction of a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The engine's command line. 0 means: choose."""

    model_dir: Path
    device: str = "auto"
    dtype: str = "auto"
    slots: int = 0
    max_model_len: int = 0
    kv_memory_bytes: int = 0
    attention: str = "auto"
    max_batch_tokens: int = 0
    threads: int = 0
    deterministic: bool = False
    prefix_cache: bool = True


@dataclass(frozen=True, slots=True)
class Engine:
    """A loop that takes work, and what the HTTP process is told about it."""

    loop: EngineLoop
    ready: EngineReady


def build_engine(
    options: EngineOptions, channel: Channel, progress: Callable[[str, float], None] = lambda phase, fraction: None
) -> Engine:
    """Load the model and size everything. Raises LoadError with what to do."""
    device = choose_device(options.device)
    register_attention()
    experts_name = register_experts(device)
    progress("reading weights", 0.0)
    loaded = load_model(
        options.model_dir,
        device=device,
        dtype=options.dtype,
        attention_name=ATTENTION_NAME,
        experts_name=experts_name,
    )
    padding, lean_layers = _prepare(loaded, device)
    progress("measuring", 0.5)
    load = _load(options, loaded, device)
    shape = kv_shape(loaded)
    heads = loaded.model.config.num_attention_heads
    backend = choose_attention(options.attention, heads, shape, device, deterministic=options.deterministic)
    block_tokens = backend.block_tokens or CPU_BLOCK_TOKENS
    num_blocks = blocks_that_fit(loaded, shape, block_tokens, load, options.kv_memory_bytes, device)
    context_length = min(load.longest, num_blocks * block_tokens)
    cache = allocate(shape, num_blocks, block_tokens, device)
    attention = backend.build(cache, context_length)
    lean = lean_decoder(loaded.model, context_length) if lean_layers else None
    runner = ModelRunner(loaded.model, cache, attention, padding, lean)
    if not forward_is_finite(runner, cache, loaded.vocab_size, context_length):
        raise not_finite(options.model_dir, loaded.dtype)
    may_be_exact = backend.batch_invariant and (options.deterministic or loaded.dtype is torch.float32)
    exact = _choose_threads(runner, cache, loaded, context_length, may_be_exact=may_be_exact)
    if options.deterministic and not exact:
        raise LoadError(
            "NOT_DETERMINISTIC",
            f"--deterministic: on {device.type} in {_name(loaded.dtype)} with attention {backend.name}, a sequence's "
            "numbers depend on what else is in the batch; use --dtype float32 on a CPU, or leave the flag out.",
        )
    blocks = BlockManager(
        num_blocks, block_tokens, prefix_cache=options.prefix_cache, contiguous=backend.wants_contiguous_blocks
    )
    loop = EngineLoop(
        channel,
        Scheduler(blocks, slots=load.slots, max_batch_tokens=load.batch_tokens),
        blocks,
        runner,
        Sampler(loaded.eos_token_ids),
        cache,
        vocab_size=loaded.vocab_size,
        context_length=context_length,
        eos_token_ids=loaded.eos_token_ids,
    )
    ready = _introduction(loaded, cache, backend, load.slots, context_length, exact=exact)
    progress("ready", 1.0)
    return Engine(loop, ready)


def _introduction(
    loaded: LoadedModel, cache: KVCache, backend: Backend, slots: int, context_length: int, *, exact: bool
) -> EngineReady:
    """What the HTTP process is told about the engine."""
    device = cache.pool.device
    return EngineReady(
        architecture=loaded.architecture,
        vocab_size=loaded.vocab_size,
        context_length=context_length,
        slots_total=slots,
        kv_blocks_total=cache.num_blocks,
        kv_block_tokens=cache.block_tokens,
        dtype=_name(loaded.dtype),
        device=str(device),
        attention=backend.name,
        attention_notice=backend.notice,
        determinism="exact" if exact else "prefix",
        eos_token_ids=sorted(loaded.eos_token_ids),
        vram_bytes=torch.cuda.memory_reserved(device) if device.type == "cuda" else 0,
        capabilities=EngineCapabilities(batch_invariant=exact),
    )


def choose_device(name: str) -> torch.device:
    """`auto`: CUDA, then MPS, then the CPU; `cuda:N`: the Nth GPU that is visible. Raises LoadError if it's missing.

    A GPU becomes the current one, which is what everything in torch.cuda that isn't told a device speaks of.
    """
    if name.startswith("cuda:") and torch.cuda.is_available():
        index, count = int(name.removeprefix("cuda:")), torch.cuda.device_count()
        if index >= count:
            there = "cuda:0 alone" if count == 1 else f"cuda:0 to cuda:{count - 1}"
            raise LoadError("DEVICE_MISSING", f"--device {name}: this process sees {there}; name one of them, or cuda.")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if name in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    raise LoadError("DEVICE_MISSING", f"--device {name}: torch {torch.__version__} finds none here; use --device auto.")


def kv_shape(loaded: LoadedModel) -> KVShape:
    """What the model keeps for a token."""
    config = loaded.model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return KVShape(config.num_hidden_layers, config.num_key_value_heads, head_dim, loaded.dtype)


def _prepare(loaded: LoadedModel, device: torch.device) -> tuple[RowPadding, int]:
    """Make a float32 model quick on a CPU; the padding that its rows need, and how many of its layers became lean."""
    if device.type == "cpu" and loaded.dtype is torch.float32:
        config = loaded.model.config
        padding = prepare_for_cpu(loaded.model, getattr(config, "hidden_act", None) or config.hidden_activation)
        return padding, make_lean(loaded.model)
    return (PADDINGS[-1] if device.type == "cpu" else RowPadding(1, 1)), 0


def _choose_threads(
    runner: ModelRunner, cache: KVCache, loaded: LoadedModel, context_length: int, *, may_be_exact: bool
) -> bool:
    """Let steps differ in their number of CPU threads, unless that would cost the label `exact`; whether it holds."""
    numbers = thread_numbers(torch.get_num_threads()) if cache.pool.device.type == "cpu" else ()
    if _parameters(loaded) >= LARGE_MODEL_PARAMETERS:
        numbers = numbers[:1]
    size = loaded.vocab_size, context_length
    exact = may_be_exact and forward_is_exact(runner, cache, *size, numbers)
    if may_be_exact and not exact and len(numbers) > 1:
        logger.info("every step takes %d threads: with fewer, numbers would differ", numbers[0])
        numbers = numbers[:1]
        exact = forward_is_exact(runner, cache, *size)
    if numbers:
        runner.threads = ThreadChoice(numbers)
    return exact


def _load(options: EngineOptions, loaded: LoadedModel, device: torch.device) -> StepLoad:
    if options.max_model_len == 1:
        raise LoadError("CONTEXT_TOO_SHORT", "--max-model-len 1 has no room for an answer; use at least 2, or 0.")
    slots = options.slots or DEFAULT_SLOTS[device.type]
    batch_tokens = max(options.max_batch_tokens or _batch_tokens(loaded, device), slots)
    return StepLoad(slots, batch_tokens, min(loaded.max_positions, options.max_model_len or loaded.max_positions))


def _batch_tokens(loaded: LoadedModel, device: torch.device) -> int:
    if device.type == "cpu" and _parameters(loaded) < SMALL_MODEL_PARAMETERS:
        return SMALL_MODEL_BATCH_TOKENS
    return DEFAULT_BATCH_TOKENS[device.type]


def _parameters(loaded: LoadedModel) -> int:
    return sum(weight.numel() for weight in loaded.model.parameters())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
