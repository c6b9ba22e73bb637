"""Which tokens the next forward pass computes. Pure policy: no torch, no clock, no I/O.

Read `schedule` first: decodes, then prompts that are half done, then newcomers, all within one budget of tokens.

Fairness: the order is that of arrival. Whoever came last is preempted first and waits at its old place, so the oldest
sequence always gets on and nothing starves.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from worker.engine.block_manager import BlockManager
from worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + count) of a sequence; `samples` if its next token can be drawn afterwards."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


class Scheduler:
    """Keeps the waiting and the running sequences; at most `slots` run."""

    def __init__(self, blocks: BlockManager, *, slots: int, max_batch_tokens: int) -> None:
        if max_batch_tokens < slots:
            raise ValueError("the token budget of a step must cover one token for each slot")
        self._blocks = blocks
        self._slots = slots
        self._most_running = slots  # fewer while memory for a step is short
        self._max_batch_tokens = max_batch_tokens
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_cached_prompt_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks yet, or lost them."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether `schedule` has anything to give."""
        return bool(self._waiting or self._running)

    def sequences(self) -> Iterator[Sequence]:
        """Everything that hasn't finished, running first."""
        yield from self._running
        yield from self._waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those that came before it."""
        insort(self._waiting, sequence, key=_by_arrival)

    def remove(self, sequence: Sequence) -> None:
        """Let go of a sequence and its blocks. Never called while a step that reads them is in flight."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._blocks.release(sequence)
        self._most_running = self._slots

    def schedule(self) -> list[Chunk]:
        """The next step: decode rows first, then prefill chunks. Empty only when there is no work."""
        budget = self._max_batch_tokens
        chunks: list[Chunk] = []
        for sequence in list(self._running):
            if sequence.num_pending == 1 and self._make_room(sequence):
                chunks.append(Chunk(sequence, sequence.num_computed, 1, True))
        budget -= len(chunks)
        for sequence in self._running:
            if budget > 0 and sequence.num_pending > 1:
                budget -= self._prefill(sequence, budget, chunks)
        while budget > 0 and self._waiting and len(self._running) < self._most_running:
            sequence = self._waiting[0]
            hits = self._blocks.match_prefix(sequence)
            if not self._blocks.can_admit(sequence, hits, self._watermark()):
                break
            self._admit(sequence, hits)
            budget -= self._prefill(sequence, budget, chunks)
        return chunks

    def computed(self, chunk: Chunk) -> None:
        """The forward pass of a chunk has completed: its keys and values are in the cache."""
        chunk.sequence.num_computed = chunk.start + chunk.count
        self._blocks.publish(chunk.sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it waits at its old place and is recomputed later."""
        self._running.remove(sequence)
        self._blocks.release(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.add(sequence)

    def preempt_youngest(self) -> bool:
        """Preempt the last comer of several and admit nobody until one ends; False when fewer than two run."""
        if len(self._running) < 2:
            return False
        self.preempt(self._running[-1])
        self._most_running = len(self._running)
        return True

    def check_integrity(self) -> None:
        """Raise RuntimeError where blocks, waiting and running sequences contradict each other."""
        self._blocks.check_integrity(self.sequences())
        for sequence in self._waiting:
            if sequence.blocks or sequence.num_computed:
                raise RuntimeError(f"sequence {sequence.sequence_id} waits but holds blocks")
        for sequence in self._running:
            if len(sequence.blocks) * self._blocks.block_tokens < sequence.num_computed:
                raise RuntimeError(f"sequence {sequence.sequence_id} has more tokens than its blocks hold")
        for queue in (self._waiting, self._running):
            if queue != sorted(queue, key=_by_arrival):
                raise RuntimeError("sequences are out of order")

    def _make_room(self, sequence: Sequence) -> bool:
        """Grow a decoding sequence by its next token, preempting later comers; False if it gave way itself."""
        if not sequence.blocks:
            return False  # preempted for an older one in this very step
        while not self._blocks.can_append(sequence):
            victim = self._running[-1]
            self.preempt(victim)
            if victim is sequence:
                return False
        self._blocks.append(sequence)
        return True

    def _prefill(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        count = min(sequence.num_pending, budget)
        chunks.append(Chunk(sequence, sequence.num_computed, count, count == sequence.num_pending))
        return count

    def _admit(self, sequence: Sequence, hits: list[int]) -> None:
        del self._waiting[0]
        self._blocks.admit(sequence, hits)
        insort(self._running, sequence, key=_by_arrival)
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_cached_tokens = sequence.num_computed
            self.num_cached_prompt_tokens += sequence.num_computed

    def _watermark(self) -> int:
        """Blocks kept for those that already run, so that a newcomer isn't admitted only to be preempted at once."""
        return len(self._running)


def _by_arrival(sequence: Sequence) -> int:
    return sequence.arrival
