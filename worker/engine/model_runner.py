"""Runs a step through the model: packs the chunks, calls the model once, hands back the logits that were asked for.

Read `ModelRunner.forward` first. The model is transformers' own; only its attention is replaced, by a function that
is registered under a name of ours and that gets the step's plan passed through the model as a keyword.
"""

from __future__ import annotations

import math
import time
from typing import Any, cast

import torch
from transformers import AttentionInterface, PreTrainedModel

from worker.engine.attention import Attention
from worker.engine.cpu_layers import RowPadding
from worker.engine.kv_cache import KVCache
from worker.engine.lean_decoder import LeanDecoder
from worker.engine.packed_batch import PackedBatch, pack
from worker.engine.scheduler import Chunk
from worker.engine.thread_choice import ThreadChoice

ATTENTION_NAME = "llorch_packed"
"""Neither "flash" nor a `paged|` prefix may stand in it: transformers looks for both inside the name."""


def register_attention() -> None:
    """Tell transformers about the packed attention; before the model is built.

    Under a name that has no mask function the models build no masks; the packed attention makes its own.
    """
    AttentionInterface.register(ATTENTION_NAME, _attend)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, rows, size], key and value [1, kv heads, rows, size] → [1, rows, heads, size]."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            # The trial forward at start comes here first: the model is refused for good, with this as the reason.
            raise ValueError(f"the model's attention has `{name}`, which no kernel here takes into account")
    attention: Attention = kwargs["packed_attention"]
    layer = cast("int", module.layer_idx)
    return attention.attend(kwargs["packed_plan"], layer, query, key, value, scaling, sliding_window), None


class ModelRunner:
    """A model, its cache and its attention. Not thread-safe."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVCache,
        attention: Attention,
        padding: RowPadding,
        lean: LeanDecoder | None = None,
    ) -> None:
        self._base = cast("torch.nn.Module", model.get_decoder())
        self._lean = lean
        self._head = cast("torch.nn.Module", model.get_output_embeddings())
        self._cache = cache
        self._attention = attention
        self._padding = padding
        self._device = cache.pool.device
        self.threads: ThreadChoice | None = None
        """Chooses each step's number of CPU threads; None leaves it as it is."""

    def forward(self, chunks: list[Chunk]) -> tuple[torch.Tensor, list[int]]:
        """Compute the chunks' keys and values, and logits for those that sample.

        Returns logits [rows, vocabulary], one row for each sampling chunk in order and padding behind them, and the
        indices of the chunks whose numbers are not finite: nothing of theirs can be trusted.
        """
        batch = pack(chunks, self._attention.rank, self._padding.missing)
        if self.threads is None:
            return self._compute(batch)
        number = self.threads.pick(batch.num_rows)
        if number != torch.get_num_threads():
            torch.set_num_threads(number)
        started = time.perf_counter()
        result = self._compute(batch)
        self.threads.took(batch.num_rows, number, time.perf_counter() - started)
        return result

    def _compute(self, batch: PackedBatch) -> tuple[torch.Tensor, list[int]]:
        with torch.inference_mode():
            hidden = self._hidden(batch)
            bad = self._bad_spans(hidden, batch)
            rows = batch.sampled_rows + [0] * self._padding.missing(len(batch.sampled_rows))
            logits = self._head(hidden[torch.tensor(rows, dtype=torch.int64, device=self._device)])
            bad.extend(index for index in self._bad_logits(logits, batch) if index not in bad)
        return logits, bad

    def _hidden(self, batch: PackedBatch) -> torch.Tensor:
        plan = self._attention.plan(batch)
        if self._lean is not None:
            return self._lean(batch.token_ids, batch.positions, self._attention, plan)
        output = self._base(
            input_ids=torch.tensor([batch.token_ids], device=self._device),
            position_ids=torch.tensor([batch.positions], device=self._device),
            use_cache=False,
            packed_attention=self._attention,
            packed_plan=plan,
        )
        return output.last_hidden_state[0]

    def _bad_logits(self, logits: torch.Tensor, batch: PackedBatch) -> list[int]:
        # Finite states may still overflow in the output layer, in float16 most of all.
        asked = logits[: len(batch.sampled_chunks)]
        if math.isfinite(float(asked.sum(dtype=torch.float32))):
            return []
        finite = asked.isfinite().all(dim=-1).tolist()
        return [chunk for chunk, fine in zip(batch.sampled_chunks, finite, strict=True) if not fine]

    def _bad_spans(self, hidden: torch.Tensor, batch: PackedBatch) -> list[int]:
        # A token attends to itself in every layer, so a key or value that isn't finite shows in its last hidden state.
        if math.isfinite(float(hidden.sum(dtype=torch.float32))):
            return []
        finite = hidden.float().sum(dim=-1).isfinite()
        return [span.chunk for span in batch.spans if not bool(finite[span.row : span.row + span.count].all())]
