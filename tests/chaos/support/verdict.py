"""What a ledger says: lost, doubled, reordered, hung, another text than the reference. Pure. Read `judge`.

Only the ledger's file counts, not what the clients remember.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llorch_wire.events import parse_position
from tests.support.scripted_tokens import expected

Reference = tuple[list[tuple[int, str]], str]
"""(token id, text) of every token of an undisturbed run, and its stop reason."""


def scripted_reference(body: dict[str, Any]) -> Reference:
    """What the scripted workers must yield for a request."""
    tokens, reason = expected(body["seed"], body["max_tokens"], ignore_eos=body.get("ignore_eos", False))
    return [(token.id, token.t) for token in tokens], reason


@dataclass
class Transcript:
    """Everything that one client got of one task."""

    task_id: str
    body: dict[str, Any]
    acked: bool = False
    left: bool = False
    over: bool = False
    cancelled: bool = False
    """A replica said that it is cancelled: it can't end otherwise any more."""
    asked_to_cancel: bool = False
    gone: list[str] = field(default_factory=list)
    tokens: dict[int, tuple[int, str]] = field(default_factory=dict)
    due: int = 0
    """Index of the next token."""
    holes: int = 0
    last: tuple[int, int] = (0, 0)
    terminal: tuple[str, dict[str, Any]] | None = None
    migrations: list[str] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)

    def found(self, kind: str, detail: str) -> None:
        self.faults.append((kind, f"{self.task_id}: {detail}"))

    def restart(self, why: str) -> None:
        """The task, or the end of its log, was rolled back: the client began again."""
        self.gone.append(why)
        self.tokens, self.due, self.holes, self.last, self.terminal, self.cancelled = {}, 0, 0, (0, 0), None, False

    def take(self, name: str, position: str | None, data: dict[str, Any]) -> None:
        """The next event."""
        if self.terminal is not None:
            self.found("doubled", f"`{name}` after the terminal event")
        if position is not None:
            at = parse_position(position)
            if at <= self.last:
                self.found("reordered", f"id {position} after {self.last[0]}-{self.last[1]}")
            self.last = at
        if name == "token":
            self._take_token(position, data)
        elif name == "migrated":
            self.migrations.append(data["reason"])
            if data["tokens_kept"] != self.due:
                self.found("undone", f"`migrated` keeps {data['tokens_kept']} tokens of {self.due}")
        elif name in ("end", "error"):
            self.terminal = (name, data)

    def _take_token(self, position: str | None, data: dict[str, Any]) -> None:
        index = data["i"]
        if position is None or parse_position(position)[1] != index + 1:
            self.found("reordered", f"token {index} has the id {position}")
        if index < self.due:
            self.found("doubled", f"token {index} came again")
            return
        if index > self.due:
            self.holes += index - self.due
            self.found("undone", f"token {index} came where {self.due} was due")
        self.tokens[index] = (data["id"], data["t"])
        self.due = index + 1


def transcripts(entries: Iterable[dict[str, Any]]) -> dict[str, Transcript]:
    """The ledger by task."""
    found: dict[str, Transcript] = {}
    for entry in entries:
        kind, task_id = entry["k"], entry["task"]
        if kind == "intent":
            found[task_id] = Transcript(task_id, entry["body"])
            continue
        one = found[task_id]
        match kind:
            case "ack":
                one.acked = True
            case "ev":
                for name, position, data in entry["e"]:
                    one.take(name, position, json.loads(data))
            case "gone":
                one.restart(entry["why"])
            case "cancel":
                one.asked_to_cancel = True
                one.cancelled = one.cancelled or entry["status"] == "cancelled"
            case "left":
                one.left = True
            case "over":
                one.over = True
    return found


@dataclass
class Verdict:
    """The sums. Everything but the first group must be empty."""

    acknowledged: int = 0
    completed: int = 0
    cancelled: int = 0
    tokens: int = 0
    migrations: dict[str, int] = field(default_factory=dict)
    rolled_back: list[str] = field(default_factory=list)

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    reordered: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    BROKEN = ("lost", "doubled", "reordered", "hung", "mismatched")

    @property
    def clean(self) -> bool:
        return not any(getattr(self, name) for name in self.BROKEN)


def judge(
    entries: Iterable[dict[str, Any]], references: Mapping[str, Reference], *, may_roll_back: bool, pure: bool = True
) -> Verdict:
    """The verdict on a ledger. `references` has the undisturbed answers of bodies that aren't for scripted workers,
    by `reference_key`. Without `pure` there are none, and texts aren't compared."""
    verdict = Verdict()
    for one in transcripts(entries).values():
        if not one.acked:
            continue
        verdict.acknowledged += 1
        verdict.tokens += len(one.tokens)
        for reason in one.migrations:
            verdict.migrations[reason] = verdict.migrations.get(reason, 0) + 1
        for kind, detail in one.faults:
            if kind == "undone":
                kind = "rolled_back" if may_roll_back else "lost"
            getattr(verdict, kind).append(detail)
        if one.gone:
            (verdict.rolled_back if may_roll_back else verdict.lost).append(f"{one.task_id}: {', '.join(one.gone)}")
        if pure or one.terminal is None:
            _judge_end(verdict, one, references, may_roll_back)
    return verdict


def reference_of(body: dict[str, Any], references: Mapping[str, Reference]) -> Reference:
    """The undisturbed answer to a request."""
    key = reference_key(body)
    return references[key] if key in references else scripted_reference(body)


def judge_log(
    one: Transcript, references: Mapping[str, Reference], tokens: list[tuple[int, str]], ends: list[dict[str, Any]]
) -> str | None:
    """What is wrong with a task's log as it stands in the end, whatever the client got."""
    wanted, reason = reference_of(one.body, references)
    if len(ends) != 1:
        return f"{len(ends)} terminal events in the log"
    if ends[0].get("stop_reason") == "CANCELLED":
        return None if tokens == wanted[: len(tokens)] else "the log of a cancelled task has another text"
    if (tokens, ends[0].get("stop_reason")) != (wanted, reason):
        return f"the log has {len(tokens)} tokens and {ends[0]}, where {len(wanted)} and {reason} were due"
    return None


def _judge_end(verdict: Verdict, one: Transcript, references: Mapping[str, Reference], may_roll_back: bool) -> None:
    tokens, reason = reference_of(one.body, references)
    if any(index >= len(tokens) or token != tokens[index] for index, token in one.tokens.items()):
        verdict.mismatched.append(f"{one.task_id}: another text than the undisturbed run's")
    if one.terminal is None:
        if one.left and one.over:
            verdict.cancelled += 1
        else:
            verdict.hung.append(f"{one.task_id}: no end after {len(one.tokens)} of {len(tokens)} tokens")
        return
    name, data = one.terminal
    if name == "end" and data["stop_reason"] == "CANCELLED":
        verdict.cancelled += 1
        if not one.asked_to_cancel and one.body.get("on_disconnect") != "cancel":
            verdict.mismatched.append(f"{one.task_id}: CANCELLED, and nobody cancelled it")
        return
    verdict.completed += 1
    if one.cancelled:
        (verdict.rolled_back if may_roll_back else verdict.mismatched).append(
            f"{one.task_id}: it was cancelled and ended with {name}"
        )
    if name == "error":
        verdict.mismatched.append(f"{one.task_id}: error {data['code']}: {data['message'][:200]}")
    elif (data["stop_reason"], data["tokens_out"], len(one.tokens)) != (reason, len(tokens), len(tokens)):
        excused = may_roll_back and (data["stop_reason"], data["tokens_out"]) == (reason, len(tokens))
        (verdict.rolled_back if excused else verdict.mismatched).append(
            f"{one.task_id}: {data['stop_reason']} with {data['tokens_out']} tokens told and {len(one.tokens)} given, "
            f"where {reason} with {len(tokens)} was due"
        )


def reference_key(body: dict[str, Any]) -> str:
    """Names a request by what decides its answer."""
    parts = {name: value for name, value in body.items() if name not in ("task_id", "session_id", "priority")}
    return json.dumps(parts, sort_keys=True)
