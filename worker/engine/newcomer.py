"""How long a newcomer waits for its first token while others decode: in steps, the same everywhere, and in seconds.

Read `measure_newcomer` first. A newcomer joins the next step, so it waits for the one under way and then for its own
prompt, whose chunks share each step with the others' tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from worker.engine.protocol import AddSequence, FromEngine, SamplingSpec, Shutdown, StepOutput, ToEngine

_DECODED_BEFORE = 12
NEWCOMER = "newcomer"


@dataclass(frozen=True, slots=True)
class NewcomerRun:
    """One newcomer's wait, beside what its prompt takes alone and what a step of the others takes."""

    steps: int
    """Steps from the one that first saw it to the one that gave its first token, both included."""
    first_token_s: float
    alone_s: float
    others_step_s: float

    @property
    def allowed_s(self) -> float:
        """Three steps of the others and its own prefill."""
        return 3 * self.others_step_s + self.alone_s


class Stepper:
    """Drives an engine's loop by hand: what it reads next, and how many tokens each sequence has."""

    def __init__(self) -> None:
        self.inbox: list[ToEngine] = []
        self.tokens: dict[str, int] = {}
        self.ended: set[str] = set()

    def receive(self, *, wait: bool) -> list[ToEngine]:
        """What was put into `inbox`; Shutdown instead of waiting."""
        messages, self.inbox = self.inbox, []
        return messages or ([Shutdown()] if wait else [])

    def send(self, message: FromEngine) -> None:
        """Count the tokens."""
        if isinstance(message, StepOutput):
            for token in message.tokens:
                self.tokens[token.sequence_id] = self.tokens.get(token.sequence_id, 0) + 1
            self.ended.update(end.sequence_id for end in message.ended)


def measure_newcomer(
    step: Callable[[], bool], channel: Stepper, running: list[list[int]], prompt: list[int], *, salt: str
) -> NewcomerRun:
    """Let `running` prompts decode, add `prompt`, step until its first token. Raises RuntimeError if none comes.

    `step` is the loop's, `channel` what it was built with. `salt` must be new: nothing may come from the prefix cache.
    """
    channel.inbox.append(_request(NEWCOMER, prompt, 1, salt + " alone"))
    started = time.perf_counter()
    _until(step, lambda: NEWCOMER in channel.ended, 1000)
    alone_s = time.perf_counter() - started
    channel.tokens.clear()
    channel.ended.clear()
    names = [f"running {index}" for index in range(len(running))]
    for name, tokens in zip(names, running, strict=True):
        channel.inbox.append(_request(name, tokens, 1000, salt))
    _until(step, lambda: all(channel.tokens.get(name) for name in names), 10_000)
    times: list[float] = []
    for _ in range(_DECODED_BEFORE):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    channel.inbox.append(_request(NEWCOMER, prompt, 1, salt))
    started = time.perf_counter()
    steps = _until(step, lambda: NEWCOMER in channel.tokens, 1000)
    return NewcomerRun(steps, time.perf_counter() - started, alone_s, median(times))


def _request(name: str, tokens: list[int], answer: int, salt: str) -> AddSequence:
    spec = SamplingSpec(max_tokens=answer, temperature=0.0, ignore_eos=True)
    return AddSequence(sequence_id=name, prompt_token_ids=tokens, sampling=spec, cache_salt=salt)


def _until(step: Callable[[], bool], done: Callable[[], bool], most: int) -> int:
    for count in range(1, most + 1):
        if not step():
            break
        if done():
            return count
    raise RuntimeError("the engine gave no token")
