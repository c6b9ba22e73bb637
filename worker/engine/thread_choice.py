"""How many CPU threads a step gets, learned from what steps took. Pure policy: no torch, no clock.

Read `ThreadChoice.pick` first. No number is right beforehand. A small model's step on one thread needs no barrier, and
a barrier may cost more than the second core gives; a prompt's chunk of the same model wants every core; and on a
machine where other workers or programs run, waiting for a thread that isn't scheduled costs ten times what it saves. So
steps are sorted by size, each kind remembers what it took lately with each number, and sometimes tries the others.

    trial of each number ──▶ the quickest, for many steps ──▶ trial of another ──▶ the quickest ...
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

TRIAL_STEPS = 3
REMEMBERED_STEPS = 9
STEPS_BETWEEN_TRIALS = 200
"""A trial that turns out r times as slow is followed by r times as many, so trials cost at most about two percent."""
WORTH_A_CHANGE = 0.95
HOPELESS = 4.0
"""A trial ends at its first step that is this many times as slow as the best."""


def thread_numbers(most: int) -> tuple[int, ...]:
    """The numbers to choose from: powers of two from `most` (rounded down to one) on, at most two halvings, and 1."""
    largest = 1 << (max(1, most).bit_length() - 1)
    return tuple(sorted({largest, max(1, largest // 2), max(1, largest // 4), 1}, reverse=True))


@dataclass(slots=True)
class _Kind:
    """Steps of about one size."""

    best: int
    costs: dict[int, deque[float]] = field(default_factory=dict[int, "deque[float]"])
    trials: deque[int] = field(default_factory=deque[int])
    """Numbers still to be tried; the first is being tried."""
    steps_left: int = 0
    """Steps until the next trial."""

    def settle(self) -> None:
        """Take the quickest number, if it is worth a change. Each has been tried."""
        costs = {number: median(line) for number, line in self.costs.items()}
        quickest = min(costs, key=lambda number: costs[number])
        if costs[quickest] < WORTH_A_CHANGE * costs[self.best]:
            self.best = quickest

    def end_of_trials(self) -> None:
        """The next trial is the farther off the worse this one went."""
        self.settle()
        worst = max(median(line) for line in self.costs.values())
        self.steps_left = round(STEPS_BETWEEN_TRIALS * worst / median(self.costs[self.best]))


class ThreadChoice:
    """Picks among `numbers` of threads; told after each step what it took."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        self._numbers = numbers
        self._kinds: dict[int, _Kind] = {}

    def pick(self, rows: int) -> int:
        """Threads for the next step, of `rows` rows."""
        if len(self._numbers) == 1:
            return self._numbers[0]
        kind = self._kind(rows)
        if not kind.trials and kind.steps_left <= 0:
            kind.trials.extend(number for number in self._numbers if number != kind.best)
            for number in kind.trials:
                kind.costs[number].clear()
        return kind.trials[0] if kind.trials else kind.best

    def took(self, rows: int, threads: int, seconds: float) -> None:
        """A step of `rows` rows on `threads` threads took `seconds`."""
        if len(self._numbers) == 1:
            return
        kind = self._kind(rows)
        costs = kind.costs[threads]
        costs.append(seconds / rows)
        if not kind.trials:
            kind.steps_left -= 1
            kind.settle()
        elif kind.trials[0] == threads:
            known = [median(line) for number, line in kind.costs.items() if number != threads and line]
            if len(costs) >= TRIAL_STEPS or (known and costs[-1] > HOPELESS * min(known)):
                kind.trials.popleft()
                if not kind.trials:
                    kind.end_of_trials()

    def _kind(self, rows: int) -> _Kind:
        size = max(1, rows).bit_length()
        kind = self._kinds.get(size)
        if kind is None:
            kind = self._kinds[size] = _Kind(self._numbers[0])
            kind.costs = {number: deque[float](maxlen=REMEMBERED_STEPS) for number in self._numbers}
            kind.trials.extend(self._numbers)
        return kind
