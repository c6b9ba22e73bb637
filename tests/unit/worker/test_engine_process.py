"""The pipe's framing, the reasons for a death, restart delays and device names."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.worker_fakes import Clock
from worker.engine.protocol import (
    AddSequence,
    EngineLoading,
    EngineStats,
    FromEngine,
    SamplingSpec,
    SequenceEnd,
    StepOutput,
    TokenOut,
)
from worker.engine_client import EngineClient
from worker.engine_death import explain, restart_delay_s
from worker.throughput import Throughput
from worker.vram import total_bytes, visible_device


def framed(message: FromEngine) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "little") + body


def client() -> tuple[EngineClient, list[FromEngine], Clock]:
    heard: list[FromEngine] = []
    clock = Clock()
    return EngineClient(heard.append, clock), heard, clock


def step(*tokens: TokenOut, ended: tuple[SequenceEnd, ...] = ()) -> StepOutput:
    return StepOutput(tokens=list(tokens), ended=list(ended), stats=EngineStats())


@given(st.lists(st.integers(0, 200), max_size=5), st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_frames_survive_any_cut(sizes: list[int], cuts: list[int]) -> None:
    messages = [EngineLoading(phase="x" * size, fraction=0.5) for size in sizes]
    raw = b"".join(map(framed, messages))
    engine, heard, _ = client()
    position = 0
    while position < len(raw):
        size = cuts[position % len(cuts)]
        engine.data_received(raw[position : position + size])
        position += size
    assert heard == messages
    assert engine.failure is None


@pytest.mark.parametrize(
    "raw", [b"\xff\xff\xff\xff", b"\x01\0\0\0\xc1", framed(step())[:4] + b"\x80" * 300, b"\x02\0\0\0\x92\x01"]
)
def test_what_isnt_a_message_closes_the_pipe(raw: bytes) -> None:
    engine, heard, _ = client()
    engine.data_received(raw)
    assert engine.closed.is_set()
    assert engine.failure is not None
    assert heard == []


def test_silence_counts_only_while_an_answer_is_owed() -> None:
    engine, _, clock = client()
    clock.now += 1000
    assert engine.silent_for(clock.now, seconds_per_prompt_token=0.01) == 0
    add = AddSequence(sequence_id="s", prompt_token_ids=[1] * 100, sampling=SamplingSpec(max_tokens=5))
    engine.add(add)
    clock.now += 10
    assert engine.silent_for(clock.now, seconds_per_prompt_token=0.01) == 9, "100 prompt tokens may take a second"
    engine.data_received(framed(step(TokenOut("s", 0, 7))))
    clock.now += 5
    assert engine.silent_for(clock.now, seconds_per_prompt_token=0.01) == 5, "the prompt is done"
    engine.data_received(framed(step(ended=(SequenceEnd(sequence_id="s", reason="EOS"),))))
    clock.now += 100
    assert engine.silent_for(clock.now, seconds_per_prompt_token=0.01) == 0


@pytest.mark.parametrize(
    ("returncode", "lines", "oom_kills", "failure", "words", "code"),
    [
        (-9, [], 0, None, "killed by SIGKILL", "INTERNAL"),
        (-9, [], 1, None, "memory ran out", "INTERNAL"),
        (-11, [], 0, None, "SIGSEGV", "INTERNAL"),
        (-250, [], 0, None, "signal 250", "INTERNAL"),
        (1, ["torch.OutOfMemoryError: CUDA out of memory. Tried…"], 0, None, "--kv-memory", "VRAM_OOM"),
        (2, ["error: argument --slots"], 0, None, "one of its options", "INTERNAL"),
        (3, ["the prompt was: secret"], 0, None, "status 3", "INTERNAL"),
        (None, [], 0, "no sign of life for 60 s", "no sign of life", "INTERNAL"),
        (None, [], 0, None, "closed its connection", "INTERNAL"),
    ],
)
def test_deaths_in_words(
    returncode: int | None, lines: list[str], oom_kills: int, failure: str | None, words: str, code: str
) -> None:
    death = explain(returncode, lines, oom_kills=oom_kills, connection_failure=failure)
    assert words in death.reason
    assert death.code == code
    assert "secret" not in death.reason


def test_restart_delays() -> None:
    assert [restart_delay_s(n) for n in range(1, 14)] == [0, 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


def test_devices() -> None:
    assert total_bytes("cpu") == 0
    assert visible_device(1, {}) == "1"
    assert visible_device(1, {"CUDA_VISIBLE_DEVICES": "4, GPU-abc"}) == "GPU-abc"
    assert visible_device(0, {"CUDA_VISIBLE_DEVICES": "4,5"}) == "4"


def test_throughput_follows_and_fades() -> None:
    rate = Throughput()
    for tick in range(60):
        rate.add(25)
        rate.tick(tick * 0.25)
    assert 95 < rate.tokens_per_second < 101
    for tick in range(60, 200):
        rate.tick(tick * 0.25)
    assert rate.tokens_per_second == 0
