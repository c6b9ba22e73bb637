"""Each shown token has its share of the text: joined, they are the answer, streamed in pieces or not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch_wire.events import EndEvent, StopReason, TokenEvent, TopLogprob
from orchestratord.api.openai.logprobs import Alignment, Shown

EOS = ("<|end|>", "")


def token(index: int, own: str, came: str, known: bool) -> TokenEvent:
    top = (TopLogprob(id=index if known else 999, t=own if known else "other", logprob=-0.5),)
    return TokenEvent(t=came, i=index, id=index, logprob=-0.5, top=top)


def shown(tokens: list[TokenEvent], reason: StopReason, matched: str | None = None) -> list[Shown]:
    alignment = Alignment()
    pieces = [alignment.push(one) for one in tokens]
    end = EndEvent(stop_reason=reason, tokens_in=1, tokens_out=len(tokens), stop_sequence_matched=matched)
    return [*(item for piece in pieces for item in piece), *alignment.finish(end)]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("tokens", "reason", "matched", "content"),
    [
        ([("Once", "Once"), (" upon", " upon"), EOS], "EOS", None, ["Once", " upon"]),
        ([("Once", "Once"), (" upon", " upon")], "MAX_TOKENS", None, ["Once", " upon"]),
        ([("a", "a"), ("END", "")], "STOP_SEQUENCE", "END", ["a"]),
        ([("a", "a"), ("E", ""), ("N", ""), ("D", "")], "STOP_SEQUENCE", "END", ["a"]),
        ([("a", "a"), ("END", "")], "STOP_SEQUENCE", None, ["a"]),
        ([("a", "a"), ("o\n", "o")], "STOP_SEQUENCE", "\n", ["a", "o"]),
        ([EOS], "EOS", None, []),
    ],
)  # fmt: skip
def test_what_ended_the_answer_is_not_part_of_it(
    known: bool, tokens: list[tuple[str, str]], reason: StopReason, matched: str | None, content: list[str]
) -> None:
    events = [token(index, own, came, known) for index, (own, came) in enumerate(tokens)]
    assert [text for text, _ in shown(events, reason, matched)] == content


def test_what_was_held_back_belongs_to_its_own_token() -> None:
    held = [("a", ""), ("b", ""), ("x", "abx")]
    events = [token(index, own, came, True) for index, (own, came) in enumerate(held)]
    assert [text for text, _ in shown(events, "MAX_TOKENS")] == ["a", "b", "x"]
    flushed = [token(0, "a", "", True), token(1, "b", "", True), token(2, "<|end|>", "ab", True)]
    assert [(text, one.i) for text, one in shown(flushed, "EOS")] == [("a", 0), ("b", 1)]
    flushed = [token(0, "a", "", False), token(1, "b", "", False), token(2, "<|end|>", "ab", False)]
    assert [(text, one.i) for text, one in shown(flushed, "EOS")] == [("", 0), ("ab", 1)]


def test_parts_of_a_character_are_one_text() -> None:
    events = [token(0, "\ufffd", "", True), token(1, "\ufffd", "é", True), token(2, "!", "!", True)]
    assert [text for text, _ in shown(events, "MAX_TOKENS")] == ["", "é", "!"]


def test_a_token_without_text_in_the_middle_keeps_its_place() -> None:
    events = [token(0, "a", "a", True), token(1, "<|end|>", "", True), token(2, "b", "b", True)]
    assert [(text, one.i) for text, one in shown(events, "MAX_TOKENS")] == [("a", 0), ("", 1), ("b", 2)]


@given(st.lists(st.tuples(st.text("ab", min_size=1, max_size=3), st.integers(0, 3), st.booleans()), max_size=12))
def test_joined_it_is_the_answer_however_the_text_was_held_back(parts: list[tuple[str, int, bool]]) -> None:
    """Each token's text comes in bits, at most three characters late, all of it with the last one."""
    whole = "".join(own for own, _, _ in parts)
    events: list[TokenEvent] = []
    out = made = 0
    for index, (own, late, known) in enumerate(parts):
        made += len(own)
        until = len(whole) if index == len(parts) - 1 else max(out, made - late)
        events.append(token(index, own, whole[out:until], known))
        out = until
    result = shown(events, "MAX_TOKENS")
    assert "".join(text for text, _ in result) == whole
    assert [one.i for _, one in result] == sorted({one.i for _, one in result})
