"""The vectorised sampler against the plain one, its promises about batches, and its distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.plain_sampling import sample_plain
from worker.engine.protocol import AddSequence, SamplingSpec
from worker.engine.sampler import Sampler
from worker.engine.sequence import Sequence

VOCAB = 24
EOS = frozenset({1})

# Logits on a coarse grid, with ties; the other numbers chosen so that no sum lands exactly on a limit.
LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=VOCAB, max_size=VOCAB)
SPECS = st.builds(
    SamplingSpec,
    max_tokens=st.just(100),
    temperature=st.sampled_from([0.0, 1e-7, 0.25, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9137, 0.6131, 0.3719, 0.0173]),
    top_k=st.sampled_from([0, 1, 2, 5, VOCAB, 1000]),
    min_p=st.sampled_from([0.0, 0.0513, 0.3171, 0.9111]),
    repetition_penalty=st.sampled_from([1.0, 1.25, 2.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -0.5]),
    stop_token_ids=st.sampled_from([(), (3,), (3, 4)]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.0, 2.5]), max_size=4),
    min_tokens=st.integers(0, 6),
    seed=st.integers(-(2**63), 2**63 - 1),
)
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=8)
ROWS = st.lists(st.tuples(LOGITS, SPECS, TOKENS.filter(bool), TOKENS), min_size=1, max_size=9)


def make(spec: SamplingSpec, prompt: list[int], output: list[int] | None = None) -> Sequence:
    request = AddSequence(sequence_id="s", prompt_token_ids=prompt, output_token_ids=output or [], sampling=spec)
    return Sequence(request, arrival=0, context_length=10_000)


@settings(max_examples=400, deadline=None)
@given(rows=ROWS)
def test_equals_the_plain_sampler_row_by_row(rows):
    logits = torch.tensor([row[0] for row in rows])
    sequences = [make(spec, prompt, output) for _, spec, prompt, output in rows]
    got = [sampled.token_id for sampled in Sampler(EOS).sample(logits, sequences)]
    assert got == [sample_plain(*row, EOS) for row in rows]


@pytest.mark.parametrize("vocabulary", [50, 3000])
def test_a_row_gets_the_same_in_any_company(vocabulary):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, vocabulary, generator=generator) * 3
    specs = [
        SamplingSpec(
            max_tokens=9,
            temperature=(0.0, 0.3, 1.0, 1.7)[n % 4],
            top_p=(1.0, 0.99, 0.5)[n % 3],
            top_k=(0, 7, 900)[n % 3],
            min_p=(0.0, 0.01)[n % 2],
            seed=n,
        )
        for n in range(40)
    ]
    sequences = [make(spec, [1, 2]) for spec in specs]
    sampler = Sampler(EOS)
    together = [s.token_id for s in sampler.sample(logits, sequences)]
    for n in range(40):
        assert sampler.sample(logits[n : n + 1], sequences[n : n + 1])[0].token_id == together[n]
    padded = torch.cat([logits[:3], torch.zeros(5, vocabulary)])
    assert [s.token_id for s in sampler.sample(padded, sequences[:3])] == together[:3]


def test_a_flat_top_p_needs_the_whole_vocabulary():
    """More candidates than are sorted at first: the second look must find the same limit as a sort of everything."""
    logits = torch.linspace(0, 0.5, 2000).repeat(2, 1)
    spec = SamplingSpec(max_tokens=9, top_p=0.7, seed=5)
    tokens = {Sampler(EOS).sample(logits, [make(spec, [0] * n), make(spec, [9])])[0].token_id for n in range(1, 400)}
    weights = torch.linspace(0, 0.5, 2000).double().exp().flip(0)
    kept = int((weights.cumsum(0) < 0.7 * weights.sum()).sum()) + 1
    assert min(tokens) >= 2000 - kept
    assert min(tokens) < 2000 - kept + 60


def test_the_tokens_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    logits = probabilities.log().repeat(8, 1)
    counts = torch.zeros(5)
    sampler = Sampler(EOS)
    for position in range(1, 501):
        sequences = [make(SamplingSpec(max_tokens=9, seed=seed), [0] * position) for seed in range(8)]
        for sampled in sampler.sample(logits, sequences):
            counts[sampled.token_id] += 1
    chi2 = float((((counts - 4000 * probabilities) ** 2) / (4000 * probabilities)).sum())
    assert chi2 < 18.5, "one in a thousand"


def test_noise_is_drawn_where_it_can_decide_and_nowhere_is_a_winner_missed():
    """A token 20 nats behind wins when its noise is large enough: compare with noise for every token."""
    from worker.engine.philox import gumbel, mix64, signed64

    logits = torch.full((8, 5000), -9.0)
    logits[:, 0] = 0.0
    sampler = Sampler(EOS)
    for position in range(1, 40):
        sequences = [make(SamplingSpec(max_tokens=9, seed=seed), [0] * position) for seed in range(8)]
        got = [s.token_id for s in sampler.sample(logits, sequences)]
        keys = torch.tensor([signed64(mix64(seed, position)) for seed in range(8)])
        noise = gumbel(torch.arange(5000).repeat(8, 1), keys.unsqueeze(1)).double()
        assert got == (logits.double() + noise).argmax(dim=-1).tolist()


def test_logprobs_are_the_models_own():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    specs = [
        SamplingSpec(max_tokens=9, temperature=0.0, logprobs=3, logit_bias={0: 50.0}),
        SamplingSpec(max_tokens=9, temperature=0.0),
    ]
    first, second = Sampler(EOS).sample(logits, [make(spec, [1]) for spec in specs])
    expected = logits[0].double().log_softmax(-1).tolist()
    assert first.token_id == 0
    assert first.logprob == pytest.approx(expected[0], abs=1e-6)
    assert [token for token, _ in first.top or []] == [1, 2, 0]
    assert [value for _, value in first.top or []] == pytest.approx([expected[1], expected[2], expected[0]], abs=1e-6)
    assert (second.token_id, second.logprob, second.top) == (3, None, None)


def test_logprobs_zero_means_the_chosen_token_alone():
    logits = torch.randn(1, 10)
    (sampled,) = Sampler(EOS).sample(logits, [make(SamplingSpec(max_tokens=9, logprobs=0), [1])])
    assert sampled.top == []
    assert sampled.logprob is not None


def test_more_logprobs_than_tokens():
    (sampled,) = Sampler(EOS).sample(torch.zeros(1, 4), [make(SamplingSpec(max_tokens=9, logprobs=20), [1])])
    assert [token for token, _ in sampled.top or []] == [0, 1, 2, 3]


def test_min_tokens_holds_back_every_way_to_stop():
    logits = torch.full((1, 6), -5.0)
    logits[0, 1], logits[0, 3] = 10.0, 9.0
    spec = SamplingSpec(max_tokens=9, temperature=0.0, min_tokens=2, stop_token_ids=(3,))
    assert Sampler(EOS).sample(logits, [make(spec, [0], [5])])[0].token_id == 0
    assert Sampler(EOS).sample(logits, [make(spec, [0], [5, 5])])[0].token_id == 1


def test_extreme_values_stay_finite():
    logits = torch.tensor([[3e38, -3e38, 0.0, 1.0]])
    for temperature in (1e-5, 1.0, 100.0):
        spec = SamplingSpec(max_tokens=9, temperature=temperature, logit_bias={0: 1e4}, top_p=0.5, min_p=0.1)
        assert Sampler(EOS).sample(logits, [make(spec, [2])])[0].token_id == 0
    assert not math.isnan(float(logits.sum()))
