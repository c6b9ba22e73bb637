"""What the soak calls flat: caches may fill up while it warms up, nothing may grow after that."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.soak_worker import LARGEST_GROWTH_MB, Sample, report, verdict


def samples(engine_mb: Callable[[float], float]) -> list[Sample]:
    return [Sample(at_s, 80.0, engine_mb(at_s)) for at_s in range(0, 1800, 9)]


def test_a_cache_that_fills_up_first_is_flat():
    found = verdict(samples(lambda at_s: 400 + min(at_s, 300) / 10))
    assert found["engine"]["first_mb"] == 400
    assert found["engine"]["last_mb"] == 430
    assert found["engine"]["growth_mb"] == 0
    assert found["http"]["slope_mb_per_hour"] == pytest.approx(0)


def test_a_leak_is_not():
    found = verdict(samples(lambda at_s: 400 + at_s / 20))
    assert found["engine"]["growth_mb"] > LARGEST_GROWTH_MB
    assert found["engine"]["slope_mb_per_hour"] == pytest.approx(180, rel=0.01)


def test_the_section_has_a_line_for_each_process():
    memory = verdict(samples(lambda at_s: 400))
    text = report({"minutes": 30.0, "requests": {"whole": 3, "bad": 1}, "tokens": 77, "memory": memory})
    assert "MINUTES=30`" in text
    assert "4 requests (3 whole, 1 bad), 77 tokens" in text
    assert "| HTTP process | 80.0 |" in text
    assert "| engine process | 400.0 |" in text
