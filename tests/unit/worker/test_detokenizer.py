"""Joined steps equal a whole decode, on random ids and on random Unicode, primed and not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.support import tokenizers as small
from worker.detokenizer import MAX_PENDING, Detokenizer

SPECIAL = frozenset({0, 1, 2})
BYTES = small.byte_level()
LLAMA2 = small.byte_fallback(strip=True)
GEMMA = small.byte_fallback(strip=False)
FAMILIES = {"byte_level": BYTES, "llama2": LLAMA2, "gemma": GEMMA}


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> str:
    detokenizer = Detokenizer(tokenizer, SPECIAL, prompt or [])
    return "".join(detokenizer.step(token) for token in ids) + detokenizer.flush()


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(0, BYTES.get_vocab_size() + 20), max_size=80))
def test_random_ids_equal_a_whole_decode(ids: list[int]) -> None:
    assert streamed(BYTES, ids) == BYTES.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.text(max_size=40), st.text(min_size=1, max_size=10))
def test_random_text_equals_a_whole_decode_primed_and_not(family: str, text: str, prompt: str) -> None:
    tokenizer = FAMILIES[family]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    before = tokenizer.encode(prompt, add_special_tokens=False).ids
    assert streamed(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)
    # A prompt token decoded by itself must be whole text for the comparison to make sense.
    tail = tokenizer.decode(before[-8:])
    if tail and "\ufffd" not in tail:
        whole = tokenizer.decode([*before[-8:], *ids], skip_special_tokens=True)
        assert streamed(tokenizer, ids, before) == whole[len(tail) :]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, BYTES.get_vocab_size() + 5), max_size=60), st.lists(st.integers(3, 258), max_size=12))
def test_byte_level_text_does_not_depend_on_the_prompt(ids: list[int], prompt: list[int]) -> None:
    assert streamed(BYTES, ids, prompt) == BYTES.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["llama2", "gemma"]), st.lists(st.integers(131, LLAMA2.get_vocab_size() - 1), max_size=60))
def test_byte_fallback_never_fails_and_shows_each_letter_once(family: str, ids: list[int]) -> None:
    """From id 131 on there are the non-ASCII bytes and the letters: a letter's text never depends on its neighbours."""
    tokenizer = FAMILIES[family]
    text = streamed(tokenizer, ids)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert [c for c in text if "a" <= c <= "z"] == [c for c in whole if "a" <= c <= "z"]


def test_a_character_split_over_tokens_comes_whole() -> None:
    detokenizer = Detokenizer(BYTES, SPECIAL)
    ids = BYTES.encode("😀", add_special_tokens=False).ids
    assert len(ids) == 4
    assert [detokenizer.step(token) for token in ids] == ["", "", "", "😀"]


def test_special_tokens_have_no_text_even_inside_a_character() -> None:
    detokenizer = Detokenizer(BYTES, SPECIAL)
    first, *rest = BYTES.encode("é", add_special_tokens=False).ids
    assert [detokenizer.step(token) for token in [1, first, 2, *rest]] == ["", "", "", "é"]


def test_a_prompt_that_ends_inside_a_character_is_not_shown_again() -> None:
    """A decode stream primed with such a prompt once emitted the prompt's own text."""
    prompt = BYTES.encode("ab😀", add_special_tokens=False).ids[:-1]
    last = BYTES.encode("😀", add_special_tokens=False).ids[-1]
    assert streamed(BYTES, [last, *BYTES.encode("x").ids], prompt) == "\ufffdx"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_endless_broken_bytes_are_released_in_bounded_pieces(family: str) -> None:
    tokenizer = FAMILIES[family]
    broken = tokenizer.token_to_id("<0xFF>") if family != "byte_level" else tokenizer.token_to_id("ÿ")
    detokenizer = Detokenizer(tokenizer, SPECIAL)
    pieces = [detokenizer.step(broken) for _ in range(200)] + [detokenizer.flush()]
    assert "".join(pieces) == "\ufffd" * 200
    assert max(len(piece) for piece in pieces) <= MAX_PENDING + 1


def test_the_space_after_a_prompt_is_kept_where_the_decoder_strips_leading_spaces() -> None:
    prompt = LLAMA2.encode("b").ids
    answer = [LLAMA2.token_to_id("▁a")]
    assert streamed(LLAMA2, answer, prompt) == " a"
    assert streamed(LLAMA2, answer) == "a"
