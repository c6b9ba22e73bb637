"""The first completed stop string wins, wherever the text was cut; nothing of it is ever released."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from worker.stop_strings import StopMatcher

TEXT = st.text(alphabet="ab<c", max_size=40)
STOPS = st.lists(st.text(alphabet="ab<c", min_size=1, max_size=6), min_size=1, max_size=8)


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the first position at which any stop string is complete, the longest there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.feed(piece) for piece in pieces)
    return shown + matcher.flush(), matcher.matched


@settings(max_examples=1000, deadline=None)
@given(TEXT, STOPS, st.lists(st.integers(0, 40), max_size=10))
def test_equal_to_a_plain_search_however_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert run(pieces, stops) == expected(text, stops)


@settings(max_examples=500, deadline=None)
@given(TEXT, STOPS)
def test_held_text_is_the_longest_suffix_that_may_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    for char in text:
        matcher.feed(char)
        if matcher.matched is not None:
            return
    suffixes = [text[i:] for i in range(len(text) + 1)]
    wanted = next(s for s in suffixes if s == "" or any(stop.startswith(s) and stop != s for stop in stops))
    assert matcher.held == wanted


def test_nothing_is_held_without_stops() -> None:
    matcher = StopMatcher([])
    assert matcher.feed("anything") == "anything"
    assert matcher.flush() == ""


def test_text_after_a_match_is_dropped() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("one EN") == "one "
    assert matcher.feed("D two") == ""
    assert matcher.feed("three") == ""
    assert matcher.matched == "END"
    assert matcher.flush() == ""
