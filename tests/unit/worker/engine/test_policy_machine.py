"""Scheduler and block manager together, in any order of adds, steps, ends, cancels and shortages of memory.

The machine's own books say what every block must contain, so a prefix hit on anything else is found at once. Besides:
what the dictionary of prefixes does when hashes collide, and that `check_integrity` sees each way of being broken.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.worker.engine.makers import sequence
from worker.engine.block_manager import BlockManager
from worker.engine.scheduler import Chunk, Scheduler
from worker.engine.sequence import Sequence

PICK = st.integers(0, 50)


class PolicyMachine(RuleBasedStateMachine):
    """A model that says 1 or 0; each sequence ends after max_tokens."""

    @initialize(
        num_blocks=st.integers(4, 20),
        size=st.integers(1, 4),
        slots=st.integers(1, 5),
        spare=st.integers(0, 9),
        prefix_cache=st.booleans(),
        contiguous=st.booleans(),
    )
    def start(self, num_blocks: int, size: int, slots: int, spare: int, prefix_cache: bool, contiguous: bool) -> None:
        self.blocks = BlockManager(num_blocks, size, prefix_cache=prefix_cache, contiguous=contiguous)
        self.scheduler = Scheduler(self.blocks, slots=slots, max_batch_tokens=slots + spare)
        self.slots, self.budget, self.context = slots, slots + spare, num_blocks * size
        self.live: list[Sequence] = []
        self.arrivals = 0
        self.contents: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}

    @rule(length=st.integers(1, 20), answer=st.integers(1, 12), resumed=st.integers(0, 5), kind=st.integers(0, 3))
    def add(self, length: int, answer: int, resumed: int, kind: int) -> None:
        prompt = [kind % 2] * min(length, self.context - 1)
        output = [1] * min(resumed, answer - 1, self.context - 1 - len(prompt))
        self.arrivals += 1
        made = sequence(
            prompt,
            output,
            name=str(self.arrivals),
            arrival=self.arrivals,
            salt=str(kind // 2),
            context_length=self.context,
            max_tokens=answer,
        )
        self.live.append(made)
        self.scheduler.add(made)

    @precondition(lambda self: self.live)
    @rule(token=st.integers(0, 1))
    def step(self, token: int) -> None:
        oldest = min(self.live, key=lambda s: s.arrival)
        before = oldest.num_preemptions
        decoding = [(s, s.num_preemptions) for s in self.scheduler.sequences() if s.blocks and s.num_pending == 1]
        chunks = self.scheduler.schedule()
        assert chunks, "there was work but nothing was scheduled"
        assert sum(chunk.count for chunk in chunks) <= self.budget
        assert len({chunk.sequence.sequence_id for chunk in chunks}) == len(chunks) <= self.slots
        stayed = [s for s, preemptions in decoding if s.num_preemptions == preemptions]
        assert [chunk.sequence for chunk in chunks[: len(stayed)]] == stayed, "decodes come first, all of them"
        assert oldest.num_preemptions == before, "the oldest always gets on"
        for chunk in chunks:
            self.compute(chunk, token)

    def compute(self, chunk: Chunk, token: int) -> None:
        """What the sequence will read must be what it would have written itself; then write the chunk's tokens."""
        made, size = chunk.sequence, self.blocks.block_tokens
        assert chunk.start == made.num_computed
        assert len(made.blocks) * size >= chunk.start + chunk.count
        for place in range(chunk.start):
            expected = (made.cache_salt, tuple(made.tokens[: place + 1]))
            assert self.contents[made.blocks[place // size], place % size] == expected, "somebody else's keys"
        for place in range(chunk.start, chunk.start + chunk.count):
            self.contents[made.blocks[place // size], place % size] = (made.cache_salt, tuple(made.tokens[: place + 1]))
        self.scheduler.computed(chunk)
        assert chunk.samples == (made.num_pending == 0)
        if chunk.samples:
            made.append(token)
            if made.finish_reason(frozenset()) is not None:
                self.scheduler.remove(made)
                self.live.remove(made)

    @precondition(lambda self: self.live)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        self.scheduler.remove(self.live.pop(pick % len(self.live)))

    @rule()
    def memory_is_short(self) -> None:
        running = self.scheduler.num_running
        assert self.scheduler.preempt_youngest() == (running > 1)

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "live"):
            self.scheduler.check_integrity()
            assert {s.sequence_id for s in self.scheduler.sequences()} == {s.sequence_id for s in self.live}
            assert self.scheduler.num_running <= self.slots
            assert self.scheduler.has_work == bool(self.live)

    def teardown(self) -> None:
        """Everybody finishes, and every block comes back."""
        if not hasattr(self, "live"):
            return
        for _ in range(2000):
            if not self.live:
                break
            self.step(1)
        assert not self.live, "somebody starves"
        self.scheduler.check_integrity()
        assert self.blocks.num_available == self.blocks.num_blocks


TestPolicyMachine = PolicyMachine.TestCase
TestPolicyMachine.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def fill(blocks: BlockManager, made: Sequence) -> Sequence:
    blocks.admit(made, blocks.match_prefix(made))
    made.num_computed = made.num_tokens
    blocks.publish(made)
    return made


def test_a_collision_of_hashes_is_not_a_hit() -> None:
    """Numbers that differ by 2**61 - 1 have one hash in CPython, and so have tuples of them."""
    blocks, twin = BlockManager(8, 2), 5 + 2**61 - 1
    assert hash(("", (5, 5))) == hash(("", (twin, twin)))
    fill(blocks, sequence([5, 5, 5, 5, 0]))
    assert blocks.match_prefix(sequence([twin, twin, 5, 5, 0])) == []
    assert len(blocks.match_prefix(sequence([5, 5, twin, twin, 0]))) == 1
    other = fill(blocks, sequence([twin, twin, 5, 5, 0]))
    assert other.num_cached_tokens == 0
    assert blocks.match_prefix(sequence([twin, twin, 5, 5, 0])) == other.blocks[:2]
    assert blocks.match_prefix(sequence([5, 5, 5, 5, 0])) != other.blocks[:2]


def test_a_salt_that_looks_like_a_serial_number_is_not_one() -> None:
    blocks = BlockManager(8, 2)
    fill(blocks, sequence([1, 1, 2, 2, 0]))
    for salt in ("0", "1", "2", "-1"):
        assert blocks.match_prefix(sequence([2, 2, 0], salt=salt)) == []


def test_a_hit_makes_a_block_recently_used() -> None:
    blocks = BlockManager(4, 2)
    old, new = fill(blocks, sequence([1, 1, 2, 2])), fill(blocks, sequence([3, 3, 4, 4]))
    blocks.release(old)
    blocks.release(new)
    again = fill(blocks, sequence([1, 1, 0]))  # a hit on the first block; the second gives way
    blocks.release(again)
    assert len(blocks.match_prefix(sequence([3, 3, 4, 4, 0]))) == 2
    blocks.admit(sequence([6] * 4), [])  # one block is free, the other is the least recently used
    assert len(blocks.match_prefix(sequence([3, 3, 4, 4, 0]))) == 1
    assert len(blocks.match_prefix(sequence([1, 1, 0]))) == 1


def test_two_that_compute_the_same_publish_it_once() -> None:
    blocks = BlockManager(8, 2)
    first, second = sequence([1, 1, 2, 2, 3], arrival=1), sequence([1, 1, 2, 2, 3], arrival=2)
    blocks.admit(first, [])
    blocks.admit(second, [])
    for made in (first, second):
        made.num_computed = 5
        blocks.publish(made)
    assert blocks.match_prefix(sequence([1, 1, 2, 2, 9])) == first.blocks[:2]
    blocks.release(second)
    assert blocks.num_available == 5
    blocks.check_integrity([first])


def test_forgetting_spares_what_others_hold() -> None:
    """The blocks that a spoiled sequence shares were good when they were published, and are being read."""
    blocks = BlockManager(8, 2)
    first = fill(blocks, sequence([1, 1, 2], arrival=1))
    spoiled = fill(blocks, sequence([1, 1, 3, 3, 4], arrival=2))
    shared = spoiled.blocks[0]
    assert shared == first.blocks[0]
    assert blocks.forget(spoiled) == spoiled.blocks[1:]
    blocks.release(spoiled)
    blocks.check_integrity([first])
    assert blocks.match_prefix(sequence([1, 1, 3, 3, 0])) == [shared]


def test_a_newcomer_leaves_a_block_for_each_that_runs() -> None:
    blocks = BlockManager(6, 2, prefix_cache=False)
    scheduler = Scheduler(blocks, slots=4, max_batch_tokens=64)
    first, second = (sequence([n] * 4, arrival=n, name=str(n), max_tokens=3) for n in (1, 2))
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule()
    assert scheduler.num_running == 2  # 4 blocks held
    scheduler.add(sequence([3], arrival=3, name="3"))
    scheduler.schedule()
    assert scheduler.num_running == 2, "2 blocks are left, and both belong to those that run"
    scheduler.remove(second)
    scheduler.schedule()
    assert scheduler.num_running == 2


def test_after_a_shortage_nobody_is_admitted_until_one_ends() -> None:
    blocks = BlockManager(32, 2)
    scheduler = Scheduler(blocks, slots=4, max_batch_tokens=64)
    made = [sequence([n] * 4, arrival=n, name=str(n)) for n in range(4)]
    for one in made:
        scheduler.add(one)
    assert len(scheduler.schedule()) == 4
    assert scheduler.preempt_youngest()
    assert {chunk.sequence.arrival for chunk in scheduler.schedule()} == {0, 1, 2}
    scheduler.remove(made[1])
    assert {chunk.sequence.arrival for chunk in scheduler.schedule()} == {0, 2, 3}


def test_a_preempted_sequence_waits_at_its_old_place() -> None:
    blocks = BlockManager(32, 2)
    scheduler = Scheduler(blocks, slots=2, max_batch_tokens=64)
    made = [sequence([n] * 4, arrival=n, name=str(n)) for n in range(4)]
    for one in made:
        scheduler.add(one)
    scheduler.schedule()
    scheduler.preempt(made[1])
    assert [s.arrival for s in scheduler.sequences()] == [0, 1, 2, 3]
    assert (made[1].num_computed, made[1].blocks, made[1].num_preemptions) == (0, [], 1)
    assert [chunk.sequence.arrival for chunk in scheduler.schedule()] == [0, 1]


def swap(queue: list[Sequence]) -> None:
    queue.reverse()


BREAKS: dict[str, Callable[[Scheduler, BlockManager], object]] = {
    "a held block is free too": lambda s, b: b._free.__setitem__(next(s.sequences()).blocks[0], 1),
    "a free block is lost": lambda s, b: b._free.__setitem__(b._free.rfind(1), 0),
    "the count of free blocks is wrong": lambda s, b: setattr(b, "_num_free", b._num_free - 1),
    "a holder too many": lambda s, b: b._holders.__setitem__(next(s.sequences()).blocks[0], 9),
    "a held block is cached too": lambda s, b: b._cached.__setitem__(next(s.sequences()).blocks[0], None),
    "a cached block is gone": lambda s, b: b._cached.popitem(),
    "a cached block isn't published": lambda s, b: b._unpublish(next(iter(b._cached))),
    "a prefix leads to another block": lambda s, b: b._found.update(dict.fromkeys(b._found, 0)),
    "a prefix of no block": lambda s, b: b._found.__setitem__(("x", (1, 2)), 3),
    "a block is offered but held": lambda s, b: b._unreserved.__setitem__(next(s.sequences()).blocks[0], 1),
    "a sequence holds a block twice": lambda s, b: next(s.sequences()).blocks.append(next(s.sequences()).blocks[0]),
    "a sequence lost a block": lambda s, b: next(s.sequences()).blocks.pop(),
    "a sequence is forgotten": lambda s, b: s._running.pop(),
    "one that waits has computed something": lambda s, b: setattr(s._waiting[0], "num_computed", 1),
    "more computed than blocks hold": lambda s, b: setattr(s._running[0], "num_computed", 99),
    "those that run are out of order": lambda s, b: swap(s._running),
    "those that wait are out of order": lambda s, b: swap(s._waiting),
}


@pytest.mark.parametrize("way", BREAKS)
def test_integrity_sees_every_way_of_being_broken(way: str) -> None:
    blocks = BlockManager(16, 2)
    scheduler = Scheduler(blocks, slots=2, max_batch_tokens=64)
    gone = fill(blocks, sequence([8, 8, 9, 9, 9]))
    blocks.release(gone)
    for n in range(4):
        scheduler.add(sequence([n] * 5, arrival=n, name=str(n)))
    for chunk in scheduler.schedule():
        scheduler.computed(chunk)
    scheduler.check_integrity()
    BREAKS[way](scheduler, blocks)
    with pytest.raises(RuntimeError):
        scheduler.check_integrity()
