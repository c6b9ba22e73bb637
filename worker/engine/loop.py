"""The engine's loop. Read `EngineLoop.step` first: drain → schedule → forward → sample → emit.

Nothing overlaps a step: cancels are taken between steps, so blocks are only ever freed when no forward pass reads them.

    what goes wrong                          who pays for it
    a request that can't run                 that request (ERROR), before it becomes a sequence
    numbers that aren't finite               the sequence whose rows they are in; its own blocks are zeroed
    an exception in a step                   each chunk runs again alone: the culprit (ERROR), nobody else
    no memory for a step                     the youngest waits (preempted); alone and still none: that one (VRAM_OOM)
    an error of the device (CUDA)            the process: it exits, and the supervisor starts another
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Protocol

import torch

from llorch_wire.errors import ErrorCode
from worker.engine.block_manager import BlockManager
from worker.engine.kv_cache import KVCache
from worker.engine.model_runner import ModelRunner
from worker.engine.protocol import (
    AddSequence,
    CancelSequence,
    EndReason,
    EngineStats,
    FromEngine,
    SequenceEnd,
    StepOutput,
    ToEngine,
    TokenOut,
)
from worker.engine.request_check import Refusal, check_request
from worker.engine.sampler import Sampled, Sampler
from worker.engine.scheduler import Chunk, Scheduler
from worker.engine.sequence import Sequence

logger = logging.getLogger("llorch.engine")

_CHECK_EVERY_S = 10.0


class DeviceFaultError(Exception):
    """The accelerator reported an error; nothing on it can be trusted any more."""


class Channel(Protocol):
    """Where messages come from and go to."""

    def receive(self, *, wait: bool) -> list[ToEngine]:
        """What has arrived; with `wait`, at least one message."""
        ...

    def send(self, message: FromEngine) -> None:
        """Hand a message over."""
        ...


class EngineLoop:
    """Owns every sequence from its AddSequence to its SequenceEnd."""

    def __init__(
        self,
        channel: Channel,
        scheduler: Scheduler,
        blocks: BlockManager,
        runner: ModelRunner,
        sampler: Sampler,
        cache: KVCache,
        *,
        vocab_size: int,
        context_length: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._channel = channel
        self._scheduler = scheduler
        self._blocks = blocks
        self._runner = runner
        self._sampler = sampler
        self._cache = cache
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._eos_token_ids = eos_token_ids
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0
        self._tokens: list[TokenOut] = []
        self._ended: list[SequenceEnd] = []
        self._checked_at = 0.0
        self._steps = 0
        self._step_failures = 0
        self._prefill_tokens = 0
        self._decode_tokens = 0
        self._last_step_us = 0
        self._prefill_us = 0
        self._decode_us = 0

    def run(self) -> None:
        """Serve until Shutdown. Raises ChannelClosedError (the other side is gone) or DeviceFaultError (CUDA)."""
        while self.step():
            pass

    def touch_cache(self) -> None:
        """Take all of the cache's memory from the machine now, as it is after a while of work. For measurements."""
        self._cache.pool.fill_(0)

    def step(self) -> bool:
        """One turn; False after Shutdown. Waits for a message when there is nothing to compute."""
        if not self._drain():
            return False
        started = time.perf_counter_ns()
        chunks = self._scheduler.schedule()
        if chunks:
            self._advance(chunks)
            self._count(chunks, (time.perf_counter_ns() - started) // 1000)
        self._emit()
        return True

    def _drain(self) -> bool:
        idle = not (self._scheduler.has_work or self._ended)
        if idle:
            self._check_integrity()
        for message in self._channel.receive(wait=idle):
            match message:
                case AddSequence():
                    self._add(message)
                case CancelSequence(sequence_id=sequence_id):
                    if sequence_id in self._sequences:
                        self._end(self._sequences[sequence_id], "CANCELLED")
                case _:
                    return False
        return True

    def _add(self, request: AddSequence) -> None:
        if request.sequence_id in self._sequences:
            # An end for this id would end the older one at the reader, so the newcomer is dropped without an answer.
            logger.error("sequence id used twice at a time; the second request is dropped")
            return
        refusal = check_request(request, vocab_size=self._vocab_size, context_length=self._context_length)
        if refusal is not None:
            self._ended.append(_error_end(request.sequence_id, refusal))
            return
        self._arrivals += 1
        sequence = Sequence(request, arrival=self._arrivals, context_length=self._context_length)
        self._sequences[sequence.sequence_id] = sequence
        self._scheduler.add(sequence)
        reason = sequence.finish_reason(self._eos_token_ids)
        if reason is not None:  # a resume of something that was complete
            self._end(sequence, reason)

    def _advance(self, chunks: list[Chunk]) -> None:
        """Run the chunks; whatever fails is narrowed down to the sequence that causes it."""
        try:
            self._run(chunks)
        except torch.OutOfMemoryError as error:
            self._out_of_memory(chunks, error)
        except Exception as error:
            _raise_device_fault(error)
            if _is_out_of_memory(error):
                self._out_of_memory(chunks, error)
            elif len(chunks) > 1:
                self._step_failures += 1
                logger.warning("a step of %d chunks failed (%s); running each alone", len(chunks), type(error).__name__)
                for chunk in chunks:
                    if chunk.sequence.blocks:  # an earlier one may have cost it its place
                        self._advance([chunk])
            else:
                self._step_failures += 1
                logger.exception("a sequence failed in a step of its own")
                message = f"the engine failed on this request ({type(error).__name__}); see the worker's log"
                self._fail(chunks[0].sequence, ErrorCode.INTERNAL, message)

    def _run(self, chunks: list[Chunk]) -> None:
        logits, bad = self._runner.forward(chunks)
        healthy = [chunk for index, chunk in enumerate(chunks) if index not in bad]
        if bad:
            asked = [index for index, chunk in enumerate(chunks) if chunk.samples]
            rows = [row for row, index in enumerate(asked) if index not in bad]
            logits = logits[torch.tensor(rows or [0], device=logits.device)]
        sampling = [chunk.sequence for chunk in healthy if chunk.samples]
        sampled = self._sampler.sample(logits, sampling) if sampling else []
        for chunk in healthy:
            self._scheduler.computed(chunk)
        for sequence, token in zip(sampling, sampled, strict=True):
            self._take(sequence, token)
        for index in bad:
            self._spoiled(chunks[index].sequence)

    def _take(self, sequence: Sequence, token: Sampled) -> None:
        index = sequence.num_output_tokens
        sequence.append(token.token_id)
        self._tokens.append(TokenOut(sequence.sequence_id, index, token.token_id, token.logprob, token.top))
        reason = sequence.finish_reason(self._eos_token_ids)
        if reason is not None:
            self._end(sequence, reason)

    def _spoiled(self, sequence: Sequence) -> None:
        self._step_failures += 1
        self._cache.scrub(self._blocks.forget(sequence))
        message = "the model's numbers overflowed on this request; try another dtype (float32 or bfloat16)"
        self._fail(sequence, ErrorCode.INTERNAL, message)

    def _out_of_memory(self, chunks: list[Chunk], error: Exception) -> None:
        self._step_failures += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(chunks) > 1 and self._scheduler.preempt_youngest():
            logger.warning("no memory for a step of %d chunks; the youngest sequence waits", len(chunks))
        else:
            message = f"no memory for this request ({type(error).__name__}); lower --kv-memory or --max-batch-tokens"
            self._fail(chunks[0].sequence, ErrorCode.VRAM_OOM, message)

    def _end(self, sequence: Sequence, reason: EndReason, refusal: Refusal | None = None) -> None:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.sequence_id]
        self._ended.append(
            SequenceEnd(
                sequence_id=sequence.sequence_id,
                reason=reason,
                cached_tokens=sequence.num_cached_tokens,
                prefill_time_ms=sequence.prefill_us // 1000,
                decode_time_ms=sequence.decode_us // 1000,
                error_code=refusal.code if refusal else None,
                error=refusal.message if refusal else None,
            )
        )

    def _fail(self, sequence: Sequence, code: ErrorCode, message: str) -> None:
        self._end(sequence, "ERROR", Refusal(code, message))

    def _count(self, chunks: list[Chunk], elapsed_us: int) -> None:
        self._steps += 1
        self._last_step_us = elapsed_us
        decodes = sum(1 for chunk in chunks if chunk.count == 1)
        tokens = sum(chunk.count for chunk in chunks)
        self._decode_tokens += decodes
        self._prefill_tokens += tokens - decodes
        self._decode_us += elapsed_us * decodes // tokens
        self._prefill_us += elapsed_us * (tokens - decodes) // tokens
        for chunk in chunks:
            if chunk.count == 1:
                chunk.sequence.decode_us += elapsed_us
            else:
                chunk.sequence.prefill_us += elapsed_us

    def _emit(self) -> None:
        self._channel.send(StepOutput(tokens=self._tokens, ended=self._ended, stats=self.stats()))
        self._tokens, self._ended = [], []

    def stats(self) -> EngineStats:
        """Counters and gauges as of now."""
        return EngineStats(
            steps=self._steps,
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            kv_blocks_free=self._blocks.num_available,
            kv_blocks_cached=self._blocks.num_cached,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            cached_prompt_tokens=self._scheduler.num_cached_prompt_tokens,
            preemptions=self._scheduler.num_preemptions,
            last_step_us=self._last_step_us,
            prefill_us=self._prefill_us,
            decode_us=self._decode_us,
            step_failures=self._step_failures,
            vram_bytes=torch.cuda.memory_reserved() if self._cache.pool.is_cuda else 0,
        )

    def _check_integrity(self) -> None:
        now = time.monotonic()
        if now - self._checked_at >= _CHECK_EVERY_S:
            self._checked_at = now
            self._scheduler.check_integrity()


def _error_end(sequence_id: str, refusal: Refusal) -> SequenceEnd:
    return SequenceEnd(sequence_id=sequence_id, reason="ERROR", error_code=refusal.code, error=refusal.message)


def _is_out_of_memory(error: Exception) -> bool:
    # torch's CPU allocator raises a bare RuntimeError.
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _raise_device_fault(error: Exception) -> None:
    accelerator_error = getattr(torch, "AcceleratorError", None)
    if (accelerator_error is not None and isinstance(error, accelerator_error)) or "CUDA error" in str(error):
        raise DeviceFaultError(str(error).splitlines()[0]) from error


def log_to_stderr() -> None:
    """The supervisor reads the engine's stderr into the worker's log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
