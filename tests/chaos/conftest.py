"""What the chaos tests share: long deadlines, and a Redis server that must be there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest

from orchestratord.redis_server import NoRedisServerError, find_server

QUICK = frozenset({"test_fairness.py", "test_forecast.py", "test_restart.py", "test_suite.py", "test_verdict.py"})
"""Belong to `make test`. What takes minutes more, and shows the same at greater length, is left to `make chaos`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here kills processes, and takes its time."""
    for item in items:
        if "tests/chaos/" in item.path.as_posix():
            item.add_marker(pytest.mark.chaos)
            if item.path.name not in QUICK:
                item.add_marker(pytest.mark.slow)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(autouse=True)
def a_redis_server(missing_service: Callable[[str], NoReturn]) -> None:
    """There is a server program."""
    try:
        find_server()
    except NoRedisServerError as error:
        missing_service(str(error))
