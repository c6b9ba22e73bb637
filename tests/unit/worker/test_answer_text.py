"""End rules, and continuations: replaying the first n ids holds back exactly what the first run held back."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import tokenizers as small
from worker.answer_text import AnswerText, EndRules, Piece
from worker.detokenizer import Detokenizer
from worker.stop_strings import StopMatcher

TOKENIZER = small.byte_level()
SPECIAL = frozenset({0, 1, 2})
EOS = 2


def answer(stops: list[str], *, max_tokens: int = 1000, **rules: Any) -> AnswerText:
    ends = EndRules(max_tokens=max_tokens, eos_token_ids=frozenset({EOS}), **rules)
    return AnswerText(Detokenizer(TOKENIZER, SPECIAL), StopMatcher(stops), ends)


def push_all(text: AnswerText, ids: list[int]) -> list[Piece]:
    pieces: list[Piece] = []
    for token in ids:
        if text.finished is not None:
            break
        pieces.append(text.push(token))
    return pieces


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(st.integers(3, 40), st.sampled_from(ids_of("ab€😀"))), min_size=1, max_size=30),
    st.lists(st.text(alphabet='ab€😀!"#$', min_size=1, max_size=4), max_size=8),
    st.integers(1, 30),
    st.booleans(),
    st.integers(0, 6),
)
def test_a_continuation_at_every_n_gives_the_undisturbed_texts(
    ids: list[int], stops: list[str], max_tokens: int, eos: bool, min_tokens: int
) -> None:
    ids = [*ids, EOS] if eos else ids
    rules = {"max_tokens": max_tokens, "min_tokens": min_tokens}
    undisturbed = push_all(answer(stops, **rules), ids)
    for n in range(len(undisturbed)):
        first = push_all(answer(stops, **rules), ids[:n])
        second = answer(stops, **rules)
        push_all(second, ids[:n])  # the replay: its texts were logged by the first worker
        assert second.finished is None
        rest = push_all(second, ids[n:])
        assert first + rest == undisturbed


def test_a_stop_string_ends_with_the_text_before_it() -> None:
    text = answer(["hello"])
    pieces = push_all(text, ids_of("ab") + ids_of("hello"))
    assert pieces[-1] == Piece("", "STOP_SEQUENCE")
    assert "".join(piece.text for piece in pieces) == "ab"
    assert text.stop_matched == "hello"


def test_the_last_token_carries_what_was_held_back() -> None:
    pieces = push_all(answer(["bc"]), [*ids_of("ab"), EOS])
    assert [piece.text for piece in pieces] == ["a", "", "b"]
    assert pieces[-1].finished == "EOS"
    half = ids_of("€")[:1]
    pieces = push_all(answer([], max_tokens=2), ids_of("a") + half)
    assert pieces == [Piece("a", None), Piece("\ufffd", "MAX_TOKENS")]


def test_broken_bytes_flushed_at_the_end_may_still_complete_a_stop() -> None:
    text = answer(["a\ufffd"], max_tokens=2)
    pieces = push_all(text, ids_of("a") + ids_of("€")[:1])
    assert pieces == [Piece("", None), Piece("", "STOP_SEQUENCE")]


def test_eos_is_an_ordinary_token_where_it_is_to_be_ignored() -> None:
    text = answer([], max_tokens=3, ignore_eos=True)
    assert [p.finished for p in push_all(text, [EOS, EOS, EOS])] == [None, None, "MAX_TOKENS"]


def test_stop_tokens_end_as_a_stop_sequence_without_a_string() -> None:
    text = answer([], stop_token_ids=frozenset(ids_of("b")))
    assert push_all(text, ids_of("ab"))[-1].finished == "STOP_SEQUENCE"
    assert text.stop_matched is None


def test_stop_strings_count_only_after_min_tokens() -> None:
    text = answer(["a"], min_tokens=2)
    pieces = push_all(text, ids_of("a") + ids_of("a") + ids_of("b") + ids_of("a"))
    assert [piece.text for piece in pieces] == ["a", "a", "b", ""]
    assert text.stop_matched == "a"
