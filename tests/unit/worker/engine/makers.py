"""What the engine's unit tests share: requests and sequences in one line, and Philox and mix64 in plain Python."""

from __future__ import annotations

import math
from typing import Any

from worker.engine.protocol import AddSequence, SamplingSpec
from worker.engine.sequence import Sequence

M32 = 2**32 - 1
M64 = 2**64 - 1


def request(
    sequence_id: str = "s",
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    salt: str = "",
    **spec: Any,
) -> AddSequence:
    return AddSequence(
        sequence_id=sequence_id,
        prompt_token_ids=[1] if prompt is None else prompt,
        output_token_ids=output or [],
        sampling=SamplingSpec(**{"max_tokens": 64, **spec}),
        cache_salt=salt,
    )


def sequence(
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    *,
    name: str = "s",
    arrival: int = 1,
    salt: str = "",
    context_length: int = 4096,
    **spec: Any,
) -> Sequence:
    asked = request(name, prompt, output, salt, **spec)
    return Sequence(asked, arrival=arrival, context_length=context_length)


def plain_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Ten rounds as the paper draws them: two 32x32-bit products, their high halves mixed with key and counter."""
    x0, x1, x2, x3 = counter
    left, right = key
    for number in range(10):
        round_left = (left + number * 0x9E3779B9) & M32
        round_right = (right + number * 0xBB67AE85) & M32
        high_a, low_a = divmod(0xD2511F53 * x0, 2**32)
        high_b, low_b = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = high_b ^ x1 ^ round_left, low_b, high_a ^ x3 ^ round_right, low_a
    return x0, x1, x2, x3


def plain_mix64(seed: int, position: int) -> int:
    """Two finalizers of splitmix64: the seed's, and that of the sum with a multiple of the golden ratio."""

    def finalize(value: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            value = (value ^ value >> shift) * factor % 2**64
        return value ^ value >> 31

    golden = 0x9E3779B97F4A7C15
    return finalize((finalize((seed + golden) % 2**64) + golden * (position + 1)) % 2**64)


def plain_gumbel(seed: int, position: int, token_id: int) -> float:
    """The noise of a token at a position, in double precision."""
    key = plain_mix64(seed, position)
    word = plain_philox((token_id, 0, 0, 0), (key & M32, key >> 32))[0]
    return -math.log(-math.log1p(-(word + 0.5) / 2**32))
