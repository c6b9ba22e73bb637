"""From logits to tokens, all sequences of a step at once.

Read `Sampler.sample` first. The order is fixed: logit bias → min_tokens → repetition, presence and frequency penalty
→ (greedy: the largest, the lowest id on ties) → temperature → top-k → top-p → min-p → Gumbel-max over the survivors.

- The repetition penalty sees prompt and output, presence and frequency see the output alone.
- Survivors are decided by value, so equal logits survive together.
- Log-probabilities are those of the model: log-softmax of its logits before anything of the above.
- What a row gets depends on that row alone: sums run in float64 along one row, over at least eight rows.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from worker.engine.philox import MAX_GUMBEL, gumbel, mix64, signed64
from worker.engine.protocol import SamplingSpec
from worker.engine.sequence import Sequence

COLDEST = 1e-5
"""Temperatures below this are greedy: dividing by them would leave the range of float32."""
_LIKELY = 8.0
"""Candidates this close (in nats) to the best get their noise first; most others can't win any more after that."""
_SORTED_FIRST = 256
"""Top-p sorts this many candidates, and the whole vocabulary only where they don't reach top-p."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A sequence's next token, with what was asked about it."""

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


class Sampler:
    """Holds what never changes: the EOS ids, which min_tokens masks."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids

    def sample(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> list[Sampled]:
        """Draw a token for each of `sequences` from the rows of `logits` [rows >= len(sequences), vocabulary].

        Rows beyond the sequences are padding. Raises nothing: parameters were validated when the sequences came.
        """
        specs = [sequence.sampling for sequence in sequences]
        if logits.device.type == "mps":
            logits = logits.cpu()  # Metal has no float64, in which the sums and the noise are computed
        logits = logits.float()
        raw = logits
        logits = self._adjust(logits, sequences)
        tokens = logits[: len(specs)].argmax(dim=-1).tolist()
        drawn = [row for row, spec in enumerate(specs) if spec.temperature >= COLDEST]
        if drawn:
            picked = _draw(logits, drawn, sequences)
            for row, token in zip(drawn, picked, strict=True):
                tokens[row] = token
        if all(spec.logprobs is None for spec in specs):
            return [Sampled(token) for token in tokens]
        return _with_logprobs(raw, tokens, specs)

    def _adjust(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
        """Logit bias, min_tokens and penalties, on a copy if there are any."""
        biased = [row for row, s in enumerate(sequences) if s.sampling.logit_bias]
        muted = [row for row, s in enumerate(sequences) if s.num_output_tokens < s.sampling.min_tokens]
        penalised = [row for row, s in enumerate(sequences) if has_penalties(s.sampling)]
        if not (biased or muted or penalised):
            return logits
        logits = logits.clone()
        for row in biased:
            bias = sequences[row].sampling.logit_bias
            ids = torch.tensor(list(bias), device=logits.device)
            logits[row, ids] += torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
        for row in muted:
            ids = self._eos_token_ids.union(sequences[row].sampling.stop_token_ids)
            logits[row, torch.tensor(sorted(ids), dtype=torch.int64, device=logits.device)] = -torch.inf
        for row in penalised:
            _penalise(logits[row], sequences[row])
        return logits


def has_penalties(spec: SamplingSpec) -> bool:
    """Whether any penalty is switched on."""
    return spec.repetition_penalty != 1.0 or spec.presence_penalty != 0.0 or spec.frequency_penalty != 0.0


def _penalise(row: torch.Tensor, sequence: Sequence) -> None:
    spec = sequence.sampling
    counts = sequence.count_outputs()
    if spec.repetition_penalty != 1.0:
        seen = torch.tensor(list({*sequence.tokens[: sequence.num_prompt_tokens], *counts}), device=row.device)
        values = row[seen]
        penalty = spec.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if counts and (spec.presence_penalty != 0.0 or spec.frequency_penalty != 0.0):
        ids = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[ids] -= spec.presence_penalty + spec.frequency_penalty * times


def _draw(logits: torch.Tensor, drawn: list[int], sequences: Rows[Sequence]) -> list[int]:
    """Gumbel-max for the rows `drawn`: the token with the largest logit / temperature + noise among the survivors."""
    device = logits.device
    specs = [sequences[row].sampling for row in drawn]
    # At least eight rows, so that no sum over a single row is split between threads.
    index = drawn + [drawn[0]] * max(0, 8 - len(drawn))
    scaled = logits[torch.tensor(index, device=device)]
    temperatures = [specs[min(i, len(specs) - 1)].temperature if i < len(specs) else 1.0 for i in range(len(index))]
    scaled = scaled / torch.tensor(temperatures, dtype=torch.float32, device=device).unsqueeze(1)
    best = scaled.max(dim=-1, keepdim=True).values
    floor = _floors(scaled, best, specs)
    keys = [signed64(mix64(sequences[row].sampling.seed, sequences[row].num_tokens)) for row in drawn]
    keys_of = torch.tensor(keys, device=device)
    scaled, best, floor = scaled[: len(drawn)], best[: len(drawn)], floor[: len(drawn)]
    scores = torch.full_like(scaled, -torch.inf, dtype=torch.float64)
    likely = scaled >= torch.maximum(floor, best - _LIKELY)
    _score(scores, scaled, likely, keys_of)
    reachable = (scores.max(dim=-1, keepdim=True).values - MAX_GUMBEL).float()
    reachable = reachable.nextafter(torch.full_like(reachable, -torch.inf))
    _score(scores, scaled, (scaled >= torch.maximum(floor, reachable)) & ~likely, keys_of)
    return scores.argmax(dim=-1).tolist()


def _score(scores: torch.Tensor, scaled: torch.Tensor, where: torch.Tensor, keys: torch.Tensor) -> None:
    rows, ids = where.nonzero(as_tuple=True)
    if rows.numel():
        scores[rows, ids] = scaled[rows, ids].double() + gumbel(ids, keys[rows]).double()


def _floors(scaled: torch.Tensor, best: torch.Tensor, specs: list[SamplingSpec]) -> torch.Tensor:
    """[rows, 1]: the value below which a token is cut off by top-k, top-p or min-p."""
    floor = torch.full_like(best, -torch.inf)
    vocabulary = scaled.shape[-1]
    top_k = [row for row, spec in enumerate(specs) if 0 < spec.top_k < vocabulary]
    if top_k:
        ranks = torch.tensor([specs[row].top_k - 1 for row in top_k], device=scaled.device).unsqueeze(1)
        values = scaled[top_k].topk(int(ranks.max()) + 1, dim=-1).values
        floor[top_k] = values.gather(1, ranks)
    top_p = [row for row, spec in enumerate(specs) if spec.top_p < 1.0]
    if top_p:
        _raise_to_top_p(scaled, best, floor, top_p, specs)
    min_p = [row for row, spec in enumerate(specs) if spec.min_p > 0.0]
    if min_p:
        logs = torch.tensor([specs[row].min_p for row in min_p], dtype=torch.float64, device=scaled.device).log()
        floor[min_p] = torch.maximum(floor[min_p], (best[min_p].double() + logs.unsqueeze(1)).float())
    return floor


def _raise_to_top_p(
    scaled: torch.Tensor, best: torch.Tensor, floor: torch.Tensor, rows: list[int], specs: list[SamplingSpec]
) -> None:
    """Raise the floor of `rows` to the value at which the largest probabilities (after top-k) first sum to top_p."""
    wanted = torch.tensor([specs[row].top_p for row in rows], dtype=torch.float64, device=scaled.device).unsqueeze(1)
    padded = rows + [rows[0]] * max(0, 8 - len(rows))
    weights = (scaled[padded] - best[padded]).double().exp()
    weights = torch.where(scaled[padded] >= floor[padded], weights, 0.0)
    wanted = wanted * weights.sum(dim=-1, keepdim=True)[: len(rows)]
    vocabulary = scaled.shape[-1]
    remaining = list(range(len(rows)))
    for width in (min(_SORTED_FIRST, vocabulary), vocabulary):
        chosen = [rows[i] for i in remaining]
        values = scaled[chosen].topk(width, dim=-1).values
        inside = torch.where(values >= floor[chosen], (values - best[chosen]).double().exp(), 0.0)
        reached = inside.cumsum(dim=-1) >= wanted[remaining]
        found = reached.any(dim=-1).tolist()
        cut = values.gather(1, reached.int().argmax(dim=-1, keepdim=True))
        done = [i for i, ok in enumerate(found) if ok]
        if done:
            where = [chosen[i] for i in done]
            floor[where] = torch.maximum(floor[where], cut[done])
        # Where even the whole vocabulary falls short of top_p by rounding, nothing is cut.
        remaining = [remaining[i] for i, ok in enumerate(found) if not ok]
        if not remaining:
            return


def _with_logprobs(raw: torch.Tensor, tokens: list[int], specs: list[SamplingSpec]) -> list[Sampled]:
    logprobs = raw.log_softmax(dim=-1)[: len(tokens)]
    chosen = logprobs.gather(1, torch.tensor(tokens, device=raw.device).unsqueeze(1)).squeeze(1).tolist()
    tops = _top(logprobs, [min(spec.logprobs or 0, raw.shape[-1]) for spec in specs])
    return [
        Sampled(token) if spec.logprobs is None else Sampled(token, logprob, top)
        for token, logprob, top, spec in zip(tokens, chosen, tops, specs, strict=True)
    ]


def _top(logprobs: torch.Tensor, counts: list[int]) -> list[list[tuple[int, float]]]:
    """As many of each row's likeliest tokens as `counts` says, best first, the lower id first on ties.

    Chosen by value: which of several equal values topk picks depends on how many are asked for in the whole batch.
    """
    tops: list[list[tuple[int, float]]] = [[] for _ in counts]
    if not any(counts):
        return tops
    last = torch.tensor([max(count - 1, 0) for count in counts], device=logprobs.device).unsqueeze(1)
    lowest = logprobs.topk(max(counts), dim=-1).values.gather(1, last)
    rows, ids = (logprobs >= lowest).nonzero(as_tuple=True)
    for row, token, value in zip(rows.tolist(), ids.tolist(), logprobs[rows, ids].tolist(), strict=True):
        tops[row].append((token, value))
    return [sorted(top, key=lambda item: (-item[1], item[0]))[:count] for top, count in zip(tops, counts, strict=True)]
