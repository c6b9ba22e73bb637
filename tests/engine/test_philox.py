"""Philox4x32-10 against the published vectors, and what is built on it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.plain_sampling import philox4x32_plain, plain_gumbel
from worker.engine.philox import MAX_GUMBEL, gumbel, mix64, philox4x32, signed64

# From the Random123 distribution, file kat_vectors, philox4x32 with 10 rounds: counter, key, output.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_known_answers(counter, key, output):
    tensors = [torch.tensor([word]) for word in words(counter)]
    keys = [torch.tensor([word]) for word in words(key)]
    got = philox4x32(tuple(tensors), tuple(keys))
    assert tuple(int(word) for word in got) == words(output)
    assert philox4x32_plain(words(counter), words(key)) == words(output)


WORD = st.integers(0, 2**32 - 1)


@settings(max_examples=200, deadline=None)
@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_tensors_equal_plain_integers(counter, key):
    got = philox4x32(tuple(torch.tensor([w]) for w in counter), tuple(torch.tensor([w]) for w in key))
    assert tuple(int(word) for word in got) == philox4x32_plain(counter, key)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(-(2**63), 2**63 - 1), position=st.integers(0, 2**40), token=st.integers(0, 2**31))
def test_noise_is_a_function_of_seed_position_and_token(seed, position, token):
    key = mix64(seed, position)
    assert 0 <= key < 2**64
    ids = torch.tensor([token, 5, token])
    noise = gumbel(ids, torch.tensor([signed64(key)] * 3))
    assert noise[0] == noise[2] == plain_gumbel(token, key)
    assert -3.2 < float(noise[0]) <= MAX_GUMBEL


def test_mix64_stays_what_it_is():
    """A continuation elsewhere relies on these numbers: another version must not change them."""
    assert [mix64(0, 0), mix64(1, 0), mix64(0, 1), mix64(-1, 7)] == [
        mix64(2**64, 0),
        mix64(1 - 2**64, 0),
        mix64(0, 1),
        mix64(2**64 - 1, 7),
    ]
    assert len({mix64(seed, position) for seed in range(64) for position in range(64)}) == 4096
    assert mix64(0, 0) == 0xA706DD2F4D197E6F
    assert mix64(42, 1000) == 0xB1FC8C824D524899


def test_the_bounds_of_the_noise():
    largest = -math.log(-math.log1p(-(0.5 * 2.0**-32)))
    assert largest < MAX_GUMBEL


def test_the_noise_is_gumbel_distributed():
    noise = gumbel(torch.arange(200_000), torch.tensor(signed64(mix64(3, 4))))
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02
    for point in (-1.0, 0.0, 1.0, 3.0):
        share = float((noise <= point).float().mean())
        assert abs(share - math.exp(-math.exp(-point))) < 0.005
