"""Random numbers that are a function of (seed, position, token id) and of nothing else.

Philox4x32-10: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. The key
is a 64-bit mix of seed and position, the counter is the token id, the first output word is used. So a token's chance
at a place doesn't depend on the batch, on the other candidates, or on where the sequence ran before.
"""

from __future__ import annotations

import torch

MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

MAX_GUMBEL = 22.88
"""No value of `gumbel` is larger: -log(-log1p(-2**-33)) is 22.8739."""


def mix64(seed: int, position: int) -> int:
    """A 64-bit key of a (possibly negative) 64-bit seed and a position: two rounds of splitmix64's finalizer."""
    return _finalize((_finalize((seed + _GOLDEN) & _MASK64) + _GOLDEN * (position + 1)) & _MASK64)


def _finalize(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10 over int64 tensors that hold 32-bit words; the shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The products wrap around in 64 bits; shifting is arithmetic, hence the masks.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((second >> 32) & MASK32) ^ c1 ^ k0
        c2 = ((first >> 32) & MASK32) ^ c3 ^ k1
        c1, c3 = second & MASK32, first & MASK32
        k0, k1 = (k0 + _WEYL[0]) & MASK32, (k1 + _WEYL[1]) & MASK32
    return c0, c1, c2, c3


def gumbel(token_ids: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Gumbel noise, float64 rounded to float32, for token ids under 64-bit keys (both int64, shapes broadcast).

    -log(-log1p(-u)) with u = (32 bits + 0.5) / 2**32: the small u, which decide who wins, keep full precision. Rounding
    hides the last bits, in which a vectorised logarithm may differ from a scalar one.
    """
    zero = torch.zeros_like(token_ids)
    words = philox4x32((token_ids, zero, zero, zero), (keys & MASK32, (keys >> 32) & MASK32))
    uniform = (words[0].to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform)).to(torch.float32)


def signed64(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit number."""
    return value - 2**64 if value >= 2**63 else value
