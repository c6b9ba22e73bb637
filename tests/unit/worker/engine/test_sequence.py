"""When a sequence is over, and what a resume changes about that: nothing."""

from __future__ import annotations

import pytest

from worker.engine.protocol import AddSequence, SamplingSpec
from worker.engine.sequence import Sequence

EOS = frozenset({9})


def make(output: list[int], *, context: int = 100, **sampling) -> Sequence:
    request = AddSequence(
        sequence_id="s",
        prompt_token_ids=[1, 2, 3],
        output_token_ids=output,
        sampling=SamplingSpec(**{"max_tokens": 4, **sampling}),
    )
    return Sequence(request, arrival=0, context_length=context)


@pytest.mark.parametrize(
    ("output", "options", "reason"),
    [
        ([], {}, None),
        ([5], {}, None),
        ([5, 9], {}, "EOS"),
        ([5, 9], {"ignore_eos": True}, None),
        ([5, 7], {"stop_token_ids": (7,)}, "STOP_TOKEN"),
        ([9], {"stop_token_ids": (9,)}, "EOS"),
        ([9], {"stop_token_ids": (9,), "ignore_eos": True}, "STOP_TOKEN"),
        ([5, 9], {"min_tokens": 3}, None),
        ([5, 5, 9], {"min_tokens": 3}, "EOS"),
        ([5, 5, 5, 5], {}, "MAX_TOKENS"),
        ([5, 5, 5, 9], {}, "EOS"),
        ([5, 5], {"context": 5}, "MAX_TOKENS"),
    ],
)
def test_the_end_of_a_sequence(output, options, reason):
    assert make(output, **options).finish_reason(EOS) == reason


def test_a_stop_token_in_the_prompt_ends_nothing():
    assert make([], stop_token_ids=(3,)).finish_reason(EOS) is None


def test_counts_follow_the_output_alone():
    sequence = make([5, 5, 6])
    assert sequence.count_outputs() == {5: 2, 6: 1}
    sequence.append(6)
    assert sequence.count_outputs() == {5: 2, 6: 2}
    assert (sequence.num_tokens, sequence.num_output_tokens) == (7, 4)
