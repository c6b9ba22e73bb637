"""What a scripted worker has in an engine's place: generations, a token for each in every step, and nothing of HTTP.

A prompt may begin with a directive (`!error`, `!stall`, `!exit`): see tests.support.scripted_worker.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from llorch_wire.events import EndEvent, ErrorEvent, PreemptedEvent, TokenEvent, encode_data
from llorch_wire.sse import frame
from llorch_wire.worker import ExecuteRequest
from tests.support import scripted_tokens
from tests.support.scripted_tokens import directive_of, length, prompt_tokens


@dataclass
class Generation:
    """One attempt."""

    request: ExecuteRequest
    first_index: int
    total: int
    by_eos: bool
    directive: list[str]
    frames: list[bytes] = field(default_factory=list)
    terminal: bool = False
    next_index: int = 0
    readers: int = 0
    unread_since: float = 0.0
    mute: bool = False
    """Fault: connections stay open and give nothing, not even comments; new ones are as mute."""
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def publish(self, *frames: bytes, terminal: bool = False) -> None:
        """New output; wakes every reader."""
        self.frames += frames
        self.terminal = self.terminal or terminal
        news, self.news = self.news, asyncio.Event()
        news.set()


class ScriptedEngine(ABC):
    """The engine. `freeze` stops it, and whoever waits for `thawed`."""

    def __init__(self, *, slots: int, token_ms: float, orphan_grace_s: float) -> None:
        self.slots, self.token_s, self.orphan_grace_s = slots, token_ms / 1000, orphan_grace_s
        self.frozen = False
        self.thawed = asyncio.Event()
        self.thawed.set()
        self.generations: dict[str, Generation] = {}
        self.computed: list[Generation] = []
        self.counts = {"executes": 0, "attaches": 0, "cancels": 0, "preempts": 0, "acks": 0, "tokens": 0, "orphans": 0}

    @property
    def running(self) -> list[Generation]:
        """Generations that hold a slot."""
        return [generation for generation in self.generations.values() if not generation.terminal]

    def computed_ranges(self) -> list[tuple[str, int, int, int]]:
        """(task_id, attempt, first index, index after the last) of every attempt that ran here."""
        return [(g.request.task_id, g.request.attempt, g.first_index, g.next_index) for g in self.computed]

    def freeze(self) -> None:
        """As by SIGSTOP: sockets stay open, nothing is answered, nothing comes."""
        self.frozen = True
        self.thawed.clear()

    def thaw(self) -> None:
        """As by SIGCONT."""
        self.frozen = False
        self.thawed.set()

    def token(self, seed: int, index: int, last: int, ends_by_eos: bool) -> TokenEvent:
        """What this worker generates there: what every other does."""
        return scripted_tokens.token(seed, index, last, ends_by_eos)

    @abstractmethod
    def crash(self) -> None:
        """What `!exit` does."""

    def begin(self, body: ExecuteRequest) -> Generation:
        """A new generation, in a slot."""
        max_tokens = body.max_tokens or 64
        total = length(body.seed, max_tokens, body.ignore_eos)
        resumed = len(body.resume_token_ids)
        wanted = [self.token(body.seed, i, total - 1, total < max_tokens).id for i in range(resumed)]
        assert wanted == list(body.resume_token_ids), "resumed with tokens that this seed doesn't give"
        generation = Generation(body, resumed, total, total < max_tokens, directive_of(body), next_index=resumed)
        generation.unread_since = asyncio.get_running_loop().time()
        self.generations[body.task_id] = generation
        self.computed.append(generation)
        self.counts["executes"] += 1
        if resumed >= total:
            self.end(generation, "EOS" if generation.by_eos else "MAX_TOKENS")
        return generation

    async def generate(self) -> None:
        """One token for every running generation each `token_s`."""
        while True:
            await asyncio.sleep(self.token_s)
            await self.thawed.wait()
            for generation in self.running:
                self._step(generation)

    def _step(self, generation: Generation) -> None:
        request, index = generation.request, generation.next_index
        made = index - generation.first_index
        match generation.directive:
            case ["stall", after] if made >= int(after):
                return
            case ["error", code, after] if made >= int(after):
                event = ErrorEvent(code=code, message="scripted failure", retriable=code in ("INTERNAL", "VRAM_OOM"))
                generation.publish(frame(event.EVENT, encode_data(event)), terminal=True)
                return
            case ["exit", after] if made >= int(after):
                generation.directive = ["stall", "0"]
                self.crash()
                return
        if index < generation.total:
            event = self.token(request.seed, index, generation.total - 1, generation.by_eos)
            generation.next_index += 1
            self.counts["tokens"] += 1
            generation.publish(frame("token", encode_data(event)))
        if generation.next_index >= generation.total:
            self.end(generation, "EOS" if generation.by_eos else "MAX_TOKENS")

    @staticmethod
    def end(generation: Generation, reason: Any) -> None:
        """End it."""
        event = EndEvent(
            stop_reason=reason,
            tokens_in=prompt_tokens(generation.request),
            tokens_out=generation.next_index,
            determinism="exact",
        )
        generation.publish(frame(event.EVENT, encode_data(event)), terminal=True)

    async def forget_unread(self) -> None:
        """End what nobody has read for longer than the orphan grace."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0.2)
            await self.thawed.wait()
            for task_id, generation in list(self.generations.items()):
                if generation.readers == 0 and loop.time() - generation.unread_since > self.orphan_grace_s:
                    self.counts["orphans"] += 1
                    self.end(generation, "CANCELLED")
                    del self.generations[task_id]

    @staticmethod
    def give_up(generation: Generation) -> None:
        """Yield at this token."""
        if not generation.terminal:
            event = PreemptedEvent(tokens_out=generation.next_index)
            generation.publish(frame(event.EVENT, encode_data(event)), terminal=True)
