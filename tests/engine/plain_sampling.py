"""The sampler once more, for one row, in plain Python numbers: slow and obvious."""

from __future__ import annotations

import math
import struct

from worker.engine.philox import mix64
from worker.engine.protocol import SamplingSpec


def philox4x32_plain(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 over Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def float32(value: float) -> float:
    """Rounded to single precision."""
    return struct.unpack("f", struct.pack("f", value))[0]


def plain_gumbel(token_id: int, key: int) -> float:
    """The noise of a token under a 64-bit key."""
    word = philox4x32_plain((token_id, 0, 0, 0), (key % 2**32, key >> 32))[0]
    return float32(-math.log(-math.log1p(-(word + 0.5) / 2**32)))


def adjusted(
    logits: list[float], spec: SamplingSpec, prompt: list[int], output: list[int], eos: frozenset[int]
) -> list[float]:
    """Logits after bias, min_tokens and penalties."""
    out = list(logits)
    for token, bias in spec.logit_bias.items():
        out[token] += bias
    if len(output) < spec.min_tokens:
        for token in {*eos, *spec.stop_token_ids}:
            out[token] = -math.inf
    for token in set(prompt) | set(output):
        out[token] = out[token] / spec.repetition_penalty if out[token] > 0 else out[token] * spec.repetition_penalty
    for token in set(output):
        out[token] -= spec.presence_penalty + spec.frequency_penalty * output.count(token)
    return out


def survivors(scaled: list[float], spec: SamplingSpec) -> list[int]:
    """Tokens left by top-k, then top-p, then min-p; equal values survive together."""
    alive = [token for token, value in enumerate(scaled) if value > -math.inf]
    best = max(scaled)
    if spec.top_k:
        values = sorted((scaled[token] for token in alive), reverse=True)
        if spec.top_k < len(values):
            alive = [token for token in alive if scaled[token] >= values[spec.top_k - 1]]
    if spec.top_p < 1.0:
        total = math.fsum(math.exp(scaled[token] - best) for token in alive)
        reached, floor = 0.0, -math.inf
        for value in sorted((scaled[token] for token in alive), reverse=True):
            reached += math.exp(value - best)
            if reached >= spec.top_p * total:
                floor = value
                break
        alive = [token for token in alive if scaled[token] >= floor]
    if spec.min_p > 0.0:
        alive = [token for token in alive if scaled[token] >= float32(best + math.log(spec.min_p))]
    return alive


def sample_plain(
    logits: list[float], spec: SamplingSpec, prompt: list[int], output: list[int], eos: frozenset[int]
) -> int:
    """The next token."""
    changed = adjusted(logits, spec, prompt, output, eos)
    if spec.temperature < 1e-5:
        return changed.index(max(changed))
    scaled = [float32(value / spec.temperature) if value > -math.inf else value for value in changed]
    key = mix64(spec.seed, len(prompt) + len(output))
    scores = {token: scaled[token] + plain_gumbel(token, key) for token in survivors(scaled, spec)}
    return max(scores, key=lambda token: (scores[token], -token))
