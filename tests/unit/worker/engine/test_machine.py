"""Threads and memory: shares are sensible on any machine."""

from __future__ import annotations

import pytest

from worker.engine.machine import available_memory_bytes, cores, default_threads, settle_threads


@pytest.mark.parametrize(("cores_available", "threads"), [(0, 1), (1, 1), (2, 2), (3, 2), (8, 8), (12, 8), (16, 16)])
def test_threads_are_a_power_of_two_within_the_cores(cores_available: int, threads: int):
    assert default_threads(cores_available) == threads


def test_what_the_environment_says_about_waiting_stands():
    given = {"OMP_WAIT_POLICY": "PASSIVE"}
    settle_threads(2, given)
    assert given == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    given = {"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "9"}
    settle_threads(1, given)
    assert given == {"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    given = {}
    settle_threads(1, given)
    assert int(given["GOMP_SPINCOUNT"]) > 0


def test_this_machine_has_something():
    assert cores() >= 1
    assert 0 < available_memory_bytes() < 2**50
