"""Threads and memory: shares are sensible on any machine."""

from __future__ import annotations

import pytest

from worker.engine.machine import available_memory_bytes, cores, default_threads


@pytest.mark.parametrize(
    ("cores_available", "workers", "threads"),
    [(1, 1, 1), (2, 1, 2), (2, 2, 1), (2, 5, 1), (8, 3, 2), (16, 1, 16), (12, 1, 8), (6, 0, 4)],
)
def test_threads_are_a_share_and_a_power_of_two(cores_available, workers, threads):
    assert default_threads(cores_available, workers) == threads


def test_this_machine_has_something():
    assert cores() >= 1
    assert 0 < available_memory_bytes() < 2**50
