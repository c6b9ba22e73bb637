"""Finds stop strings in text that comes in pieces, and decides how much of it may be shown already.

Read `StopMatcher.feed` first. Pure: the same pieces, or the same text cut elsewhere, always give the same match.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Matches up to a handful of stop strings on text.

    The stop string that *completes* first wins; of several that complete at the same character, the longest. This rule
    doesn't depend on where the text was cut into pieces. Text that may still turn into a stop string is held back: the
    longest suffix that is a proper prefix of one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are non-empty. Order doesn't matter."""
        self._stops = tuple(dict.fromkeys(stops))
        self._first_chars = frozenset(stop[0] for stop in self._stops)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self.held = ""
        """Text taken in but not released yet."""
        self.matched: str | None = None
        """The stop string that was found; nothing more is released after it."""

    def feed(self, text: str) -> str:
        """Take the next piece; returns the text that is certain not to be part of a stop string, up to a match."""
        if self.matched is not None:
            return ""
        if not self._stops or not text:
            return text
        window = self.held + text
        found = self._first_completed(window)
        if found is not None:
            start, self.matched = found
            self.held = ""
            return window[:start]
        cut = self._held_from(window)
        self.held = window[cut:]
        return window[:cut]

    def flush(self) -> str:
        """Release what is held back: the text ended and no stop string came of it."""
        rest, self.held = self.held, ""
        return rest

    def _first_completed(self, window: str) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None  # (end, start, stop)
        for stop in self._stops:
            start = window.find(stop)
            if start >= 0:
                candidate = (start + len(stop), start, stop)
                if best is None or candidate < best:
                    best = candidate
        return None if best is None else (best[1], best[2])

    def _held_from(self, window: str) -> int:
        """Index from which the window's rest is a proper prefix of some stop string."""
        for position in range(max(0, len(window) - self._longest + 1), len(window)):
            if window[position] in self._first_chars:
                rest = window[position:]
                if any(stop.startswith(rest) for stop in self._stops):
                    return position
        return len(window)
