"""The block manager against a plain model of it: no block is lost, shared wrongly, or found by the wrong prompt."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.block_manager import BlockManager
from worker.engine.protocol import AddSequence, SamplingSpec
from worker.engine.sequence import Sequence


def make(tokens: list[int], *, salt: str = "", arrival: int = 0, max_tokens: int = 8) -> Sequence:
    request = AddSequence(
        sequence_id=str(arrival),
        prompt_token_ids=tokens,
        sampling=SamplingSpec(max_tokens=max_tokens),
        cache_salt=salt,
    )
    return Sequence(request, arrival=arrival, context_length=1000)


def run_through(blocks: BlockManager, sequence: Sequence) -> None:
    """Admit a sequence and compute all of its tokens."""
    blocks.admit(sequence, blocks.match_prefix(sequence))
    sequence.num_computed = sequence.num_tokens
    blocks.publish(sequence)


def test_a_prefix_is_found_again_and_one_token_is_left_to_compute():
    blocks = BlockManager(8, 4)
    first = make(list(range(8)))
    run_through(blocks, first)
    blocks.release(first)
    assert len(blocks.match_prefix(make(list(range(9))))) == 2
    assert len(blocks.match_prefix(make(list(range(8))))) == 1, "the last token must be computed for its logits"
    assert blocks.match_prefix(make([9, *range(1, 9)])) == []


def test_another_salt_finds_nothing():
    blocks = BlockManager(8, 4)
    run_through(blocks, make(list(range(9)), salt="a"))
    assert blocks.match_prefix(make(list(range(9)), salt="b")) == []
    assert len(blocks.match_prefix(make(list(range(9)), salt="a"))) == 2


def test_the_same_block_behind_another_beginning_is_not_a_hit():
    blocks = BlockManager(8, 2)
    run_through(blocks, make([1, 1, 5, 5, 0]))
    assert len(blocks.match_prefix(make([2, 2, 5, 5, 0]))) == 0


def test_a_block_is_not_found_before_it_is_computed():
    blocks = BlockManager(8, 4)
    first = make(list(range(8)))
    blocks.admit(first, [])
    blocks.publish(first)
    assert blocks.match_prefix(make(list(range(9)))) == []
    first.num_computed = 5
    blocks.publish(first)
    assert len(blocks.match_prefix(make(list(range(9))))) == 1


def test_the_least_recently_used_goes_first_and_ends_before_beginnings():
    blocks = BlockManager(4, 2, contiguous=False)
    old, new = make([1, 2, 3, 4], arrival=1), make([5, 6, 7, 8], arrival=2)
    for sequence in (old, new):
        run_through(blocks, sequence)
        blocks.release(sequence)
    third = make([9, 9], arrival=3)
    blocks.admit(third, [])
    assert len(blocks.match_prefix(make([1, 2, 3, 4, 0]))) == 1
    assert len(blocks.match_prefix(make([5, 6, 7, 8, 0]))) == 2


def test_spoiled_blocks_are_forgotten():
    blocks = BlockManager(4, 2)
    sequence = make([1, 2, 3, 4])
    run_through(blocks, sequence)
    blocks.forget(sequence)
    blocks.release(sequence)
    assert blocks.match_prefix(make([1, 2, 3, 4, 5])) == []
    assert blocks.num_available == 4
    blocks.check_integrity([])


def test_sequences_lie_side_by_side_while_there_is_room():
    blocks = BlockManager(40, 4, contiguous=True)
    sequences = [make([n] * 6, arrival=n, max_tokens=10) for n in range(4)]
    for sequence in sequences:
        blocks.admit(sequence, [])
    for _ in range(10):
        for sequence in sequences:
            sequence.append(7)
            blocks.append(sequence)
    for sequence in sequences:
        assert sequence.blocks == list(range(sequence.blocks[0], sequence.blocks[0] + len(sequence.blocks)))
    blocks.check_integrity(sequences)


def test_a_full_cache_is_evicted_in_one_piece_for_a_newcomer():
    blocks = BlockManager(12, 2, contiguous=True)
    for n in range(3):
        sequence = make([n] * 8, arrival=n, max_tokens=1)
        run_through(blocks, sequence)
        blocks.release(sequence)
    newcomer = make([9] * 8, arrival=9, max_tokens=1)
    blocks.admit(newcomer, [])
    assert newcomer.blocks == list(range(newcomer.blocks[0], newcomer.blocks[0] + 4))
    blocks.check_integrity([newcomer])


def test_no_blocks_is_a_mistake():
    with pytest.raises(ValueError, match="at least one block"):
        BlockManager(0, 16)


def test_integrity_notices_a_lost_block():
    blocks = BlockManager(4, 2)
    sequence = make([1, 2, 3])
    blocks.admit(sequence, [])
    with pytest.raises(RuntimeError, match="differ"):
        blocks.check_integrity([])
    sequence.blocks[1] = sequence.blocks[0]
    with pytest.raises(RuntimeError, match="twice"):
        blocks.check_integrity([sequence])


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["admit", "grow", "compute", "release", "forget"]), st.integers(0, 50)), max_size=60
)


@settings(max_examples=300, deadline=None)
@given(actions=ACTIONS, num_blocks=st.integers(1, 12), size=st.integers(1, 4), contiguous=st.booleans())
def test_any_order_of_actions_keeps_the_books(actions, num_blocks, size, contiguous):
    blocks = BlockManager(num_blocks, size, contiguous=contiguous)
    live: list[Sequence] = []
    contents: dict[int, tuple[str, tuple[int, ...]]] = {}  # block → what was computed into it, as a whole prefix
    for arrival, (action, number) in enumerate(actions):
        if action == "admit":
            sequence = make([n % 2 for n in range(number % 9 + 1)], salt=str(number % 2), arrival=arrival)
            hits = blocks.match_prefix(sequence)
            for index, block in enumerate(hits):
                assert contents[block] == (sequence.cache_salt, tuple(sequence.tokens[: (index + 1) * size]))
            if blocks.can_admit(sequence, hits, 0):
                blocks.admit(sequence, hits)
                live.append(sequence)
        elif live:
            sequence = live[number % len(live)]
            if action == "grow":
                sequence.append(number % 2)
                if blocks.can_append(sequence):
                    blocks.append(sequence)
                else:
                    sequence.tokens.pop()
            elif action == "compute":
                for index in range(sequence.num_computed, sequence.num_tokens):
                    block = sequence.blocks[index // size]
                    contents[block] = (sequence.cache_salt, tuple(sequence.tokens[: (index // size + 1) * size]))
                sequence.num_computed = sequence.num_tokens
                blocks.publish(sequence)
            else:
                if action == "forget":
                    blocks.forget(sequence)
                blocks.release(sequence)
                live.remove(sequence)
        blocks.check_integrity(live)
    for sequence in live:
        blocks.release(sequence)
    blocks.check_integrity([])
    assert blocks.num_available == num_blocks
