"""The registry: slots, races, re-attachment, retention. An injected clock, no engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llorch_wire.events import EndEvent, ErrorEvent, PreemptedEvent, decode_worker_event
from llorch_wire.sse import SseParser
from tests.support.worker_fakes import EOS, Bench, end_of, ids_of
from worker.engine.protocol import TokenOut
from worker.generation import Generation
from worker.generations import LATE_END_S, MAX_RETAINED, RETENTION_S
from worker.refusals import Refused


async def read_all(bench: Bench, generation: Generation, after: int | None = None) -> list[object]:
    """Events that a reader gets of a generation that has ended."""
    position = generation.first_index - 1 if after is None else after
    parser = SseParser()
    raw = b"".join([chunk async for chunk in bench.generations.read(generation, position).chunks()])
    return [decode_worker_event(frame.event, frame.data) for frame in parser.feed(raw)]


async def test_events_of_a_whole_generation() -> None:
    bench = Bench()
    generation = bench.start()
    assert bench.engine.added == ["t.1"]
    assert bench.generations.slots_free == 3
    bench.feed(generation, *ids_of("ab"))
    bench.step(TokenOut("t.1", 2, EOS), ended=(end_of(generation, "EOS", cached_tokens=7, prefill_time_ms=3),))
    assert bench.generations.slots_free == 4
    first, *tokens, last = await read_all(bench, generation)
    assert first == generation.started
    assert [(token.i, token.t) for token in tokens] == [(0, "a"), (1, "b"), (2, "")]
    assert isinstance(last, EndEvent)
    assert (last.stop_reason, last.tokens_out, last.cached_tokens, last.prefill_time_ms) == ("EOS", 3, 7, 3)
    assert (await read_all(bench, generation, after=1))[1:] == [tokens[2], last]


def test_tokens_beyond_a_stop_string_are_dropped_and_the_slot_is_free_at_once() -> None:
    bench = Bench(slots=1)
    generation = bench.start(stops=("b",))
    bench.feed(generation, *ids_of("ab"))
    assert bench.engine.cancelled == ["t.1"]
    assert bench.generations.slots_free == 1
    assert generation.terminal is None, "the engine's figures are waited for"
    bench.step(TokenOut("t.1", 2, 9), TokenOut("t.1", 3, 9), ended=(end_of(generation, "CANCELLED", cached_tokens=5),))
    assert isinstance(generation.terminal, EndEvent)
    assert generation.terminal.stop_sequence_matched == "b"
    assert (generation.terminal.tokens_out, generation.terminal.cached_tokens) == (2, 5)


@pytest.mark.parametrize(("stops", "ids"), [(("b",), "b"), ((), "")])
def test_an_engine_that_doesnt_say_the_end_is_not_waited_for(stops: tuple[str, ...], ids: str) -> None:
    bench = Bench()
    generation = bench.start(stops=stops)
    bench.feed(generation, *(ids_of(ids) or [EOS]))
    bench.clock.now += LATE_END_S + 0.1
    bench.generations.tick()
    assert isinstance(generation.terminal, EndEvent)
    assert bench.generations.slots_free == 4
    bench.step(ended=(end_of(generation, "CANCELLED"),))
    assert bench.watcher.outcomes == [generation.terminal.stop_reason]


def test_one_terminal_event_whatever_comes_together() -> None:
    bench = Bench()
    generation = bench.start()
    bench.feed(generation, 5)
    bench.generations.cancel("t", 1, "cancel")
    frames = len(generation.frames)
    bench.generations.cancel("t", 1, "preempt")
    bench.step(TokenOut("t.1", 1, 9), ended=(end_of(generation, "CANCELLED"),))
    bench.generations.engine_down("gone")
    assert len(generation.frames) == frames
    assert bench.watcher.outcomes == ["CANCELLED"]


def test_a_cancel_after_the_last_token_lets_the_answer_end_as_it_did() -> None:
    bench = Bench()
    generation = bench.start()
    bench.feed(generation, EOS)
    bench.generations.cancel("t", 1, "cancel")
    assert isinstance(generation.terminal, EndEvent) and generation.terminal.stop_reason == "EOS"


def test_engine_death_ends_what_ran_and_keeps_what_was_complete() -> None:
    bench = Bench()
    running, complete = bench.start("a"), bench.start("b")
    bench.feed(running, 5)
    bench.feed(complete, EOS)
    bench.generations.engine_down("the engine was restarted")
    assert isinstance(running.terminal, ErrorEvent)
    assert (running.terminal.code, running.terminal.retriable) == ("INTERNAL", True)
    assert isinstance(complete.terminal, EndEvent)
    assert bench.generations.slots_free == 4
    bench.generations.check_integrity()


@pytest.mark.parametrize(
    ("code", "retriable"), [("INTERNAL", True), ("VRAM_OOM", True), ("INVALID_PARAMS", False), (None, True)]
)
def test_a_sequence_may_fail_alone(code: str | None, retriable: bool) -> None:
    bench = Bench()
    generation = bench.start()
    bench.step(ended=(end_of(generation, "ERROR", error_code=code, error="too much"),))
    assert isinstance(generation.terminal, ErrorEvent)
    assert (generation.terminal.code, generation.terminal.retriable) == (code or "INTERNAL", retriable)


def test_a_gap_in_the_engines_tokens_fails_that_generation_only() -> None:
    bench = Bench()
    broken, fine = bench.start("a"), bench.start("b")
    bench.step(TokenOut("a.1", 1, 5), TokenOut("b.1", 0, 5))
    assert isinstance(broken.terminal, ErrorEvent)
    assert fine.next_index == 1
    assert bench.engine.cancelled == ["a.1"]


def test_fencing_passes_the_slot_on() -> None:
    bench = Bench(slots=1)
    lower = bench.start("t", 2)
    with pytest.raises(Refused) as refusal:
        bench.start("other")
    assert (refusal.value.status, refusal.value.code) == (503, "OVERLOADED")
    higher = bench.start("t", 3)
    assert isinstance(lower.terminal, PreemptedEvent)
    assert bench.engine.cancelled == ["t.2"]
    assert bench.generations.slots_used == 1
    assert bench.start("t", 3) is higher, "the same attempt twice is one generation"
    with pytest.raises(Refused) as refusal:
        bench.start("t", 1)
    assert refusal.value.status == 409
    assert higher.terminal is None


def test_an_undone_attempt_gives_its_number_and_slot_to_the_newcomer() -> None:
    bench = Bench(slots=1)
    undone = bench.start("t", 2, resumed=(5, 5, 5))
    assert bench.start("t", 2, resumed=(5, 5, 5)) is undone
    shorter = bench.start("t", 2, resumed=(5,))
    assert isinstance(undone.terminal, PreemptedEvent)
    assert bench.engine.cancelled == ["t.2"] and bench.generations.find("t", 2) is shorter
    bench.generations.check_integrity()
    other = bench.start("t", 2, seed=7)
    assert isinstance(shorter.terminal, PreemptedEvent) and bench.generations.find("t", 2) is other
    assert bench.generations.slots_used == 1 and bench.generations.num_retained == 0


def test_cancelled_or_acknowledged_attempts_never_start() -> None:
    bench = Bench()
    assert bench.generations.cancel("t", 2, "cancel").found is False
    for attempt in (1, 2):
        with pytest.raises(Refused) as refusal:
            bench.start("t", attempt)
        assert refusal.value.status == 409
    generation = bench.start("t", 3)
    assert bench.generations.acknowledge("t", 3) is False, "it runs"
    bench.feed(generation, EOS)
    bench.step(ended=(end_of(generation, "EOS"),))
    assert bench.generations.acknowledge("t", 3) is True
    assert bench.generations.find("t", 3) is None
    with pytest.raises(Refused):
        bench.start("t", 3)
    bench.clock.now += RETENTION_S + 1
    bench.generations.tick()
    bench.start("t", 1)


def test_a_complete_continuation_needs_no_engine() -> None:
    bench = Bench()
    generation = bench.start(resumed=(5, 6), max_tokens=2)
    assert bench.engine.added == []
    assert isinstance(generation.terminal, EndEvent)
    assert generation.terminal.tokens_out == 2
    assert bench.generations.slots_free == 4


async def test_orphans_yield_after_their_grace() -> None:
    bench = Bench(orphan_grace_s=30)
    generation = bench.start()
    chunks = bench.generations.read(generation, -1).chunks()
    await anext(chunks)
    bench.clock.now += 100
    bench.generations.tick()
    assert generation.terminal is None, "somebody reads"
    await chunks.aclose()
    bench.clock.now += 29
    bench.generations.tick()
    assert generation.terminal is None
    bench.clock.now += 2
    bench.generations.tick()
    assert isinstance(generation.terminal, PreemptedEvent)
    assert bench.engine.cancelled == ["t.1"]


def test_ended_generations_are_kept_for_a_while() -> None:
    bench = Bench()
    for number in range(MAX_RETAINED + 10):
        generation = bench.start(str(number))
        bench.generations.cancel(str(number), 1, "cancel")
    bench.generations.tick()
    assert bench.generations.num_retained == MAX_RETAINED
    assert bench.generations.find("0", 1) is None and bench.generations.find("20", 1) is not None
    bench.clock.now += RETENTION_S + 1
    bench.generations.tick()
    assert bench.generations.num_retained == 0
    assert generation.terminal is not None
    bench.generations.check_integrity()


async def test_a_silent_stream_gets_comments_and_a_busy_one_metrics() -> None:
    bench = Bench()
    generation = bench.start()
    chunks = bench.generations.read(generation, -1).chunks()
    assert (await anext(chunks)).startswith(b"event: started")
    bench.clock.now += 0.6
    bench.generations.tick()
    assert await anext(chunks) == b": keep-alive\n\n"
    for _ in range(3):
        bench.clock.now += 0.5
        bench.feed(generation, 5)
        bench.generations.tick()
    chunk = await anext(chunks)
    assert chunk.count(b"event: metrics") == 1 and chunk.count(b"event: token") == 3
    bench.generations.cancel("t", 1, "cancel")
    assert (await anext(chunks)).startswith(b"event: end")
    with pytest.raises(StopAsyncIteration):
        await anext(chunks)
    assert generation.readers == {}


async def test_two_readers_from_different_places() -> None:
    bench = Bench()
    generation = bench.start(resumed=(5, 6))
    bench.feed(generation, 7, 8, 9)
    readers = [asyncio.create_task(read_all(bench, generation, after=n)) for n in (0, 1, 3)]
    await asyncio.sleep(0)
    bench.feed(generation, EOS)
    bench.step(ended=(end_of(generation, "EOS"),))
    indices = [[event.i for event in await reader if hasattr(event, "i")] for reader in readers]
    assert indices == [[2, 3, 4, 5], [2, 3, 4, 5], [4, 5]]


class Interleavings(RuleBasedStateMachine):
    """Any order of requests, tokens, ends, cancels, deaths and time: the books always agree."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(slots=3, orphan_grace_s=5)
        self.seen: dict[tuple[str, int], Generation] = {}

    @rule(task=st.sampled_from("abcd"), attempt=st.integers(1, 3), max_tokens=st.integers(1, 4))
    def execute(self, task: str, attempt: int, max_tokens: int) -> None:
        if self.bench.generations.find(task, attempt) is not None:
            return
        try:
            self.seen[task, attempt] = self.bench.start(task, attempt, max_tokens=max_tokens, stops=("q",))
        except Refused as refusal:
            assert refusal.status in (409, 503)

    @rule(task=st.sampled_from("abcd"), attempt=st.integers(1, 3), token=st.sampled_from([5, 60, EOS, *ids_of("q")]))
    def token(self, task: str, attempt: int, token: int) -> None:
        if (generation := self.seen.get((task, attempt))) is not None:
            self.bench.feed(generation, token)

    @rule(
        task=st.sampled_from("abcd"), attempt=st.integers(1, 3), reason=st.sampled_from(["EOS", "CANCELLED", "ERROR"])
    )
    def engine_end(self, task: str, attempt: int, reason: str) -> None:
        if (generation := self.seen.get((task, attempt))) is not None:
            self.bench.step(ended=(end_of(generation, reason),))

    @rule(
        task=st.sampled_from("abcd"),
        attempt=st.integers(1, 3),
        reason=st.sampled_from(["cancel", "preempt", "fenced", "deadline"]),
    )
    def cancel(self, task: str, attempt: int, reason: Any) -> None:
        self.bench.generations.cancel(task, attempt, reason)

    @rule(task=st.sampled_from("abcd"), attempt=st.integers(1, 3))
    def acknowledge(self, task: str, attempt: int) -> None:
        self.bench.generations.acknowledge(task, attempt)

    @rule()
    def engine_dies(self) -> None:
        self.bench.generations.engine_down("gone")

    @rule(seconds=st.sampled_from([0.3, 2, 10, 700]))
    def time_passes(self, seconds: float) -> None:
        self.bench.clock.now += seconds
        self.bench.generations.tick()

    @invariant()
    def books_agree(self) -> None:
        generations = self.bench.generations
        generations.check_integrity()
        assert 0 <= generations.slots_used <= 3
        for generation in self.seen.values():
            terminals = [raw for raw in generation.frames if not raw.startswith(b"event: token")]
            assert len(terminals) == (generation.terminal is not None)
            if terminals:
                assert generation.frames[-1] is terminals[0]


TestInterleavings = Interleavings.TestCase
