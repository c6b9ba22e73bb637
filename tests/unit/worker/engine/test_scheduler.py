"""The scheduler with an imagined model: the budget holds, everybody finishes, the oldest is never preempted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.block_manager import BlockManager
from worker.engine.protocol import AddSequence, SamplingSpec
from worker.engine.scheduler import Chunk, Scheduler
from worker.engine.sequence import Sequence


def make(arrival: int, prompt: int, answer: int, *, context: int = 1000, salt: str = "") -> Sequence:
    request = AddSequence(
        sequence_id=str(arrival),
        prompt_token_ids=[arrival % 7] * prompt,
        sampling=SamplingSpec(max_tokens=answer),
        cache_salt=salt,
    )
    return Sequence(request, arrival=arrival, context_length=context)


def build(num_blocks: int = 64, size: int = 4, *, slots: int = 4, budget: int = 16, prefix_cache: bool = False):
    blocks = BlockManager(num_blocks, size, prefix_cache=prefix_cache)
    return Scheduler(blocks, slots=slots, max_batch_tokens=budget), blocks


def step(scheduler: Scheduler) -> list[Chunk]:
    """One step of an imagined model that always says 1; ends what is complete."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        assert chunk.start == chunk.sequence.num_computed
        scheduler.computed(chunk)
        if chunk.samples:
            assert chunk.sequence.num_pending == 0
            chunk.sequence.append(1)
            if chunk.sequence.finish_reason(frozenset()) is not None:
                scheduler.remove(chunk.sequence)
    scheduler.check_integrity()
    return chunks


def test_decodes_come_first_and_prefill_takes_what_is_left():
    scheduler, _ = build(budget=8)
    scheduler.add(make(1, 3, 10))
    step(scheduler)
    scheduler.add(make(2, 20, 4))
    chunks = step(scheduler)
    assert [(c.sequence.arrival, c.count, c.samples) for c in chunks] == [(1, 1, True), (2, 7, False)]


def test_a_newcomer_waits_for_no_more_than_its_own_prefill():
    """Its first token comes with the step that computes the last of its prompt, however many others decode."""
    scheduler, _ = build(num_blocks=400, slots=17, budget=64)
    for n in range(16):
        scheduler.add(make(n, 4, 200))
    for _ in range(4):
        step(scheduler)
    newcomer = make(99, 40, 4)
    scheduler.add(newcomer)
    step(scheduler)
    assert newcomer.num_output_tokens == 1


def test_slots_are_a_bound():
    scheduler, _ = build(slots=2)
    for n in range(5):
        scheduler.add(make(n, 2, 3))
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 3)


def test_the_youngest_is_preempted_and_comes_back_before_later_ones():
    scheduler, _ = build(num_blocks=5, size=2, slots=3)
    first, second, third = make(1, 2, 6), make(2, 2, 6), make(3, 2, 2)
    for sequence in (first, second, third):
        scheduler.add(sequence)
    while second.num_preemptions == 0:
        step(scheduler)
    assert first.num_preemptions == 0
    order: list[int] = []
    while scheduler.has_work:
        before = set(scheduler.sequences())
        step(scheduler)
        order.extend(sorted(s.arrival for s in before - set(scheduler.sequences())))
    assert order == sorted(order)


def test_a_long_prompt_at_the_head_is_not_passed_for_ever():
    scheduler, _ = build(num_blocks=8, size=2, slots=4)
    scheduler.add(make(1, 8, 4))
    step(scheduler)
    scheduler.add(make(2, 12, 2))
    scheduler.add(make(3, 2, 2))
    step(scheduler)
    assert [s.arrival for s in scheduler.sequences()] == [1, 2, 3]
    assert scheduler.num_running == 1, "nobody overtakes a prompt that waits for blocks"


def test_cached_prompt_tokens_are_counted_once():
    scheduler, _ = build(prefix_cache=True, budget=64)
    scheduler.add(make(7, 12, 1))
    step(scheduler)
    again = make(14, 12, 1)
    scheduler.add(again)
    step(scheduler)
    assert (again.num_cached_tokens, scheduler.num_cached_prompt_tokens) == (8, 8)


def test_the_budget_must_cover_the_slots():
    with pytest.raises(ValueError, match="one token for each slot"):
        build(slots=4, budget=3)


REQUESTS = st.lists(st.tuples(st.integers(1, 14), st.integers(1, 10), st.integers(0, 6)), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(
    requests=REQUESTS,
    num_blocks=st.integers(12, 30),
    slots=st.integers(1, 5),
    spare=st.integers(0, 12),
    prefix_cache=st.booleans(),
)
def test_whatever_comes_everybody_finishes_with_its_own_tokens(requests, num_blocks, slots, spare, prefix_cache):
    size = 2
    scheduler, blocks = build(num_blocks, size, slots=slots, budget=slots + spare, prefix_cache=prefix_cache)
    sequences: list[Sequence] = []
    pending = list(enumerate(requests))
    steps = 0
    while pending or scheduler.has_work:
        while pending and (pending[0][1][2] <= steps or not scheduler.has_work):
            arrival, (prompt, answer, _) = pending.pop(0)
            sequence = make(arrival, prompt, answer, context=num_blocks * size)
            sequences.append(sequence)
            scheduler.add(sequence)
        chunks = step(scheduler)
        assert sum(chunk.count for chunk in chunks) <= slots + spare
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
        assert chunks, "there was work but nothing was scheduled"
        steps += 1
        assert steps < 2000
    for sequence, (_, answer, _) in zip(sequences, requests, strict=True):
        assert sequence.num_output_tokens == answer
    assert sequences[0].num_preemptions == 0
    assert blocks.num_available == num_blocks
