"""Which token said which part of an answer's text. Read `Alignment` first.

A worker's `t` is text that may be shown now: it comes late where it waits for the rest of a character or might begin a
stop string. OpenAI's `logprobs` name each token's own text instead, and only tokens that are part of the answer: not
the one that ended it, nor those of a stop string. Joined, they are the answer's text.
"""

from __future__ import annotations

from typing import NamedTuple

from llorch_wire.events import EndEvent, TokenEvent

_PARTIAL = "\ufffd"
"""In the text of a token that holds a part of a character."""


class Shown(NamedTuple):
    """A token of the answer and its share of the text."""

    text: str
    token: TokenEvent


class Alignment:
    """Of one choice. A token is given out once the text that it stands for has come.

    A token's own text is known where it is among its own alternatives. Elsewhere it is what came with it; where that
    isn't clear (several tokens were held back, and one of them isn't known), the last of them gets all of it.
    """

    def __init__(self) -> None:
        self._waiting: list[TokenEvent] = []
        self._text = ""
        """What has come and belongs to waiting tokens."""

    def push(self, token: TokenEvent) -> list[Shown]:
        """The tokens that are clear now that this one has come."""
        # Only now is it sure that the last of the waiting ones didn't end the answer.
        shown = self._matched() or (self._as_they_came() if self._text and not self._may_match() else [])
        self._waiting.append(token)
        self._text += token.t
        shown += self._matched()
        if len(self._waiting) == 1 and self._text and not self._may_match():
            shown += self._as_they_came()
        return shown

    def finish(self, end: EndEvent) -> list[Shown]:
        """The rest of the answer's tokens. What is left without text isn't part of it."""
        if not self._text:
            return []
        if self._may_match():  # a stop string begins in the middle of this token
            return [Shown(self._text, self._waiting[0])]
        by_token = end.stop_reason == "EOS" or (end.stop_reason == "STOP_SEQUENCE" and not end.stop_sequence_matched)
        if by_token and len(self._waiting) > 1:
            self._waiting.pop()
        return self._as_they_came()

    def _matched(self) -> list[Shown]:
        shown: list[Shown] = []
        while self._waiting and (own := _own_text(self._waiting[0])) and self._text.startswith(own):
            # What is more than the newest one's own was held back of one that isn't known and is shown already.
            share = own if len(self._waiting) > 1 else self._text
            shown.append(Shown(share, self._waiting.pop(0)))
            self._text = self._text[len(share) :]
        return shown

    def _may_match(self) -> bool:
        """Whether the first waiting token's text may still become complete."""
        own = _own_text(self._waiting[0]) if self._waiting else None
        return own is not None and own.startswith(self._text)

    def _as_they_came(self) -> list[Shown]:
        *before, last = self._waiting
        shown = [*(Shown("", token) for token in before), Shown(self._text, last)]
        self._waiting, self._text = [], ""
        return shown


def _own_text(token: TokenEvent) -> str | None:
    own = next((top.t for top in token.top or () if top.id == token.id), None)
    return own if own and _PARTIAL not in own else None
