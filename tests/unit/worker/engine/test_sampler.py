"""The sampler against a plain one: the same tokens, survivors and log-probabilities, whoever else is in the batch."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.worker.engine import plain_sampler
from tests.unit.worker.engine.makers import sequence
from worker.engine.sampler import Sampled, Sampler
from worker.engine.sequence import Sequence

torch.set_num_threads(1)

VOCAB = 40
EOS = frozenset({0, 3})
SAMPLER = Sampler(EOS)
TOKEN = st.integers(0, VOCAB - 1)


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """Each parameter is left alone as often as not, so that rows with and without it share a batch."""

    def maybe(values: st.SearchStrategy[Any], default: Any) -> Any:
        return draw(st.one_of(st.just(default), values))

    return {
        "temperature": maybe(st.sampled_from([0.0, 1e-6, 0.25, 0.7, 1.5, 4.0, 100.0]), 1.0),
        "top_k": maybe(st.integers(1, VOCAB + 5), 0),
        "top_p": maybe(st.floats(0.01, 1.0), 1.0),
        "min_p": maybe(st.floats(0.0, 1.0), 0.0),
        "repetition_penalty": maybe(st.sampled_from([0.5, 1.25, 2.0]), 1.0),
        "presence_penalty": maybe(st.sampled_from([-1.5, 0.5, 2.0]), 0.0),
        "frequency_penalty": maybe(st.sampled_from([-0.5, 0.25, 2.0]), 0.0),
        "logit_bias": maybe(st.dictionaries(TOKEN, st.sampled_from([-1e4, -2.0, 0.5, 100.0]), max_size=4), {}),
        "min_tokens": maybe(st.integers(0, 8), 0),
        "stop_token_ids": maybe(st.lists(TOKEN, max_size=3).map(tuple), ()),
        "logprobs": maybe(st.integers(0, 6), None),
        "seed": maybe(st.integers(-(2**63), 2**64 - 1), 0),
    }


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[float], Sequence]:
    numbers = random.Random(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([1.0, 4.0, 30.0]))
    exact = draw(st.booleans())
    # Eighths are exact in single precision, and often equal: ties are part of the contract.
    logits = [numbers.randint(-8, 8) * spread / 8 if exact else numbers.gauss(0, spread) for _ in range(VOCAB)]
    prompt = draw(st.lists(TOKEN, min_size=1, max_size=5))
    output = draw(st.lists(TOKEN, max_size=6))
    return torch.tensor(logits).tolist(), sequence(prompt, output, **draw(specs()))


def sample(batch: list[tuple[list[float], Sequence]], sampler: Sampler = SAMPLER) -> list[Sampled]:
    return sampler.sample(torch.tensor([logits for logits, _ in batch]), [row for _, row in batch])


def check_logprobs(got: Sampled, logits: list[float], asked: int | None) -> None:
    if asked is None:
        assert got.logprob is None and got.top is None
        return
    expected = plain_sampler.logprobs(logits)
    assert got.logprob == pytest.approx(expected[got.token_id], abs=2e-5)
    assert got.top is not None
    assert len(got.top) == min(asked, len(logits))
    assert got.top == sorted(got.top, key=lambda item: (-item[1], item[0]))
    best = sorted(expected, reverse=True)
    for (token, value), wanted in zip(got.top, best, strict=False):
        assert value == pytest.approx(expected[token], abs=2e-5)
        assert value == pytest.approx(wanted, abs=2e-5)


@settings(max_examples=120, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=10))
def test_mixed_batches_equal_the_plain_sampler(batch: list[tuple[list[float], Sequence]]) -> None:
    for (logits, row), got in zip(batch, sample(batch), strict=True):
        expected = plain_sampler.choose(logits, row, EOS)
        if not expected.doubtful:
            assert got.token_id == expected.token
        check_logprobs(got, logits, row.sampling.logprobs)


ALONE: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.4},
    {"presence_penalty": 3.0},
    {"frequency_penalty": 1.5},
    {"logit_bias": {4: 5.0, 9: -1e4}},
    {"min_tokens": 9, "stop_token_ids": (5, 6)},
    {"top_k": 12, "top_p": 0.8, "min_p": 0.02, "temperature": 1.4},
]


@pytest.mark.parametrize("vocabulary", [VOCAB, 700])
@pytest.mark.parametrize("spec", ALONE, ids=str)
def test_draws_cover_exactly_the_survivors(spec: dict[str, Any], vocabulary: int) -> None:
    """Each parameter by itself, 300 seeds over flat logits: every draw is the plain sampler's."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(vocabulary, generator=generator) * 1.5).tolist()
    batch = [(logits, sequence([1, 2, 2], [4, 4, 5], **{"seed": seed, **spec})) for seed in range(300)]
    drawn = [got.token_id for got in sample(batch)]
    survivors: set[int] = set()
    for token, (_, row) in list(zip(drawn, batch, strict=True))[: 300 if vocabulary == VOCAB else 40]:
        expected = plain_sampler.choose(logits, row, EOS)
        assert expected.doubtful or token == expected.token
        survivors = expected.survivors
    assert set(drawn) <= survivors
    if spec.get("temperature", 1.0) > 0 and len(survivors) <= 5:
        assert set(drawn) == survivors


@pytest.mark.parametrize(
    ("top_p", "survivors"), [(0.4999, {0}), (0.5001, {0, 1}), (0.7999, {0, 1}), (0.8001, {0, 1, 2}), (1.0, {0, 1, 2})]
)
def test_top_p_keeps_as_many_as_reach_it(top_p: float, survivors: set[int]) -> None:
    logits = [math.log(0.5), math.log(0.3), math.log(0.2)]
    drawn = sample([(logits, sequence([1], seed=seed, top_p=top_p)) for seed in range(200)], Sampler(frozenset()))
    assert {got.token_id for got in drawn} == survivors


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_beyond_the_first_candidates(top_p: float) -> None:
    """A flat distribution over 2,000 tokens: the 256 that are sorted first don't reach top_p, beside rows that do."""
    generator = torch.Generator().manual_seed(3)
    flat = (torch.randn(2000, generator=generator) * 0.1).tolist()
    peaked = [value * 60 for value in flat]
    batch = [
        (peaked if seed % 3 else flat, sequence([1], seed=seed, top_p=top_p, top_k=900 * (seed % 2), temperature=0.9))
        for seed in range(24)
    ]
    for (logits, row), got in zip(batch, sample(batch), strict=True):
        expected = plain_sampler.choose(logits, row, EOS)
        assert got.token_id in expected.survivors
        assert expected.doubtful or got.token_id == expected.token


def test_equal_logits_survive_together() -> None:
    logits = [2.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    for spec in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.3}):
        drawn = {got.token_id for got in sample([(logits, sequence([5], seed=s, **spec)) for s in range(200)])}
        assert drawn == {0, 1, 2, 3}, spec


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=2, max_size=600), st.integers(0, 3))
def test_greedy_takes_the_lowest_id_on_ties(logits: list[float], others: int) -> None:
    greedy = sequence([1], temperature=0.0)
    batch = [(logits, greedy)] + [(logits, sequence([1], seed=n)) for n in range(others)]
    assert sample(batch, Sampler(frozenset()))[0].token_id == logits.index(max(logits))


@settings(max_examples=60, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_a_row_gets_the_same_alone_and_at_any_place_bitwise(
    batch: list[tuple[list[float], Sequence]], order: Any
) -> None:
    together = sample(batch)
    shuffled = list(range(len(batch)))
    order.shuffle(shuffled)
    elsewhere = sample([batch[index] for index in shuffled])
    for place, index in enumerate(shuffled):
        assert elsewhere[place] == together[index]
    for row, got in zip(batch, together, strict=True):
        assert sample([row])[0] == got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_real_vocabulary_gets_the_same_alone_bitwise(dtype: torch.dtype) -> None:
    """33,001 tokens: vectorised code has a tail, and bfloat16 has many ties among its logits."""
    logits = (torch.randn(9, 33_001, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    rows = [
        sequence(
            [1],
            seed=n,
            top_p=(1.0, 0.95, 0.4)[n % 3],
            min_p=0.01 * (n % 2),
            temperature=1.3,
            logprobs=(n, None)[n == 4],
        )
        for n in range(9)
    ]
    together = SAMPLER.sample(logits, rows)
    for index, row in enumerate(rows):
        assert SAMPLER.sample(logits[index : index + 1], [row]) == together[index : index + 1]


def test_ties_among_top_logprobs_do_not_depend_on_what_others_ask() -> None:
    """The lower id is listed first, and is the one that is listed where not all fit.

    torch's topk picks any of them, and another one when another row of the batch asks for more.
    """
    logits = [1.0] * 50 + [2.0] + [1.0] * 349
    few = sequence([1], temperature=0.0, logprobs=3)
    for other in (0, 3, 7, 100, 400):
        got = sample([(logits, few), (logits, sequence([1], logprobs=other))])[0]
        assert [token for token, _ in got.top or []] == [50, 0, 1]


def test_logprobs_are_the_models_own() -> None:
    """Before bias, penalties and temperature; more alternatives than tokens are all tokens."""
    logits = [0.0, 1.0, 2.0, 3.0]
    spec = {"temperature": 0.5, "top_k": 1, "logit_bias": {0: 50.0}, "presence_penalty": 2.0, "logprobs": 9}
    got = sample([(logits, sequence([1], [3], **spec))], Sampler(frozenset()))[0]
    assert got.token_id == 0
    check_logprobs(got, logits, 9)
    assert math.fsum(math.exp(value) for _, value in got.top or []) == pytest.approx(1.0, abs=1e-6)


def test_min_tokens_mutes_ends_exactly_so_long() -> None:
    """EOS and stop ids can't be drawn while fewer than min_tokens are out, resumed ones counted, even if biased up."""
    logits = [9.0, 0.0, 0.0, 9.0, 9.0, 8.0]
    for count, expected in ((0, 5), (2, 5), (3, 0), (7, 0)):
        row = sequence([1], [1] * count, temperature=0.0, min_tokens=3, stop_token_ids=(4,), logit_bias={0: 10.0})
        assert sample([(logits, row)])[0].token_id == expected


def test_penalties_see_what_they_should() -> None:
    """The repetition penalty sees the prompt, the others don't; a resume's tokens count as if they came here."""
    logits = [0.0, 4.0, 3.5, 3.0, 2.9]
    cases: list[tuple[list[int], list[int], dict[str, float], int]] = [
        ([1], [], {"repetition_penalty": 2.0}, 2),
        ([1], [2], {"repetition_penalty": 2.0}, 3),
        ([1], [], {"presence_penalty": 2.0, "frequency_penalty": 2.0}, 1),
        ([3], [1], {"presence_penalty": 0.75}, 2),
        ([3], [1, 1, 2], {"frequency_penalty": 0.55}, 3),
        ([3], [1, 1, 2], {"frequency_penalty": 0.25}, 1),
    ]
    for prompt, output, spec, expected in cases:
        row = sequence(prompt, output, temperature=0.0, **spec)
        assert sample([(logits, row)], Sampler(frozenset()))[0].token_id == expected, (prompt, output, spec)
    grown = sequence([3], [], temperature=0.0, frequency_penalty=0.55)
    sample([(logits, grown)])
    for token in (1, 1, 2):
        grown.append(token)
    assert sample([(logits, grown)], Sampler(frozenset()))[0].token_id == 3


def test_the_logits_given_are_not_changed() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(5))
    before = logits.clone()
    SAMPLER.sample(logits, [sequence([1], [2], logit_bias={1: 3.0}, min_tokens=4, presence_penalty=1.0)] * 3)
    assert logits.equal(before)


def test_rows_of_padding_are_ignored() -> None:
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(6))
    logits[2:] = torch.nan
    drawn = [sequence([1], seed=1, logprobs=2, top_p=0.9), sequence([1], temperature=0.0)]
    assert SAMPLER.sample(logits, drawn) == SAMPLER.sample(logits[:2], drawn)


class OnMetal:
    """Logits on a device that no test machine has: nothing may be asked of them but to come to the CPU."""

    device = torch.device("mps")

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def cpu(self) -> torch.Tensor:
        return self.logits


def test_logits_on_metal_are_sampled_on_the_cpu() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(8))
    drawn = [sequence([1], seed=1, top_p=0.9, logprobs=2), sequence([1], seed=2, min_p=0.1), sequence([1], seed=3)]
    on_metal: Any = OnMetal(logits)
    assert SAMPLER.sample(on_metal, drawn) == SAMPLER.sample(logits, drawn)


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    """Not on how the tokens before it are divided into prompt and output, or on what they are."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(7)).tolist()

    def draws(*rows: Sequence) -> list[int]:
        return [got.token_id for got in sample([(logits, row) for row in rows])]

    ways = [sequence([1] * n, [2] * (20 - n), seed=11) for n in range(1, 21)]
    assert len(set(draws(*ways))) == 1
    by_position = draws(*[sequence([1] * n, seed=11) for n in range(1, 60)])
    by_seed = draws(*[sequence([1] * 20, seed=seed) for seed in range(59)])
    assert len(set(by_position)) > 10 and len(set(by_seed)) > 10
    assert by_position != by_seed
    assert draws(sequence([1], seed=-1)) == draws(sequence([1], seed=2**64 - 1)), "seeds are 64-bit numbers"


@pytest.mark.parametrize("spec", [{}, {"temperature": 2.0}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("along", ["seed", "position"])
def test_draws_follow_the_softmax(spec: dict[str, float], along: str) -> None:
    """Chi-square over 4,000 draws against the renormalised softmax of the survivors, over seeds and over positions."""
    count, logits = 4000, [2.0, 1.7, 1.0, 0.5, 0.4, 0.0, -0.5, -1.0]
    if along == "seed":
        made = [sequence([1], seed=n, **spec) for n in range(count)]
    else:
        made = [sequence([1] * (n + 1), seed=77, context_length=10**6, **spec) for n in range(count)]
    drawn = [got.token_id for got in sample([(logits, row) for row in made], Sampler(frozenset()))]
    survivors = plain_sampler.choose(logits, made[0], frozenset()).survivors
    temperature = spec.get("temperature", 1.0)
    weights = {token: math.exp(logits[token] / temperature) for token in survivors}
    total = math.fsum(weights.values())
    chi_square = sum(
        (drawn.count(token) - count * weight / total) ** 2 / (count * weight / total)
        for token, weight in weights.items()
    )
    assert set(drawn) == survivors
    freedom = len(survivors) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 4  # far beyond the 99.9th percentile


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([math.inf, -math.inf, math.nan, 3e38, -3e38, 0.0]), min_size=VOCAB, max_size=VOCAB),
    specs(),
)
def test_broken_logits_still_give_a_token(logits: list[float], spec: dict[str, Any]) -> None:
    healthy = ([float(n % 7) for n in range(VOCAB)], sequence([1], seed=5, top_p=0.9))
    broken, unharmed = sample([(logits, sequence([1], [2], **spec)), healthy])
    assert 0 <= broken.token_id < VOCAB
    assert unharmed == sample([healthy])[0]
