"""What one answer's tokens mean as text, and where it ends: detokenizer, stop strings, EOS and length in one place.

Read `AnswerText.push` first. It is a function of the token ids alone, so a continuation elsewhere replays the ids that
it was given, throws their texts away, and holds back exactly what the first worker held back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llorch_wire.events import StopReason
from worker.detokenizer import Detokenizer
from worker.stop_strings import StopMatcher


@dataclass(frozen=True, slots=True)
class EndRules:
    """When an answer ends, apart from stop strings. Token counts cover the whole answer, resumed tokens included."""

    max_tokens: int
    eos_token_ids: frozenset[int]
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0

    def reason(self, token_id: int, num_tokens: int) -> StopReason | None:
        """Why the answer ends with this token, its `num_tokens`-th; None while it goes on."""
        if token_id in self.eos_token_ids and not self.ignore_eos:
            return "EOS"
        if token_id in self.stop_token_ids:
            return "STOP_SEQUENCE"
        return "MAX_TOKENS" if num_tokens >= self.max_tokens else None


class Piece(NamedTuple):
    """One token's share: the text it releases and, with the last token, why the answer ends."""

    text: str
    finished: StopReason | None


class AnswerText:
    """Text of one answer as its tokens come in.

    Stop strings are looked for only in text that comes with tokens after the first `min_tokens`.
    """

    def __init__(self, detokenizer: Detokenizer, stops: StopMatcher, rules: EndRules) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._rules = rules
        self.num_tokens = 0
        self.finished: StopReason | None = None

    @property
    def stop_matched(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stops.matched

    def push(self, token_id: int) -> Piece:
        """Take the next token. Must not be called once the answer is finished."""
        self.num_tokens += 1
        text = self._visible(self._detokenizer.step(token_id))
        reason = self._rules.reason(token_id, self.num_tokens)
        if self._stops.matched is None and reason is not None:
            # The last token carries everything that was held back.
            text += self._visible(self._detokenizer.flush())
            text += self._stops.flush()
        self.finished = "STOP_SEQUENCE" if self._stops.matched is not None else reason
        return Piece(text, self.finished)

    def _visible(self, text: str) -> str:
        return text if self.num_tokens <= self._rules.min_tokens else self._stops.feed(text)
