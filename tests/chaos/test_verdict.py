"""The verdict itself: every way in which a ledger can be wrong is found, on ledgers written by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.chaos.support.verdict import Verdict, judge, scripted_reference

BODY = {"task_id": "t", "model": "scripted", "prompt": "p", "max_tokens": 4, "seed": 7, "ignore_eos": True}
TOKENS, REASON = scripted_reference(BODY)
Event = tuple[str, str | None, dict[str, Any]]


def tok(index: int, attempt: int = 1, token: tuple[int, str] | None = None) -> Event:
    identity, text = token or TOKENS[index]
    return "token", f"{attempt}-{index + 1}", {"i": index, "id": identity, "t": text}


def end(tokens: int = 4, reason: str = REASON, attempt: int = 1) -> Event:
    return "end", f"{attempt}-{2**64 - 1}", {"stop_reason": reason, "tokens_out": tokens}


def moved(attempt: int, kept: int) -> Event:
    return "migrated", f"{attempt}-{kept}", {"reason": "worker_lost", "tokens_kept": kept, "attempt": attempt}


WHOLE = [tok(0), tok(1), tok(2), tok(3), end()]


def verdict(events: list[Event], *extra: dict[str, Any], **options: Any) -> Verdict:
    entries = [
        {"k": "intent", "task": "t", "c": 0, "body": BODY},
        {"k": "ack", "task": "t", "at": 0},
        {"k": "ev", "task": "t", "n": 1, "e": [[name, at, json.dumps(data)] for name, at, data in events]},
        *extra,
    ]
    return judge(entries, {}, **({"may_roll_back": False} | options))


def test_a_whole_stream_is_clean() -> None:
    found = verdict(WHOLE)
    assert found.clean and (found.acknowledged, found.completed, found.tokens) == (1, 1, 4)
    assert verdict([tok(0), moved(2, 1), tok(1, 2), tok(2, 2), tok(3, 2), end(attempt=2)]).clean


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        ([tok(0), tok(2), tok(3), end()], "lost"),
        ([tok(0), tok(1), moved(2, 1), tok(2, 2), tok(3, 2), end(attempt=2)], "lost"),
        ([tok(0), tok(1), tok(1), tok(2), tok(3), end()], "doubled"),
        ([*WHOLE, ("end", None, {"stop_reason": REASON, "tokens_out": 4})], "doubled"),
        ([*WHOLE, tok(3, 2)], "doubled"),
        ([tok(0), tok(1, 2), tok(2), tok(3, 2), end(attempt=2)], "reordered"),
        (
            [tok(0), ("token", None, {"i": 1, "id": TOKENS[1][0], "t": TOKENS[1][1]}), tok(2), tok(3), end()],
            "reordered",
        ),
        (WHOLE[:3], "hung"),
        ([], "hung"),
        ([tok(0), tok(1), tok(2, token=(9, " other")), tok(3), end()], "mismatched"),
        ([tok(0), tok(1), tok(2), end(3)], "mismatched"),
        ([*WHOLE[:4], end(reason="EOS")], "mismatched"),
        ([*WHOLE[:2], end(2, "CANCELLED")], "mismatched"),
        ([tok(0), ("error", f"1-{2**64 - 1}", {"code": "INTERNAL", "message": "m"})], "mismatched"),
    ],
)
def test_each_fault_has_its_name(events: list[Event], kind: str) -> None:
    found = verdict(events)
    assert getattr(found, kind) and not found.clean


def test_an_acknowledged_task_that_is_unknown_is_lost_but_for_a_failover() -> None:
    gone = {"k": "gone", "task": "t", "why": "404"}
    again = {"k": "ev", "task": "t", "n": 2, "e": [[name, at, json.dumps(data)] for name, at, data in WHOLE]}
    assert verdict(WHOLE[:2], gone, again).lost
    undone = verdict(WHOLE[:2], gone, again, may_roll_back=True)
    assert undone.clean and undone.rolled_back
    assert verdict([tok(0), tok(0)], may_roll_back=True).doubled, "no failover excuses this"


def test_a_cancel_is_kept() -> None:
    cancel = {"k": "cancel", "task": "t", "status": "cancelled"}
    assert verdict([*WHOLE[:2], end(2, "CANCELLED")], cancel).clean
    assert verdict(WHOLE, cancel).mismatched
    assert verdict(WHOLE, {**cancel, "status": "completed"}).clean, "it came after the end"


def test_what_was_never_acknowledged_is_not_judged() -> None:
    assert judge([{"k": "intent", "task": "t", "c": 0, "body": BODY}], {}, may_roll_back=False).acknowledged == 0
