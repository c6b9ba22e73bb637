"""From options to an engine that is ready: device, model, memory for the cache, attention.

Read `build_engine` first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from worker.engine.attention import choose_attention
from worker.engine.block_manager import BlockManager
from worker.engine.cpu_layers import PADDINGS, RowPadding, prepare_for_cpu
from worker.engine.exactness import forward_is_exact
from worker.engine.experts import EXPERTS_NAME, register_experts
from worker.engine.kv_cache import KVCache, KVShape
from worker.engine.lean_decoder import lean_decoder
from worker.engine.lean_layer import make_lean
from worker.engine.loader import LoadedModel, LoadError, load_model
from worker.engine.loop import Channel, EngineLoop
from worker.engine.machine import CPU_KV_SHARE, MAX_CPU_KV_BYTES, available_memory_bytes
from worker.engine.model_runner import ATTENTION_NAME, ModelRunner, register_attention
from worker.engine.protocol import EngineCapabilities, EngineReady
from worker.engine.sampler import Sampler
from worker.engine.scheduler import Scheduler
from worker.engine.thread_choice import ThreadChoice, thread_numbers

logger = logging.getLogger("llorch.engine")

CPU_BLOCK_TOKENS = 16
DEFAULT_SLOTS = {"cpu": 16, "mps": 16, "cuda": 64}
DEFAULT_BATCH_TOKENS = {"cpu": 256, "mps": 512, "cuda": 4096}
SMALL_MODEL_PARAMETERS = 10**8
SMALL_MODEL_BATCH_TOKENS = 512
"""On a CPU, for models of fewer parameters than that: what surrounds their matrix products is spread over more tokens,
and a step still takes a fraction of a second."""
GPU_KV_SHARE = 0.9
"""Share of the device's memory that weights, activations and cache may take together."""


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
    register_experts()
    progress("reading weights", 0.0)
    loaded = load_model(
        options.model_dir,
        device=device,
        dtype=options.dtype,
        attention_name=ATTENTION_NAME,
        experts_name=EXPERTS_NAME,
    )
    padding, lean_layers = _prepare(loaded, device)
    progress("measuring", 0.5)
    slots = options.slots or DEFAULT_SLOTS[device.type]
    batch_tokens = max(options.max_batch_tokens or _batch_tokens(loaded, device), slots)
    limit = min(loaded.max_positions, options.max_model_len or loaded.max_positions)
    shape = kv_shape(loaded)
    backend = choose_attention(options.attention, loaded.model.config.num_attention_heads, shape, device)
    block_tokens = backend.block_tokens or CPU_BLOCK_TOKENS
    num_blocks = _num_blocks(options, loaded, shape, block_tokens, slots, limit, batch_tokens, device)
    context_length = min(limit, num_blocks * block_tokens)
    cache = _allocate(shape, num_blocks, block_tokens, device)
    attention = backend.build(cache, context_length)
    lean = lean_decoder(loaded.model, context_length) if lean_layers else None
    runner = ModelRunner(loaded.model, cache, attention, padding, lean)
    exact = _choose_threads(runner, cache, loaded, context_length, may_be_exact=_may_be_exact(loaded, options))
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
        Scheduler(blocks, slots=slots, max_batch_tokens=batch_tokens),
        blocks,
        runner,
        Sampler(loaded.eos_token_ids),
        cache,
        vocab_size=loaded.vocab_size,
        context_length=context_length,
        eos_token_ids=loaded.eos_token_ids,
    )
    ready = EngineReady(
        architecture=loaded.architecture,
        vocab_size=loaded.vocab_size,
        context_length=context_length,
        slots_total=slots,
        kv_blocks_total=num_blocks,
        kv_block_tokens=block_tokens,
        dtype=_name(loaded.dtype),
        device=str(device),
        attention=backend.name,
        attention_notice=backend.notice,
        determinism="exact" if exact else "prefix",
        eos_token_ids=sorted(loaded.eos_token_ids),
        vram_bytes=torch.cuda.memory_reserved(device) if device.type == "cuda" else 0,
        capabilities=EngineCapabilities(batch_invariant=exact),
    )
    progress("ready", 1.0)
    return Engine(loop, ready)


def choose_device(name: str) -> torch.device:
    """`auto`: CUDA, then MPS, then the CPU. Raises LoadError where the named one isn't there."""
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
    size = loaded.vocab_size, context_length
    exact = may_be_exact and forward_is_exact(runner, cache, *size, numbers)
    if may_be_exact and not exact and len(numbers) > 1:
        logger.info("every step takes %d threads: with fewer, numbers would differ", numbers[0])
        numbers = numbers[:1]
        exact = forward_is_exact(runner, cache, *size)
    if numbers:
        runner.threads = ThreadChoice(numbers)
    return exact


def _may_be_exact(loaded: LoadedModel, options: EngineOptions) -> bool:
    return options.deterministic or loaded.dtype is torch.float32


def _batch_tokens(loaded: LoadedModel, device: torch.device) -> int:
    parameters = sum(weight.numel() for weight in loaded.model.parameters())
    if device.type == "cpu" and parameters < SMALL_MODEL_PARAMETERS:
        return SMALL_MODEL_BATCH_TOKENS
    return DEFAULT_BATCH_TOKENS[device.type]


def _num_blocks(
    options: EngineOptions,
    loaded: LoadedModel,
    shape: KVShape,
    block_tokens: int,
    slots: int,
    limit: int,
    batch_tokens: int,
    device: torch.device,
) -> int:
    """Blocks that fit into --kv-memory or a sensible share; more than twice what all slots can use is never taken."""
    if options.kv_memory_bytes:
        budget = options.kv_memory_bytes
    elif device.type == "cuda":
        budget = _cuda_budget(loaded, batch_tokens, device)
    else:
        budget = min(int(available_memory_bytes() * CPU_KV_SHARE), MAX_CPU_KV_BYTES)
    block_bytes = shape.bytes_per_token * block_tokens
    most = 2 * slots * -(-limit // block_tokens)
    num_blocks = min(budget // block_bytes, most)
    if num_blocks < 1:
        raise LoadError(
            "OUT_OF_MEMORY",
            f"{budget} bytes for the KV cache don't hold one block of {block_bytes} bytes; raise --kv-memory, "
            "or use a smaller model or dtype.",
        )
    if device.type == "cpu":
        _refuse_to_overcommit(num_blocks * block_bytes)
    return num_blocks


def _refuse_to_overcommit(cache_bytes: int) -> None:
    """Pages are taken as they are written: a cache that doesn't fit would get the engine killed, and much later."""
    available = available_memory_bytes()
    if cache_bytes > available:
        raise LoadError(
            "OUT_OF_MEMORY",
            f"a KV cache of {cache_bytes} bytes doesn't fit into the {available} bytes that are free; "
            "lower --kv-memory, --slots or --max-model-len.",
        )


def _cuda_budget(loaded: LoadedModel, batch_tokens: int, device: torch.device) -> int:
    """Free memory after the weights, less what the largest step takes on top (logits and activations, measured)."""
    free, total = torch.cuda.mem_get_info(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    config = loaded.model.config
    try:
        with torch.inference_mode():
            hidden = torch.zeros(batch_tokens, config.hidden_size, dtype=loaded.dtype, device=device)
            loaded.model.model.layers[0].mlp(hidden.unsqueeze(0))
            torch.zeros(min(batch_tokens, 1024), loaded.vocab_size, dtype=torch.float32, device=device)
    except torch.OutOfMemoryError as error:
        raise LoadError(
            "OUT_OF_MEMORY",
            "no memory for the largest step; lower --max-batch-tokens or use a smaller model.",
        ) from error
    step = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return int(free - (1 - GPU_KV_SHARE) * total - 2 * step)


def _allocate(shape: KVShape, num_blocks: int, block_tokens: int, device: torch.device) -> KVCache:
    try:
        return KVCache(shape, num_blocks=num_blocks, block_tokens=block_tokens, device=device)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError, OverflowError) as error:
        size = num_blocks * block_tokens * shape.bytes_per_token
        raise LoadError("OUT_OF_MEMORY", f"no memory for a KV cache of {size} bytes; lower --kv-memory.") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
