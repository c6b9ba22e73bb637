"""How long a newcomer waits for its first token while others decode: in steps, the same everywhere, and in seconds.

Read `measure_newcomers` first. A newcomer joins the next step, so it waits for the one under way and then for its own
prompt, whose chunks share each step with the others' tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from worker.engine.protocol import AddSequence, FromEngine, SamplingSpec, Shutdown, StepOutput, ToEngine

_DECODED_BEFORE = 12
TOKENS_A_NEWCOMER = 20
"""What others decode, at most, from one newcomer to the next, if its prompt fits into a few steps."""
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

    def forget(self, sequence_id: str) -> None:
        """Make room for another of that name."""
        self.tokens.pop(sequence_id, None)
        self.ended.discard(sequence_id)


def measure_newcomers(
    step: Callable[[], bool], channel: Stepper, running: list[list[int]], prompts: list[list[int]], *, salt: str
) -> list[NewcomerRun]:
    """Let `running` prompts decode, add each of `prompts` in turn, step until its first token.

    `step` is the loop's, `channel` what it was built with. `salt` must be new: nothing may come from the prefix cache.
    The running sequences must have room for TOKENS_A_NEWCOMER tokens for each newcomer. Raises RuntimeError where one
    gets no token.
    """
    alone_s: list[float] = []
    for number, prompt in enumerate(prompts):
        channel.inbox.append(_request(NEWCOMER, prompt, 1, f"{salt} alone {number}"))
        started = time.perf_counter()
        _until(step, lambda: NEWCOMER in channel.ended, 1000)
        alone_s.append(time.perf_counter() - started)
        channel.forget(NEWCOMER)
    names = [f"running {index}" for index in range(len(running))]
    for name, tokens in zip(names, running, strict=True):
        channel.inbox.append(_request(name, tokens, 100_000, salt))
    _until(step, lambda: all(channel.tokens.get(name) for name in names), 10_000)
    return [
        _one(step, channel, prompt, f"{salt} {number}", alone)
        for number, (prompt, alone) in enumerate(zip(prompts, alone_s, strict=True))
    ]


def _one(step: Callable[[], bool], channel: Stepper, prompt: list[int], salt: str, alone_s: float) -> NewcomerRun:
    times: list[float] = []
    for _ in range(_DECODED_BEFORE):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    channel.inbox.append(_request(NEWCOMER, prompt, 1, salt))
    started = time.perf_counter()
    steps = _until(step, lambda: NEWCOMER in channel.tokens, 1000)
    run = NewcomerRun(steps, time.perf_counter() - started, alone_s, median(times))
    _until(step, lambda: NEWCOMER in channel.ended, 1000)
    channel.forget(NEWCOMER)
    return run


def _request(name: str, tokens: list[int], answer: int, salt: str) -> AddSequence:
    spec = SamplingSpec(max_tokens=answer, temperature=0.0, ignore_eos=True)
    return AddSequence(sequence_id=name, prompt_token_ids=tokens, sampling=spec, cache_salt=salt)


def _until(step: Callable[[], bool], done: Callable[[], bool], most: int) -> int:
    count = 0
    while not done():
        count += 1
        if count > most or not step():
            break
    else:
        return count
    raise RuntimeError("the engine gave no token")
