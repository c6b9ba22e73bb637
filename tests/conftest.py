"""What every test shares: a helper that turns a missing service into a skip on a laptop and a failure in CI."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NoReturn

import pytest


@pytest.fixture(scope="session")
def missing_service() -> Callable[[str], NoReturn]:
    """Call it with the reason: skips where CI isn't set, fails where it is."""

    def refuse(reason: str) -> NoReturn:
        if os.environ.get("CI") == "true":
            pytest.fail(f"needed in CI: {reason}")
        pytest.skip(reason)

    return refuse
