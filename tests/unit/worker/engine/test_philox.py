"""Random numbers: the published answers of Philox4x32-10, and the same numbers from plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.worker.engine.makers import M64, plain_gumbel, plain_mix64, plain_philox
from worker.engine.philox import MAX_GUMBEL, gumbel, mix64, philox4x32, signed64

torch.set_num_threads(1)

WORD = st.integers(0, 2**32 - 1)
KNOWN = [
    # Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    return tuple(int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1)))


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    assert philox(words(counter), words(key)) == words(result)
    assert plain_philox(words(counter), words(key)) == words(result)


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_equals_plain_python(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    assert philox(counter, key) == plain_philox(counter, key)


def test_shapes_broadcast() -> None:
    zero = torch.zeros((), dtype=torch.int64)
    ids, keys = torch.arange(7).unsqueeze(0), torch.tensor([[3], [2**32 - 1]])
    drawn = philox4x32((ids, zero, zero, zero), (keys, zero))
    assert drawn[0].shape == (2, 7)
    assert drawn[0].tolist() == [[plain_philox((i, 0, 0, 0), (k, 0))[0] for i in range(7)] for k in (3, 2**32 - 1)]


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**31))
def test_mix64_equals_plain_python(seed: int, position: int) -> None:
    key = mix64(seed, position)
    assert key == plain_mix64(seed, position)
    assert 0 <= key <= M64
    assert signed64(key) & M64 == key
    assert -(2**63) <= signed64(key) < 2**63


def test_mix64_is_built_on_splitmix64() -> None:
    """With a seed whose own finalizer gives 0, the key at 0 is splitmix64's published first output from state 0."""
    assert mix64(-0x9E3779B97F4A7C15, 0) == 0xE220A8397B1DCDAF


def test_mix64_separates_neighbours() -> None:
    """No two of 200 neighbouring seeds and 200 neighbouring positions share a key; about half of the bits differ."""
    keys = {mix64(seed, position) for seed in range(-100, 100) for position in range(200)}
    assert len(keys) == 200 * 200
    flips = [(mix64(s, p) ^ mix64(s, p + 1)).bit_count() for s in range(50) for p in range(50)]
    assert 31 < sum(flips) / len(flips) < 33


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.lists(st.integers(0, 2**20), min_size=1, max_size=40))
def test_gumbel_equals_plain_python(seed: int, position: int, ids: list[int]) -> None:
    noise = gumbel(torch.tensor(ids), torch.tensor([signed64(mix64(seed, position))]))
    assert noise.dtype == torch.float32
    for token_id, value in zip(ids, noise.tolist(), strict=True):
        assert value == pytest.approx(plain_gumbel(seed, position, token_id), rel=2e-7, abs=1e-7)


def test_gumbel_of_a_token_does_not_depend_on_the_others() -> None:
    keys = torch.tensor([signed64(mix64(9, p)) for p in range(6)])
    grid = gumbel(torch.arange(333).unsqueeze(0), keys.unsqueeze(1))
    for row, column in ((0, 0), (3, 17), (5, 332)):
        alone = gumbel(torch.tensor([column]), keys[row : row + 1])
        assert alone[0].equal(grid[row, column])


def test_range_and_distribution_of_gumbel() -> None:
    """Bounds of the formula, and mean and variance of 200,000 draws (Euler's constant, pi**2 / 6)."""
    assert -math.log(-math.log1p(-(2.0**-33))) <= MAX_GUMBEL
    noise = gumbel(torch.arange(200_000), torch.tensor([signed64(mix64(1, 2))])).double()
    assert float(noise.min()) > -3.14 and float(noise.max()) <= MAX_GUMBEL
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
