"""Tokens per second over the last seconds, exponentially weighted. Pure.

Read `Throughput.tick` first.
"""

from __future__ import annotations

WINDOW_S = 2.0


class Throughput:
    """Count with `add`, advance with `tick`."""

    def __init__(self) -> None:
        self._count = 0
        self._at: float | None = None
        self._rate = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Smoothed rate; 0 soon after the last token."""
        return round(self._rate, 2) if self._rate >= 0.01 else 0.0

    def add(self, count: int) -> None:
        """`count` tokens came."""
        self._count += count

    def tick(self, now: float) -> None:
        """Take what was counted since the last tick into the rate."""
        if self._at is not None and now > self._at:
            elapsed = now - self._at
            weight = min(1.0, elapsed / WINDOW_S)
            self._rate += weight * (self._count / elapsed - self._rate)
        self._at, self._count = now, 0
