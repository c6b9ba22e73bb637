"""The sampler as one would write it down: one sequence at a time, double precision, lists and loops."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tests.unit.worker.engine.makers import plain_gumbel
from worker.engine.sequence import Sequence

CLOSE = 1e-5
"""Two numbers that differ by less, but differ, may come out in another order in single precision."""


@dataclass
class Choice:
    """`doubtful`: some comparison was too close to be the same in single precision."""

    token: int
    survivors: set[int]
    doubtful: bool


def adjust(logits: list[float], sequence: Sequence, eos: frozenset[int]) -> list[float]:
    """Logit bias, min_tokens and penalties."""
    spec = sequence.sampling
    prompt, output = sequence.tokens[: sequence.num_prompt_tokens], sequence.tokens[sequence.num_prompt_tokens :]
    out = list(logits)
    for token, bias in spec.logit_bias.items():
        out[token] += bias
    if len(output) < spec.min_tokens:
        for token in eos | set(spec.stop_token_ids):
            out[token] = -math.inf
    for token in set(prompt) | set(output):
        out[token] = out[token] / spec.repetition_penalty if out[token] > 0 else out[token] * spec.repetition_penalty
    for token in set(output):
        out[token] -= spec.presence_penalty + spec.frequency_penalty * output.count(token)
    return out


def choose(logits: list[float], sequence: Sequence, eos: frozenset[int]) -> Choice:
    """The next token, and which tokens could have been drawn."""
    spec = sequence.sampling
    values = adjust(logits, sequence, eos)
    if spec.temperature < 1e-5:
        best = max(values)
        return Choice(values.index(best), {values.index(best)}, _close(values, best))
    values = [value / spec.temperature for value in values]
    alive, doubtful = _survivors(values, spec.top_k, spec.top_p, spec.min_p)
    position = sequence.num_tokens
    scores = {token: values[token] + plain_gumbel(spec.seed, position, token) for token in alive}
    token = max(scores, key=lambda token: (scores[token], -token))
    return Choice(token, alive, doubtful or _close(list(scores.values()), scores[token]))


def _survivors(values: list[float], top_k: int, top_p: float, min_p: float) -> tuple[set[int], bool]:
    best, floor, doubtful = max(values), -math.inf, False
    order = sorted(values, reverse=True)
    if 0 < top_k < len(values):
        floor = order[top_k - 1]
        doubtful |= _close(values, floor)
    if top_p < 1.0:
        kept = [value for value in order if value >= floor]
        weights = [math.exp(value - best) for value in kept]
        wanted, total = top_p * math.fsum(weights), 0.0
        for value, weight in zip(kept, weights, strict=True):
            total += weight
            doubtful |= abs(total - wanted) < 1e-5 * wanted
            if total >= wanted:
                floor = max(floor, value)
                doubtful |= _close(values, floor)
                break
    if min_p > 0.0:
        floor = max(floor, best + math.log(min_p))
        doubtful |= min_p < 1.0 and any(abs(value - floor) < CLOSE for value in values if value < best)
    return {token for token, value in enumerate(values) if value >= floor}, doubtful


def _close(values: list[float], to: float) -> bool:
    return any(0 < abs(value - to) < CLOSE * max(1.0, abs(to)) for value in values)


def logprobs(logits: list[float]) -> list[float]:
    """Log-softmax."""
    best = max(logits)
    total = math.fsum(math.exp(value - best) for value in logits)
    return [value - best - math.log(total) for value in logits]
