"""An engine process without a model: speaks the engine protocol, makes tokens by arithmetic, misbehaves on request.

    python -m tests.support.scripted_engine_process --fd N --model-dir DIR

Token i of a sequence is a function of (seed, i) alone, as the real engine's are for fixed logits. What it does beyond
that is read at start from `scripted.json` in the model folder:

    {"slots": 4, "step_ms": 2, "context_length": 256, "load": "ok" | "permanent" | "transient" | "die" | "raise" |
     "hang" | "usage", "load_once": true}        the load behaviour applies to the first start only

and, while it runs, from a sequence's seed: CRASH, STALL, GARBAGE and ERROR do as they say when their third token is
due; EOS_AT_5 ends with EOS at index 5.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from worker.engine.protocol import (
    AddSequence,
    CancelSequence,
    EngineCapabilities,
    EngineLoadFailed,
    EngineLoading,
    EngineReady,
    EngineStats,
    FromEngine,
    SequenceEnd,
    Shutdown,
    StepOutput,
    ToEngine,
    TokenOut,
)

CRASH, STALL, GARBAGE, ERROR, EOS_AT_5 = 666001, 666002, 666003, 666004, 666005
VOCAB_SIZE = 268
FIRST_TEXT_ID, NUM_TEXT_IDS = 3, 256
EOS = 2


def token_at(seed: int, index: int) -> int:
    """The token that this engine makes at an index: an id of the tests' byte-level tokenizer."""
    if seed == EOS_AT_5 and index == 5:
        return EOS
    mixed = (seed * 2654435761 + index * 40503 + 12345) & 0xFFFFFFFF
    return FIRST_TEXT_ID + (mixed ^ (mixed >> 13)) % NUM_TEXT_IDS


@dataclass
class Running:
    """One sequence."""

    add: AddSequence
    made: list[int] = field(default_factory=list)


class ScriptedEngine:
    """Steps over all sequences together, one token each."""

    def __init__(self, fd: int, script: dict[str, Any]) -> None:
        self.socket = socket.socket(fileno=fd)
        self.script = script
        self.running: dict[str, Running] = {}
        self.buffer = bytearray()
        self.encoder = msgspec.msgpack.Encoder()
        self.decoder = msgspec.msgpack.Decoder(ToEngine)
        self.steps = 0
        self.decoded = 0

    def send(self, message: FromEngine) -> None:
        body = self.encoder.encode(message)
        self.socket.sendall(len(body).to_bytes(4, "little") + body)

    def receive(self, wait: bool) -> list[ToEngine]:
        messages: list[ToEngine] = []
        while select.select([self.socket], [], [], None if wait and not messages else 0)[0]:
            data = self.socket.recv(1 << 20)
            if not data:
                raise SystemExit(0)
            self.buffer += data
            while len(self.buffer) >= 4:
                length = int.from_bytes(self.buffer[:4], "little")
                if len(self.buffer) < 4 + length:
                    break
                messages.append(self.decoder.decode(bytes(self.buffer[4 : 4 + length])))
                del self.buffer[: 4 + length]
        return messages

    def run(self) -> None:
        step_s = self.script.get("step_ms", 1) / 1000
        while True:
            ended: list[SequenceEnd] = []
            for message in self.receive(wait=not self.running):
                if isinstance(message, Shutdown):
                    raise SystemExit(0)
                if isinstance(message, CancelSequence):
                    if self.running.pop(message.sequence_id, None) is not None:
                        ended.append(SequenceEnd(sequence_id=message.sequence_id, reason="CANCELLED", cached_tokens=1))
                else:
                    self.running[message.sequence_id] = Running(message, list(message.output_token_ids))
            time.sleep(step_s)
            tokens: list[TokenOut] = []
            for name in list(self.running):
                self._advance(name, tokens, ended)
            self.steps += 1
            stats = EngineStats(
                steps=self.steps, running=len(self.running), decode_tokens=self.decoded, kv_blocks_free=100
            )
            self.send(StepOutput(tokens=tokens, ended=ended, stats=stats))

    def _advance(self, name: str, tokens: list[TokenOut], ended: list[SequenceEnd]) -> None:
        sequence = self.running[name]
        sampling = sequence.add.sampling
        index = len(sequence.made)
        if index - len(sequence.add.output_token_ids) == 2:
            if sampling.seed == CRASH:
                os.abort()
            if sampling.seed == STALL:
                time.sleep(3600)
            if sampling.seed == GARBAGE:
                self.socket.sendall(b"\x05\0\0\0\xc1\xc1\xc1\xc1\xc1")
                time.sleep(3600)
            if sampling.seed == ERROR:
                del self.running[name]
                message = "this sequence failed alone; try again"
                ended.append(SequenceEnd(sequence_id=name, reason="ERROR", error_code="INTERNAL", error=message))
                return
        token = token_at(sampling.seed, index)
        sequence.made.append(token)
        self.decoded += 1
        top = [(token, -0.5), (4, -1.5)][: sampling.logprobs or 0]
        logprob = None if sampling.logprobs is None else -0.5
        tokens.append(TokenOut(name, index, token, logprob, top or None))
        reason = None
        if token == EOS and not sampling.ignore_eos:
            reason = "EOS"
        elif token in sampling.stop_token_ids:
            reason = "STOP_TOKEN"
        elif index + 1 >= sampling.max_tokens:
            reason = "MAX_TOKENS"
        if reason is not None:
            del self.running[name]
            ended.append(
                SequenceEnd(sequence_id=name, reason=reason, cached_tokens=3, prefill_time_ms=2, decode_time_ms=7)
            )


def load(engine: ScriptedEngine, folder: Path) -> None:
    """Behave as the script says a load behaves, then be ready."""
    script = engine.script
    mark = folder / "scripted.started"
    first = not mark.exists()
    mark.touch()
    how = script.get("load", "ok")
    if script.get("load_once") and not first:
        how = "ok"
    engine.send(EngineLoading(phase="reading weights", fraction=0.5))
    if how == "die":
        os.abort()
    if how == "raise":
        raise RuntimeError("no such kernel")
    if how == "usage":
        raise SystemExit(2)
    if how == "hang":
        time.sleep(3600)
    if how in ("permanent", "transient"):
        message = "the weights are truncated: download the model again"
        engine.send(EngineLoadFailed(code="BAD_MODEL", message=message, permanent=how == "permanent"))
        raise SystemExit(3)
    engine.send(
        EngineReady(
            architecture="Scripted",
            vocab_size=VOCAB_SIZE,
            context_length=script.get("context_length", 256),
            slots_total=script.get("slots", 4),
            kv_blocks_total=100,
            kv_block_tokens=16,
            dtype="float32",
            device="cpu",
            attention="none",
            attention_notice="",
            determinism="exact",
            eos_token_ids=[EOS],
            vram_bytes=0,
            capabilities=EngineCapabilities(),
        )
    )


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--model-dir", type=Path, required=True)
    arguments, _ = parser.parse_known_args()
    path = arguments.model_dir / "scripted.json"
    engine = ScriptedEngine(arguments.fd, json.loads(path.read_text()) if path.exists() else {})
    load(engine, arguments.model_dir)
    engine.run()


if __name__ == "__main__":
    main()
