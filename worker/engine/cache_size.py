"""How large the KV cache is: what was asked for, or what the device has left. Read `blocks_that_fit` first."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker.engine.kv_cache import KVCache, KVShape
from worker.engine.loader import LoadedModel, LoadError
from worker.engine.machine import CPU_KV_SHARE, MAX_CPU_KV_BYTES, available_memory_bytes

GPU_KV_SHARE = 0.9
"""Share of the device's memory that weights, activations and cache may take together."""


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What an engine takes on at most: sequences together, tokens in a step, tokens of one sequence."""

    slots: int
    batch_tokens: int
    longest: int


def blocks_that_fit(
    loaded: LoadedModel, shape: KVShape, block_tokens: int, load: StepLoad, kv_memory_bytes: int, device: torch.device
) -> int:
    """Blocks that fit into `kv_memory_bytes` (0: a sensible share); never more than twice what all slots can use.

    Raises LoadError where not even one fits, or more was asked for than is free.
    """
    if kv_memory_bytes:
        budget = kv_memory_bytes
    elif device.type == "cuda":
        budget = _cuda_budget(loaded, load.batch_tokens, device)
    else:
        budget = min(int(available_memory_bytes() * CPU_KV_SHARE), MAX_CPU_KV_BYTES)
    block_bytes = shape.bytes_per_token * block_tokens
    most = 2 * load.slots * -(-load.longest // block_tokens)
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


def allocate(shape: KVShape, num_blocks: int, block_tokens: int, device: torch.device) -> KVCache:
    """The cache itself. Raises LoadError where there is no memory for it."""
    try:
        return KVCache(shape, num_blocks=num_blocks, block_tokens=block_tokens, device=device)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError, OverflowError) as error:
        size = num_blocks * block_tokens * shape.bytes_per_token
        raise LoadError("OUT_OF_MEMORY", f"no memory for a KV cache of {size} bytes; lower --kv-memory.") from error
