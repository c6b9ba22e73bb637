"""One generation as the engine sees it: its tokens, how many have keys and values, and the blocks that hold those.

No torch, no clock. Read `Sequence` first; `finish_reason` says when a sequence is over.

    tokens:        prompt ............ | output ......... (next)
    num_computed:  ├──── in the KV cache ────┤
    pending:                                 ├── to be computed before the next token can be sampled ──┤
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from worker.engine.protocol import AddSequence, SamplingSpec

FinishReason: TypeAlias = Literal["EOS", "STOP_TOKEN", "MAX_TOKENS"]


class Sequence:
    """The state of one generation. Owned by the scheduler; the block manager writes `blocks` and the chain fields."""

    __slots__ = (
        "arrival",
        "blocks",
        "cache_salt",
        "chain",
        "decode_us",
        "max_length",
        "num_cached_tokens",
        "num_computed",
        "num_preemptions",
        "num_prompt_tokens",
        "num_published",
        "output_counts",
        "prefill_us",
        "reserved",
        "sampling",
        "sequence_id",
        "tokens",
        "was_admitted",
    )

    def __init__(self, request: AddSequence, *, arrival: int, context_length: int) -> None:
        self.sequence_id = request.sequence_id
        self.sampling: SamplingSpec = request.sampling
        self.cache_salt = request.cache_salt
        self.tokens: list[int] = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_length = min(self.num_prompt_tokens + request.sampling.max_tokens, context_length)
        """Most tokens that prompt and output may have together."""
        self.arrival = arrival
        """Order in which sequences came; decides who is served first and who is preempted last."""
        self.num_computed = 0
        self.num_cached_tokens = 0
        """Tokens taken from the prefix cache when it was first admitted."""
        self.num_preemptions = 0
        self.was_admitted = False
        self.prefill_us = 0
        self.decode_us = 0
        self.output_counts: dict[int, int] | None = None
        """How often each output token occurred; kept only for sequences with penalties (see `count_outputs`)."""
        self.blocks: list[int] = []
        self.num_published = 0
        self.chain: int | str = ""
        """Prefix-cache identity of the last published block (see block_manager)."""
        self.reserved: tuple[int, int] | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens so far, resumed ones included."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    def append(self, token_id: int) -> None:
        """Take a sampled token as the sequence's next."""
        self.tokens.append(token_id)
        if self.output_counts is not None:
            self.output_counts[token_id] = self.output_counts.get(token_id, 0) + 1

    def count_outputs(self) -> dict[int, int]:
        """Occurrences of each output token; counted once, then kept up to date by `append`."""
        if self.output_counts is None:
            counts: dict[int, int] = {}
            for token_id in self.tokens[self.num_prompt_tokens :]:
                counts[token_id] = counts.get(token_id, 0) + 1
            self.output_counts = counts
        return self.output_counts

    def finish_reason(self, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Why the sequence is over after its last token, None while it goes on."""
        if self.num_output_tokens > 0 and self.num_output_tokens >= self.sampling.min_tokens:
            last = self.tokens[-1]
            if not self.sampling.ignore_eos and last in eos_token_ids:
                return "EOS"
            if last in self.sampling.stop_token_ids:
                return "STOP_TOKEN"
        if self.num_tokens >= self.max_length:
            return "MAX_TOKENS"
        return None
