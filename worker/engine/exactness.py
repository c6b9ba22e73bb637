"""Measures, on this machine and with this model, whether a sequence's numbers depend on anything but itself.

The label `exact` is only given out when this says so. Read `forward_is_exact` first; `forward_is_finite` is the smaller
question before it, whether there are numbers at all.
"""

from __future__ import annotations

import random

import torch

from worker.engine.kv_cache import KVCache
from worker.engine.model_runner import ModelRunner
from worker.engine.protocol import AddSequence, SamplingSpec
from worker.engine.scheduler import Chunk
from worker.engine.sequence import Sequence

_LENGTHS = (75, 40, 9, 23)
_SHORTEST = 8


def forward_is_exact(
    runner: ModelRunner, cache: KVCache, vocab_size: int, context_length: int, thread_numbers: tuple[int, ...] = ()
) -> bool:
    """True if last-token logits agree bit by bit: alone in one piece, in chunks, token by token, and in company.

    With `thread_numbers`, also between these numbers of threads; afterwards the number is what it was. Uses the first
    and last blocks of the (still empty) cache and leaves harmless numbers in them.
    """
    draw = random.Random(0)
    lengths = [length for length in _LENGTHS if length < context_length]
    lengths.sort(reverse=True)  # the first is taken apart
    per_sequence = -(-max(lengths, default=1) // cache.block_tokens)
    if not lengths or per_sequence * len(lengths) > cache.num_blocks:
        lengths, per_sequence = [min(20, context_length - 1)], -(-20 // cache.block_tokens)
        if per_sequence > cache.num_blocks or lengths[0] < _SHORTEST:
            return False  # too little room to try anything
    sequences = [
        _sequence([draw.randrange(vocab_size) for _ in range(length)], range(i * per_sequence, (i + 1) * per_sequence))
        for i, length in enumerate(lengths)
    ]
    before = torch.get_num_threads()
    expected: list[torch.Tensor] | None = None
    try:
        for number in thread_numbers or (before,):
            torch.set_num_threads(number)
            alone = [_logits(runner, (s, 0, s.num_tokens))[0] for s in sequences]
            expected = expected or alone
            if not all(map(torch.equal, alone, expected)) or not _on_every_way(runner, sequences, expected):
                return False
    finally:
        torch.set_num_threads(before)
    return True


def forward_is_finite(runner: ModelRunner, cache: KVCache, vocab_size: int, context_length: int) -> bool:
    """Whether all numbers of a short sequence are finite. Uses the first blocks of the (still empty) cache."""
    draw = random.Random(0)
    length = max(1, min(_LENGTHS[-1], context_length - 1))
    blocks = range(-(-length // cache.block_tokens))
    sequence = _sequence([draw.randrange(vocab_size) for _ in range(length)], blocks)
    _, bad = runner.forward([Chunk(sequence, 0, length, True)])
    return not bad


def _on_every_way(runner: ModelRunner, sequences: list[Sequence], expected: list[torch.Tensor]) -> bool:
    """Whether each sequence's logits are the `expected` ones in company, in chunks and token by token."""
    together = _logits(runner, *((s, 0, s.num_tokens) for s in sequences))
    if not all(map(torch.equal, together, expected)):
        return False
    first = sequences[0]
    half, last = first.num_tokens // 2, first.num_tokens - 1
    _logits(runner, (first, 0, half))
    _logits(runner, (first, half, last - 3 - half))
    for position in range(last - 3, last):
        _logits(runner, (first, position, 1), *((s, 0, s.num_tokens) for s in sequences[1:]))
    if not torch.equal(_logits(runner, (first, last, 1))[0], expected[0]):
        return False
    rest = _logits(runner, *((s, s.num_tokens - 1, 1) for s in sequences))
    return all(map(torch.equal, rest, expected))


def _sequence(tokens: list[int], blocks: range) -> Sequence:
    request = AddSequence(sequence_id="probe", prompt_token_ids=tokens, sampling=SamplingSpec(max_tokens=1))
    sequence = Sequence(request, arrival=0, context_length=len(tokens) + 1)
    sequence.blocks = list(blocks)
    return sequence


def _logits(runner: ModelRunner, *parts: tuple[Sequence, int, int]) -> list[torch.Tensor]:
    """Logits behind each part (sequence, first token, tokens), all of them in one pass."""
    logits, _ = runner.forward([Chunk(sequence, start, count, True) for sequence, start, count in parts])
    return list(logits[: len(parts)].clone())
