"""The engine process as the supervisor meets it: a socket on a descriptor, messages, exit codes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.engine.harness import Harness, prompts, request
from worker.engine.main import EXIT_LOAD_FAILED
from worker.engine.protocol import (
    CancelSequence,
    EngineLoadFailed,
    EngineLoading,
    EngineReady,
    FromEngine,
    Shutdown,
    StepOutput,
    ToEngine,
)

DEADLINE_S = 60


class Process:
    """The other end of the pipe, and the process itself."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(DEADLINE_S)
        command = [sys.executable, "-m", "worker.engine.main", "--fd", str(theirs.fileno()), "--model-dir", str(folder)]
        self.process = subprocess.Popen(
            [*command, "--threads", "1", "--kv-memory", "4000000", *options],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)

    def send(self, message: ToEngine) -> None:
        body = msgspec.msgpack.encode(message)
        self.socket.sendall(len(body).to_bytes(4, "little") + body)

    def read(self) -> Any:
        return self._decoder.decode(self._exactly(int.from_bytes(self._exactly(4), "little")))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def ready(self) -> EngineReady | EngineLoadFailed:
        while isinstance(message := self.read(), EngineLoading):
            assert 0 <= message.fraction <= 1
        return message

    def until_ended(self, *names: str) -> tuple[dict[str, list[int]], dict[str, str]]:
        tokens: dict[str, list[int]] = {}
        ends: dict[str, str] = {}
        while not set(names) <= ends.keys():
            output = self.read()
            assert isinstance(output, StepOutput)
            for token in output.tokens:
                tokens.setdefault(token.sequence_id, []).append(token.token_id)
            ends.update({end.sequence_id: end.reason for end in output.ended})
        return tokens, ends

    def close(self) -> None:
        self.socket.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE_S)


@pytest.fixture
def start(tiny_model: Callable[[str], Path]) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def run(*options: str, folder: Path | None = None) -> Process:
        made.append(Process(folder or tiny_model("llama3"), *options))
        return made[-1]

    yield run
    for process in made:
        process.close()


def test_a_life(start: Callable[..., Process]):
    process = start()
    ready = process.ready()
    assert isinstance(ready, EngineReady)
    assert (ready.device, ready.dtype, ready.determinism) == ("cpu", "float32", "exact")
    first, second, third = prompts(3)
    process.send(request("a", first, 12, temperature=1.0, seed=7))
    process.send(request("b", [5, 10**6], 12))
    process.send(request("c", second, 1500))
    tokens, ends = process.until_ended("a", "b")
    assert (len(tokens["a"]), ends["a"], ends["b"]) == (12, "MAX_TOKENS", "ERROR")
    process.send(CancelSequence(sequence_id="c"))
    process.send(CancelSequence(sequence_id="c"))
    assert process.until_ended("c")[1]["c"] == "CANCELLED"
    process.send(request("a", first, 12, output=tokens["a"][:5], temperature=1.0, seed=7))
    assert process.until_ended("a")[0]["a"] == tokens["a"][5:]
    process.send(request("d", third, 3))
    process.until_ended("d")
    process.send(Shutdown())
    assert process.process.wait(DEADLINE_S) == 0


def test_it_goes_when_its_parent_goes(start: Callable[..., Process]):
    for busy in (False, True):
        process = start()
        process.ready()
        if busy:
            process.send(request("a", prompts(1)[0], 1900))
            process.read()
        process.socket.close()
        assert process.process.wait(DEADLINE_S) == 0


def test_a_broken_model_is_reported_once_and_for_good(start: Callable[..., Process], tmp_path: Path):
    process = start(folder=tmp_path)
    failed = process.ready()
    assert isinstance(failed, EngineLoadFailed)
    assert failed.permanent
    assert failed.code == "CONFIG_MISSING"
    assert process.process.wait(DEADLINE_S) == EXIT_LOAD_FAILED


def test_bad_flags_end_it_with_usage(start: Callable[..., Process]):
    for options in (["--dtype", "int3"], ["--slots", "-1"], ["--device", "abacus"]):
        assert start(*options).process.wait(DEADLINE_S) == 2


def test_killed_in_mid_stream_the_reader_sees_the_end(start: Callable[..., Process]):
    process = start()
    process.ready()
    process.send(request("a", prompts(1)[0], 1900))
    process.read()
    os.kill(process.process.pid, signal.SIGKILL)
    with pytest.raises(EOFError):
        while True:
            process.read()


def test_noise_on_the_pipe_ends_it(start: Callable[..., Process]):
    process = start()
    process.ready()
    process.socket.sendall(b"\xff" * 64)
    assert process.process.wait(DEADLINE_S) == 0


def test_several_engines_share_a_machine(start: Callable[..., Process], tiny_model: Callable[[str], Path]):
    """Each may use every core; together they get through, with the tokens that one thread gives alone."""
    work = [request(str(n), prompt, 60, temperature=1.0, seed=n) for n, prompt in enumerate(prompts(4))]
    engines = [start("--threads", "2") for _ in range(2)]
    expected = Harness(tiny_model("llama3")).run(*work)
    for engine in engines:
        assert isinstance(engine.ready(), EngineReady)
        for item in work:
            engine.send(item)
    for engine in engines:
        assert engine.until_ended("0", "1", "2", "3")[0] == expected
