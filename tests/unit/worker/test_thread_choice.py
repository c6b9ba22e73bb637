"""How many threads a step gets: the quickest number for its size, found again when the machine changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.thread_choice import STEPS_BETWEEN_TRIALS, TRIAL_STEPS, ThreadChoice, thread_numbers

Cost = Callable[[int, int], float]
"""(rows, threads) → seconds."""


def small(rows: int, threads: int) -> float:
    """A barrier costs more than a second core gives, until there are many rows."""
    return 1e-3 + rows * 1e-5 / threads + (threads - 1) * 5e-4


def crowded(rows: int, threads: int) -> float:
    """Other processes hold the cores: whoever waits for a thread waits long."""
    return 1e-3 + rows * 1e-5 + (threads - 1) * 0.05


def drive(choice: ThreadChoice, cost: Cost, rows: int, steps: int) -> tuple[list[int], float]:
    """What was picked, and the seconds it took."""
    picks: list[int] = []
    seconds = 0.0
    for _ in range(steps):
        picks.append(choice.pick(rows))
        took = cost(rows, picks[-1])
        choice.took(rows, picks[-1], took)
        seconds += took
    return picks, seconds


@pytest.mark.parametrize(("most", "numbers"), [(0, (1,)), (1, (1,)), (2, (2, 1)), (3, (2, 1)), (16, (16, 8, 4, 1))])
def test_numbers(most: int, numbers: tuple[int, ...]):
    assert thread_numbers(most) == numbers


def test_steps_of_each_size_get_what_is_quickest_for_them():
    choice = ThreadChoice((2, 1))
    for _ in range(20):
        drive(choice, small, 4, 1)
        drive(choice, small, 256, 1)
    assert drive(choice, small, 4, 1)[0] == [1]
    assert drive(choice, small, 256, 1)[0] == [2]


def test_a_machine_that_gets_busy_and_quiet_again():
    """Several workers on one machine: each lets go of the cores that the others use, and takes them back later."""
    choice = ThreadChoice((4, 2, 1))
    drive(choice, small, 512, 50)
    assert drive(choice, small, 512, 1)[0] == [4]
    picks, _ = drive(choice, crowded, 512, 20)
    assert picks[-1] == 1
    assert sum(1 for pick in picks if pick > 1) <= 8 + TRIAL_STEPS
    drive(choice, small, 512, 80 * STEPS_BETWEEN_TRIALS)
    assert drive(choice, small, 512, 1)[0] == [4]


@pytest.mark.parametrize("cost", [small, crowded])
@pytest.mark.parametrize("rows", [1, 32, 256])
def test_trying_costs_little(cost: Cost, rows: int):
    choice = ThreadChoice((4, 2, 1))
    drive(choice, cost, rows, 50)
    _, seconds = drive(choice, cost, rows, 20_000)
    best = min(cost(rows, threads) for threads in (4, 2, 1))
    assert seconds < 1.05 * best * 20_000


def test_one_number_needs_no_choice():
    choice = ThreadChoice((1,))
    assert drive(choice, small, 8, 5)[0] == [1] * 5


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(1e-6, 1e3)), max_size=600))
def test_whatever_steps_take_it_picks_one_of_its_numbers(steps: list[tuple[int, float]]):
    choice = ThreadChoice((8, 4, 2, 1))
    for rows, seconds in steps:
        threads = choice.pick(rows)
        assert threads in (8, 4, 2, 1)
        choice.took(rows, threads, seconds)
