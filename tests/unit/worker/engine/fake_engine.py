"""An engine loop over a model made of arithmetic: real scheduler, blocks, sampler and cache, faults on demand.

The imagined model keeps each token's id in the KV cache, as a real one keeps keys and values, and its logits are a
hash of what it reads back through the sequence's blocks. So a block that is shared wrongly, freed early or overwritten
changes tokens, exactly as it would with a real model, only certainly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.unit.worker.engine.makers import plain_mix64
from worker.engine.block_manager import BlockManager
from worker.engine.kv_cache import KVCache, KVShape
from worker.engine.loop import EngineLoop
from worker.engine.protocol import (
    AddSequence,
    CancelSequence,
    FromEngine,
    SequenceEnd,
    Shutdown,
    StepOutput,
    ToEngine,
    TokenOut,
)
from worker.engine.sampler import Sampled, Sampler
from worker.engine.scheduler import Chunk, Scheduler
from worker.engine.sequence import Sequence

VOCAB = 29
EOS = 0


class Runner:
    """Stands where ModelRunner does. `before` may raise; `spoils` says whose numbers are not finite."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.before: Callable[[list[Chunk]], None] = lambda chunks: None
        self.spoils: Callable[[Sequence], bool] = lambda sequence: False
        self.computed = 0

    def forward(self, chunks: list[Chunk]) -> tuple[torch.Tensor, list[int]]:
        self.before(chunks)
        rows: list[torch.Tensor] = []
        bad: list[int] = []
        for index, chunk in enumerate(chunks):
            self._write(chunk)
            self.computed += chunk.count
            if self.spoils(chunk.sequence):
                bad.append(index)
            if chunk.samples:
                rows.append(self._logits(chunk))
        padding = [torch.zeros(VOCAB)] * max(1, -len(rows) % 8)
        return torch.stack(rows + padding), bad

    def _write(self, chunk: Chunk) -> None:
        ids = chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
        places = self._cache.rows(chunk.sequence.blocks, chunk.start, chunk.count)
        stored = torch.tensor(ids, dtype=torch.float32).add(1).view(1, 1, -1, 1)  # 0 is what nobody wrote
        if self.spoils(chunk.sequence):
            stored = stored * torch.nan
        self._cache.write(0, torch.tensor(places), stored, stored)

    def _logits(self, chunk: Chunk) -> torch.Tensor:
        places = self._cache.rows(chunk.sequence.blocks, 0, chunk.start + chunk.count)
        digest = 0
        for number in self._cache.pool[0, 0, places, 0, 0].tolist():
            digest = plain_mix64(digest, -1 if number != number else int(number))
        return torch.tensor([(digest >> shift) % 1000 / 250 for shift in range(VOCAB)])


class FaultySampler(Sampler):
    """The real one, but `before` may raise."""

    def __init__(self) -> None:
        super().__init__(frozenset({EOS}))
        self.before: Callable[[list[Sequence]], None] = lambda sequences: None

    def sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> list[Sampled]:
        self.before(sequences)
        return super().sample(logits, sequences)


class FakeEngine:
    """The loop and everything below it; also the channel: `inbox` is read next, `tokens` and `ends` is what it said."""

    def __init__(
        self, *, num_blocks: int = 64, block_tokens: int = 4, slots: int = 8, budget: int = 32, contiguous: bool = False
    ) -> None:
        self.blocks = BlockManager(num_blocks, block_tokens, contiguous=contiguous)
        self.scheduler = Scheduler(self.blocks, slots=slots, max_batch_tokens=budget)
        shape = KVShape(layers=1, kv_heads=1, head_dim=1, dtype=torch.float32)
        self.cache = KVCache(shape, num_blocks=num_blocks, block_tokens=block_tokens, device=torch.device("cpu"))
        self.runner = Runner(self.cache)
        self.sampler = FaultySampler()
        self.inbox: list[ToEngine] = []
        self.tokens: dict[str, list[TokenOut]] = {}
        self.ends: dict[str, SequenceEnd] = {}
        self.loop = EngineLoop(
            self,
            self.scheduler,
            self.blocks,
            self.runner,
            self.sampler,
            self.cache,
            vocab_size=VOCAB,
            context_length=num_blocks * block_tokens,
            eos_token_ids=frozenset({EOS}),
        )

    def receive(self, *, wait: bool) -> list[ToEngine]:
        messages, self.inbox = self.inbox, []
        return messages or ([Shutdown()] if wait else [])

    def send(self, message: FromEngine) -> None:
        """Collects, and checks what every reader relies on: indices without a gap, one end, nothing after it."""
        assert isinstance(message, StepOutput)
        for token in message.tokens:
            assert token.sequence_id not in self.ends, "a token after the end"
            line = self.tokens.setdefault(token.sequence_id, [])
            assert not line or token.index == line[-1].index + 1, "a gap or a repeat"
            line.append(token)
        for end in message.ended:
            assert end.sequence_id not in self.ends, "two ends"
            self.ends[end.sequence_id] = end

    def step(self) -> bool:
        going = self.loop.step()
        self.scheduler.check_integrity()
        return going

    def run(self, *requests: AddSequence, most_steps: int = 2000) -> dict[str, list[int]]:
        """Everything to its end, within a bound of steps; token ids by sequence id."""
        self.inbox.extend(requests)
        for _ in range(most_steps):
            if not self.step():
                return {name: self.ids(name) for name in self.ends}
        raise AssertionError(f"not done after {most_steps} steps")

    def ids(self, name: str) -> list[int]:
        return [token.token_id for token in self.tokens.get(name, [])]

    def cancel(self, name: str) -> None:
        self.inbox.append(CancelSequence(sequence_id=name))


def alone(asked: AddSequence) -> list[int]:
    """What a request gets from an engine that has nothing else to do and nothing in its way."""
    return FakeEngine(num_blocks=256, budget=4096).run(asked)[asked.sequence_id]
