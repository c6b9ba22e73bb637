"""`GET /metrics`: this worker's own counts and what its engine says about itself, in Prometheus text.

Read `WorkerMetrics` first. No label ever holds an id, a prompt or a name that a client chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from worker.engine.protocol import EngineStats, TokenOut
from worker.generation import Generation

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class LiveState(NamedTuple):
    """What is read at the moment of a scrape."""

    status: str
    slots_total: int
    slots_used: int
    running: int
    streams: int
    retained: int
    kv_blocks_total: int
    engine_restarts: int
    tokens_per_second: float
    engine: EngineStats


class WorkerMetrics:
    """Counters and histograms of one worker; hears from `Generations`."""

    def __init__(self, live: Callable[[], LiveState]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_LiveCollector(live))
        self._started = Counter(
            "worker_generations_started",
            "Attempts accepted, by kind: new or resumed.",
            ["kind"],
            registry=self._registry,
        )
        self._ended = Counter(
            "worker_generations_ended",
            "Attempts ended, by outcome: a stop reason, an error code, preempted.",
            ["outcome"],
            registry=self._registry,
        )
        self._attached = Counter(
            "worker_reattachments", "Streams opened on a generation that existed already.", registry=self._registry
        )
        self._refused = Counter(
            "worker_requests_refused", "Requests answered with an error, by code.", ["code"], registry=self._registry
        )
        self._made = Counter(
            "worker_tokens_generated",
            "Tokens that the engine made, those beyond a stop string included.",
            registry=self._registry,
        )
        self._delivered = Counter(
            "worker_tokens_delivered", "Tokens that became part of an answer.", registry=self._registry
        )
        self._first_token = Histogram(
            "worker_time_to_first_token_seconds",
            "From accepting an attempt to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._duration = Histogram(
            "worker_generation_seconds",
            "From accepting an attempt to its end.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def render(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(self._registry)

    def generation_started(self, generation: Generation) -> None:
        """A new attempt was accepted."""
        self._started.labels("resumed" if generation.first_index else "new").inc()

    def tokens_made(self, tokens: list[TokenOut], generations: list[Generation]) -> None:
        """One step's tokens were delivered to these generations."""
        if tokens:
            self._made.inc(len(tokens))
        if generations:
            self._delivered.inc(len(generations))
        for generation in generations:
            if generation.first_token_at is not None and len(generation.frames) == 1:
                self._first_token.observe(generation.first_token_at - generation.now)

    def generation_ended(self, generation: Generation, outcome: str) -> None:
        """A terminal event was appended."""
        self._ended.labels(outcome).inc()
        self._duration.observe(max(0.0, generation.last_token_at - generation.now))

    def reattached(self) -> None:
        """A stream was opened on a generation that existed already."""
        self._attached.inc()

    def refused(self, code: str) -> None:
        """A request got an error answer."""
        self._refused.labels(code).inc()


class _LiveCollector(Collector):
    def __init__(self, live: Callable[[], LiveState]) -> None:
        self._live = live

    def collect(self) -> Iterable[Metric]:
        state = self._live()
        engine = state.engine
        status = GaugeMetricFamily("worker_status", "1 for the state the worker is in.", labels=["status"])
        status.add_metric([state.status], 1)
        yield status
        for name, text, value in (
            ("worker_slots_total", "Generations that may run at a time.", state.slots_total),
            ("worker_slots_used", "Slots taken.", state.slots_used),
            ("worker_generations_running", "Attempts without a terminal event.", state.running),
            ("worker_generations_retained", "Ended attempts kept until they are acknowledged.", state.retained),
            ("worker_streams_open", "Open event streams.", state.streams),
            ("worker_tokens_per_second", "Tokens made in the last seconds.", state.tokens_per_second),
            ("worker_kv_blocks_total", "Blocks of the KV cache.", state.kv_blocks_total),
            ("worker_kv_blocks_free", "Blocks of the KV cache that are free.", engine.kv_blocks_free),
            ("worker_kv_blocks_cached", "Blocks kept for prompts that share a prefix.", engine.kv_blocks_cached),
            ("worker_engine_sequences_running", "Sequences in the engine's batch.", engine.running),
            ("worker_engine_sequences_waiting", "Sequences that wait for a place in the batch.", engine.waiting),
            ("worker_engine_last_step_seconds", "Duration of the last step.", engine.last_step_us / 1e6),
            ("worker_vram_bytes", "Memory of the device that the engine holds.", engine.vram_bytes),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        for name, text, value in (
            ("worker_engine_restarts", "Starts of the engine after its death.", state.engine_restarts),
            ("worker_engine_steps", "Steps since the engine's start.", engine.steps),
            ("worker_engine_prefill_tokens", "Prompt tokens computed.", engine.prefill_tokens),
            ("worker_engine_decode_tokens", "Tokens decoded.", engine.decode_tokens),
            (
                "worker_engine_cached_prompt_tokens",
                "Prompt tokens found cached.",
                engine.cached_prompt_tokens,
            ),
            (
                "worker_engine_preemptions",
                "Sequences computed again for want of blocks.",
                engine.preemptions,
            ),
            ("worker_engine_step_failures", "Steps that failed.", engine.step_failures),
            ("worker_engine_prefill_seconds", "Time in steps with prompt tokens.", engine.prefill_us / 1e6),
            ("worker_engine_decode_seconds", "Time in steps that only decode.", engine.decode_us / 1e6),
        ):
            yield CounterMetricFamily(name, text, value=value)
