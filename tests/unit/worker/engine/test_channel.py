"""Frames over a real socket pair: whole, split, joined, broken, closed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import msgspec
import pytest

from worker.engine.channel import ChannelClosedError, EngineChannel
from worker.engine.protocol import (
    MAX_FRAME_BYTES,
    AddSequence,
    CancelSequence,
    EngineStats,
    FromEngine,
    SamplingSpec,
    Shutdown,
    StepOutput,
    TokenOut,
)


@pytest.fixture
def pair() -> Iterator[tuple[EngineChannel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = EngineChannel(os.dup(theirs.fileno()))
    theirs.close()
    ours.settimeout(5)
    yield channel, ours
    channel.close()
    ours.close()


def frame(message: object) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "little") + body


CANCEL = CancelSequence(sequence_id="a")
ADD = AddSequence(sequence_id="b", prompt_token_ids=[1, 2], sampling=SamplingSpec(max_tokens=3, logit_bias={5: 1.0}))


def test_messages_that_arrive_together_are_read_together(pair):
    channel, ours = pair
    ours.sendall(frame(CANCEL) + frame(ADD) + frame(Shutdown())[:3])
    assert channel.receive(wait=True) == [CANCEL, ADD]
    ours.sendall(frame(Shutdown())[3:])
    assert channel.receive(wait=True) == [Shutdown()]


def test_without_wait_nothing_is_nothing(pair):
    channel, _ = pair
    assert channel.receive(wait=False) == []


def test_sent_messages_can_be_decoded(pair):
    channel, ours = pair
    output = StepOutput(tokens=[TokenOut("a", 0, 7, -0.5, [(7, -0.5)])], ended=[], stats=EngineStats(steps=1))
    channel.send(output)
    length = int.from_bytes(ours.recv(4), "little")
    assert msgspec.msgpack.decode(ours.recv(length), type=FromEngine) == output


def test_a_closed_peer_is_noticed(pair):
    channel, ours = pair
    ours.close()
    with pytest.raises(ChannelClosedError):
        channel.receive(wait=True)
    with pytest.raises(ChannelClosedError):
        for _ in range(100):
            channel.send(StepOutput(tokens=[], ended=[], stats=EngineStats()))


@pytest.mark.parametrize("data", [(MAX_FRAME_BYTES + 1).to_bytes(4, "little"), b"\x02\0\0\0\xc1\xc1"])
def test_what_is_no_message_closes_the_channel(pair, data):
    channel, ours = pair
    ours.sendall(data)
    with pytest.raises(ChannelClosedError):
        channel.receive(wait=True)
