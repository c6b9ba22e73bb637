"""What the worker's unit tests share: a recording engine link, a silent watcher, a settable clock, jobs."""

from __future__ import annotations

from typing import Any

from llorch_wire.events import WorkerStartedEvent
from tests.support import tokenizers as small
from worker.answer_text import AnswerText, EndRules
from worker.detokenizer import Detokenizer
from worker.engine.protocol import AddSequence, EngineStats, SamplingSpec, SequenceEnd, StepOutput, TokenOut
from worker.generation import Generation, Job
from worker.generations import Generations
from worker.stop_strings import StopMatcher

TOKENIZER = small.byte_level()
EOS = 2


class Clock:
    """Seconds that only a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """Records what was asked of it."""

    def __init__(self) -> None:
        self.added: list[str] = []
        self.cancelled: list[str] = []

    def add(self, sequence: AddSequence) -> None:
        self.added.append(sequence.sequence_id)

    def cancel(self, sequence_id: str) -> None:
        self.cancelled.append(sequence_id)


class Watcher:
    """Records outcomes."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.delivered = 0

    def generation_started(self, generation: Generation) -> None:
        pass

    def tokens_made(self, tokens: list[TokenOut], generations: list[Generation]) -> None:
        self.delivered += len(generations)

    def generation_ended(self, generation: Generation, outcome: str) -> None:
        self.outcomes.append(outcome)


class Bench:
    """A registry with everything around it under the test's hand."""

    def __init__(self, slots: int = 4, orphan_grace_s: float = 30.0) -> None:
        self.clock, self.engine, self.watcher = Clock(), Engine(), Watcher()
        self.generations = Generations(
            self.engine, self.watcher, self.clock, lambda i: TOKENIZER.decode([i]), orphan_grace_s=orphan_grace_s
        )
        self.generations.slots_total = slots

    def start(self, task: str = "t", attempt: int = 1, **job_fields: Any) -> Generation:
        made = job(task, attempt, **job_fields)
        with self.generations.reserve_slot(task):
            return self.generations.start(made, started(task, attempt))

    def step(self, *tokens: TokenOut, ended: tuple[SequenceEnd, ...] = ()) -> None:
        self.generations.step(StepOutput(tokens=list(tokens), ended=list(ended), stats=EngineStats()))
        self.generations.check_integrity()

    def feed(self, generation: Generation, *ids: int) -> None:
        for token_id in ids:
            self.step(TokenOut(generation.job.sequence.sequence_id, generation.next_index, token_id))


def job(
    task: str = "t",
    attempt: int = 1,
    *,
    stops: tuple[str, ...] = (),
    max_tokens: int = 100,
    resumed: tuple[int, ...] = (),
    seed: int = 0,
) -> Job:
    rules = EndRules(max_tokens=max_tokens, eos_token_ids=frozenset({EOS}))
    text = AnswerText(Detokenizer(TOKENIZER, frozenset({0, 1, 2})), StopMatcher(stops), rules)
    for token_id in resumed:
        text.push(token_id)
    sequence = AddSequence(
        sequence_id=f"{task}.{attempt}",
        prompt_token_ids=[5],
        output_token_ids=list(resumed),
        sampling=SamplingSpec(max_tokens=max_tokens, seed=seed),
    )
    return Job(task, attempt, sequence, text)


def started(task: str = "t", attempt: int = 1) -> WorkerStartedEvent:
    return WorkerStartedEvent(task_id=task, attempt=attempt, instance_id="i1", tokens_in=1, determinism="exact")


def end_of(generation: Generation, reason: Any, **fields: Any) -> SequenceEnd:
    return SequenceEnd(sequence_id=generation.job.sequence.sequence_id, reason=reason, **fields)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids
